"""One peer that several processes work for, each with the same loop: its first process moves messages, the others learn what it got.

All of them mix: what a process makes of what arrives follows from it and from what it has, which are the same on all. So nobody but
the first, which speaks for the peer, is known to the other peers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfl.transport.base import ANY, EXCHANGE, SENT, Arrived, Transport
from dfl.transport.packet import Packet
from dfl.transport.stopping import Stopped
from dfl.transport.team import Team

# errors that all processes of a peer raise alike
_ERRORS: dict[str, type[BaseException]] = {"ValueError": ValueError, "Stopped": Stopped, "ConnectionError": ConnectionError,
                                           "OSError": OSError}
_NAMES = ("payload", "numel", "meta")


class Speaking:
    """The transport of the first process of a team: what comes of each step is told to the others. All else is `inner`'s."""

    def __init__(self, inner: Transport, team: Team):
        self.__dict__.update(inner=inner, team=team)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def _echo(self, step: Callable[[], Any], pack: Callable[[Any], Mapping[str, Tensor]]) -> Any:
        try:
            found = step()
        except (ValueError, OSError, Stopped) as error:
            kind = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
            self.team.tell({"error": kind, "text": " ".join(str(error).split())})
            raise
        self.team.tell({}, pack(found))
        return found

    def begin(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
              due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Callable[[], Arrived]:
        begun = self.inner.begin(t, packets, addressed, due, expected, what)
        return lambda: self._echo(begun, _packed)

    def exchange(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
                 due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Arrived:
        return self.begin(t, packets, addressed, due, expected, what)()

    def agree(self, value: int, most: int = ANY) -> int:
        return self._echo(lambda: self.inner.agree(value, most), lambda found: {"it": torch.tensor(found)})

    def summary(self, values: Tensor) -> Tensor:
        return self._echo(lambda: self.inner.summary(values), lambda found: {"it": found})

    def total(self, rows: Tensor) -> Tensor:
        return self._echo(lambda: self.inner.total(rows), lambda found: {"it": found})

    def share(self, data: bytes) -> list[bytes]:
        return self._echo(lambda: self.inner.share(data), lambda found: {str(k): _bytes(one) for k, one in enumerate(found)})

    def spread(self, data: bytes) -> bytes:
        return self._echo(lambda: self.inner.spread(data), lambda found: {"it": _bytes(found)})

    def leave(self, error: BaseException) -> None:
        self.inner.leave(error)
        self.team.leave(error)

    def close(self) -> None:
        self.inner.close()
        self.team.close()


class Listening:
    """The transport of every other process of a team, which is none of the run's: each step gives what the first process got."""

    rank, wire_bytes, control_bytes, measured_bytes = -1, 0, 0, 0
    most, run = 0, 0
    round: int | None = None

    def __init__(self, size: int, team: Team):
        self.size, self.team, self.device = size, team, torch.device("cpu")

    def _heard(self) -> dict[str, Tensor]:
        about, tensors = self.team.hear()
        if "error" in about:
            raise _ERRORS[about["error"]](about["text"])
        return tensors

    def begin(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
              due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Callable[[], Arrived]:
        return lambda: _unpacked(self._heard(), expected, self.device)

    def exchange(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
                 due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Arrived:
        return self.begin(t, packets, addressed, due, expected, what)()

    def lend(self, rows: Tensor) -> None:
        pass

    def newly_sent(self) -> list[int]:
        return [0] * len(SENT)

    def watch(self, asked: Callable[[], bool]) -> None:
        pass

    @property
    def told_to_stop(self) -> bool:
        return False

    def agree(self, value: int, most: int = ANY) -> int:
        return int(self._heard()["it"])

    def summary(self, values: Tensor) -> Tensor:
        return self._heard()["it"].to(values.device)

    def total(self, rows: Tensor) -> Tensor:
        return self._heard()["it"].to(rows.device)

    def share(self, data: bytes) -> list[bytes]:
        told = self._heard()
        return [bytes(told[str(k)].numpy()) for k in range(len(told))]

    def spread(self, data: bytes) -> bytes:
        return bytes(self._heard()["it"].numpy())

    def describe(self, process: int) -> str:
        return f"process {process}"

    def leave(self, error: BaseException) -> None:
        self.team.leave(error)

    def close(self) -> None:
        self.team.close()


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _packed(arrived: Arrived) -> dict[str, Tensor]:
    """Tensors by receiver/sender/kind/name; a message without parts is known by its empty mark."""
    found: dict[str, Tensor] = {}
    for receiver, inbox in arrived.items():
        for sender, packet in inbox.items():
            place = f"{receiver}/{sender}"
            found[f"{place}/mark/"] = torch.empty(0, dtype=torch.uint8)
            found |= {f"{place}/payload/{name}": value for name, value in packet.payload.items()}
            found |= {f"{place}/numel/{name}": torch.tensor(value) for name, value in packet.numel.items()}
            found |= {f"{place}/meta/{name}": value for name, value in packet.meta.items()}
    return found


def _unpacked(tensors: Mapping[str, Tensor], receivers, device: torch.device) -> Arrived:
    found: dict[int, dict[int, dict[str, dict[str, Any]]]] = {receiver: {} for receiver in receivers}
    for key, value in tensors.items():
        receiver, sender, kind, name = key.split("/", 3)
        parts = found.setdefault(int(receiver), {}).setdefault(int(sender), {one: {} for one in _NAMES})
        if kind != "mark":
            parts[kind][name] = int(value) if kind == "numel" else value.to(device) if kind == "payload" else value
    return {receiver: {sender: Packet(**parts) for sender, parts in sorted(inbox.items())} for receiver, inbox in found.items()}
