"""All peers in one process: messages never leave memory."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dfl.transport.base import ANY, EXCHANGE, SENT, Arrived, add_in_order
from dfl.transport.packet import Packet


class InProcess:
    """The transport of a simulation and of a run under plain python."""

    rank, size = 0, 1
    wire_bytes = 0
    control_bytes = 0
    measured_bytes = 0
    most = 0
    run = 0
    round: int | None = None
    _asked = staticmethod(lambda: False)

    def exchange(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
                 due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Arrived:
        arrived: Arrived = {peer: {} for peer in expected}
        for sender, receivers in addressed.items():
            for receiver in receivers:
                arrived[receiver][sender] = packets[sender]
        return arrived

    def begin(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
              due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Callable[[], Arrived]:
        arrived = self.exchange(t, packets, addressed, due, expected, what)
        return lambda: arrived

    def lend(self, rows: Tensor) -> None:
        pass

    def newly_sent(self) -> list[int]:
        return [0] * len(SENT)

    def watch(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    @property
    def told_to_stop(self) -> bool:
        return self._asked()

    def agree(self, value: int, most: int = ANY) -> int:
        return value

    def summary(self, values: Tensor) -> Tensor:
        return values

    def total(self, rows: Tensor) -> Tensor:
        found = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        add_in_order(found, rows)
        return found

    def share(self, data: bytes) -> list[bytes]:
        return [data]

    def spread(self, data: bytes) -> bytes:
        return data

    def describe(self, process: int) -> str:
        return f"process {process}"

    def leave(self, error: BaseException) -> None:
        pass

    def close(self) -> None:
        pass
