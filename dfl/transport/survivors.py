"""The transport of a run that goes on without those it loses: data plane and control plane of every run, over members (members.py)."""

import socket
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from dfl.transport.distributed import Distributed
from dfl.transport.link import Link
from dfl.transport.members import FaultError, Members
from dfl.transport.view import Member


class Ties(Link):
    """Frames between members. Who is at fault is named, so that the others can go on without it."""

    group: Any  # Members

    @property
    def members(self) -> list[int]:
        return self.group.processes

    def fault(self, process: int, text: str) -> ConnectionError:
        return FaultError(process, text)

    def leave(self, error: BaseException) -> None:
        self.group.leave(" ".join(str(error).split()) or type(error).__name__)


class Survivors(Distributed):
    """`rank` and `size` are the place of this process among the members, and how many these are: they change with every settlement."""

    def __init__(self, num_peers: int, members: Members, *, run: int = 0, timeout: float = 300.0):
        self.group = members
        super().__init__(num_peers, cast(Any, members), device=torch.device("cpu"), run=run, timeout=timeout)
        self.asked: Callable[[], bool] = lambda: False
        members.describe = self.link.describe

    def _make_link(self, group: Any, run: int, timeout: float) -> Link:
        return Ties(group, self.hosts, run=run, timeout=timeout)

    def settle(self, info: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Agree on the members; what each has told of itself, by process. LeftOutError."""
        found = self.group.settle({**info, "host": socket.gethostname()})
        for process, told in found.items():
            self.link.names[process] = str(told.get("host", "not told"))[:64]
        self._lengths = {}  # both ends begin anew
        return found

    @property
    def alive(self) -> list[int]:
        """The peers of the members."""
        return [peer for process in self.group.processes for peer in self.hosts[process]]

    def starts(self) -> dict[int, Member]:
        return {member.process: member for member in self.group.members}

    def accuse(self, fault: FaultError) -> None:
        self.group.mail.cut(fault.process)
        self.group.accuse(fault.process, str(fault))

    def check(self) -> None:
        """ViewChange where the members have to settle."""
        self.group.check()

    def watch(self, asked: Callable[[], bool]) -> None:
        self.asked = asked

    @property
    def told_to_stop(self) -> bool:
        return self.asked()

    def close(self) -> None:
        self.group.finish()
