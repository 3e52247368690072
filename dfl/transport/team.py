"""The processes that hold one base model between them, and work for the same peers: a team. Its first process speaks for them.

It alone is a process of the run to the others (dfl/transport/distributed.py). What it asks its team for is a message of a few tensors;
what the team finds is added up. The parts of the base model move over a group of torch.distributed, as FSDP asks for one: the default
group, where a process has none, is the team's own world; else it is a new one beside that.
"""

import json
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from dfl.transport.group import address_of, held_by_first
from dfl.transport.lookout import Lookout
from dfl.transport.meeting import meet
from dfl.transport.notes import Note, Notes, note_key
from dfl.transport.seats import Seat, agree_on_wire, seat_of
from dfl.transport.stopping import Stopped
from dfl.transport.watch import no_life

# the name of what a message is about, beside its tensors
_ABOUT = "about"
# a process that fails has so long to say why before the others look
GRACE = 1.0
# the others of a team wait while the first waits for other peers, again and again: so many of its patiences
PATIENCES = 10


class TeamError(ConnectionError):
    """A process of the team is gone, or does not answer."""


class Team:
    """`size` processes of which this is `rank`; `store` is for them alone, the run's other processes have it under other names.

    first: the number of its first process among all that were started. device: where the base model lies; wish: `backend` of the
    recipe, over what its parts move, None where it is not ours. timeout: seconds for a step; patience: until all have come.
    ConnectionError where they do not.
    """

    def __init__(self, store, rank: int, size: int, *, first: int, device: torch.device, wish: str | None, timeout: float,
                 patience: float):
        self.rank, self.size, self.first, self.device = rank, size, first, device
        self.store: Any = dist.PrefixStore(f"team/{meet(store, rank, size, patience)}", store)
        long = timedelta(seconds=PATIENCES * timeout)
        self._asks: Any = dist.ProcessGroupGloo(dist.PrefixStore("asks", self.store), rank, size, long)
        self._own_world, self.group = False, cast(Any, None)
        self._part = "works for the same peer" if wish is None else "holds another part of the same base model"
        self._store_holder = 0 if first == 0 and held_by_first(store) else None
        self._notes, self._lookout = Notes(self.store, rank, address_of(store)), cast(Any, None)
        if wish is not None:
            self._make_world("cpu:gloo,cuda:nccl" if self._wire(wish) == "nccl" else "gloo", timedelta(seconds=timeout))

    def _make_world(self, backend: str, limit: timedelta) -> None:
        self._own_world = not dist.is_initialized()
        if self._own_world:
            dist.init_process_group(backend, store=dist.PrefixStore("world", self.store), rank=self.rank, world_size=self.size,
                                    timeout=limit)
            self.group = dist.group.WORLD
        else:
            self.group = dist.new_group(list(range(self.first, self.first + self.size)), timeout=limit, backend=backend,
                                        use_local_synchronization=True)

    def _wire(self, wish: str) -> str:
        """nccl or gloo, as all of the team settle."""
        self.store.set(f"seat/{self.rank}", json.dumps(seat_of(self.device)))
        return agree_on_wire(wish, [Seat(*json.loads(self.store.get(f"seat/{rank}"))) for rank in range(self.size)])[0]

    @property
    def speaks(self) -> bool:
        """Whether this process speaks for the peers of its team."""
        return self.rank == 0

    def watch(self, leave: Callable[[BaseException], None], always: bool = False) -> None:
        """From now on this process ends where another of the team shows no life for SILENT_SECONDS (dfl/transport/watch.py) while it
        waits for that; always: also where a script's own group may. leave: tells the other peers why, before."""

        def lost(silent: list[int]) -> str:
            error = TeamError(f"{self._named(silent)} {no_life()}")
            self._tell_why(error)
            leave(error)
            return str(error)

        # a clone: a connection to the store is for one thread
        self._lookout = Lookout(self.store.clone(), self.rank, self._others, self._store_holder, always=always, lost=lost)

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def tell(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor] = {}) -> None:
        """To all others of the team, which `hear` it."""
        text = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        # clones: parts of one buffer are not to travel twice
        data = save({_ABOUT: text} | {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
        self._spread(torch.tensor([len(data)]))
        self._spread(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def hear(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the first process tells next."""
        length = torch.zeros(1, dtype=torch.int64)
        self._spread(length)
        data = torch.empty(int(length), dtype=torch.uint8)
        self._spread(data)
        tensors = load(bytes(data.numpy()))
        return json.loads(bytes(tensors.pop(_ABOUT).numpy())), tensors

    def _spread(self, tensor: Tensor) -> None:
        with self.steps():
            self._asks.broadcast([tensor]).wait()

    def port(self) -> int:
        """Of a store on this machine, held by the first process, in which the team may meet as a world of a script's own. ValueError
        where it is on several machines."""
        host = socket.gethostname()
        if self.speaks:
            self._held = dist.TCPStore("127.0.0.1", 0, self.size, is_master=True, wait_for_workers=False)
            self.tell({"port": self._held.port, "host": host})
            return self._held.port
        told = self.hear()[0]
        if told["host"] != host:
            raise ValueError(f"processes_per_peer = {self.size}: process {self.first} is on {told['host']}, process "
                             f"{self.first + self.rank} on {host}; those of a peer share a machine")
        return int(told["port"])

    def copy(self, tensor: Tensor) -> None:
        """Give all processes what the first has in it, in place."""
        with self.steps():
            dist.broadcast(tensor, group=self.group, group_src=0)

    def add(self, tensor: Tensor) -> None:
        """The sum over all processes, in place, on all of them."""
        with self.steps():
            dist.all_reduce(tensor, group=self.group)

    def steps(self) -> "_Steps":
        """In here processes of the team wait for each other: TeamError where one does not come."""
        return _Steps(self)

    def lost(self, error: BaseException) -> BaseException:
        """The error for a step that failed, in the words of who has left, where anybody has; Stopped where that was told to stop."""
        until = time.monotonic() + GRACE
        while time.monotonic() < until and self._notes.store is not None:
            for rank in self._others:
                if found := self._notes.look_up(note_key(rank)):
                    note = Note(**json.loads(found))
                    return Stopped(note.text) if note.error == "Stopped" else TeamError(f"process {self.first + rank}: {note.text}")
            time.sleep(0.05)
        said = " ".join(str(error).split())[:120]
        return TeamError(f"{self._named(self._others)} is gone or does not answer ({said})")

    def _named(self, ranks: list[int]) -> str:
        names = [str(self.first + rank) for rank in ranks]
        who = f"process {names[0]}" if len(names) == 1 else f"one of processes {', '.join(names)}"
        return f"{who}, which {self._part},"

    def leave(self, error: BaseException) -> None:
        """This process fails: leave word for the others of the team, and close the connections, so that they notice."""
        if self._asks is None:
            return
        self._tell_why(error)
        self._end()

    def _tell_why(self, error: BaseException) -> None:
        kind = "Stopped" if isinstance(error, Stopped) else "OSError"
        self._notes.write(Note(self.rank, " ".join(str(error).split()) or type(error).__name__, error=kind))

    def close(self) -> None:
        """Leave together."""
        if self._asks is None:
            return
        with self.steps():
            self._asks.barrier().wait()
        self._end()

    def _end(self) -> None:
        self._asks = None
        if self._lookout is not None:
            self._lookout.end()
        if self._own_world and dist.is_initialized():
            dist.destroy_process_group()
        self.group = None


class _Steps:
    """RuntimeErrors of torch.distributed become TeamErrors; others stay what they are."""

    def __init__(self, team: Team):
        self.team = team

    def __enter__(self) -> None:
        if self.team._lookout is not None:
            self.team._lookout.begin()

    def __exit__(self, kind, error, trace) -> None:
        if self.team._lookout is not None:
            self.team._lookout.done()
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and _of_connections(str(error)):
            raise self.team.lost(error) from error


def _of_connections(text: str) -> bool:
    return any(word in text for word in ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL"))
