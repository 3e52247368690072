"""Simulated time: each peer has a clock, which a local phase and the messages that it waits for advance."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dfl.slots import Link, Network, Round, State, bits_of, scalar_of
from dfl.transport.base import Arrived
from dfl.transport.ledger import CLOCK, bytes_of
from dfl.transport.packet import Packet

_LATEST = 0.2  # the weight of the last round in a peer's measured bandwidth


class Clock:
    """The clocks of the hosted peers on a network; without a timed one they stand still.

    states() -> {peer: state}, where they are kept.
    """

    def __init__(self, network: Network, states: Callable[[], dict[str, State]]):
        self.network, self.states = network, states

    def now(self, peer: int) -> Tensor:
        return self.states().get(str(peer), {}).get("time", torch.zeros((), dtype=torch.float64))

    def bandwidth(self, peer: int) -> float | None:
        """Bytes a second that a peer has sent lately; None before its first message."""
        found = self.states().get(str(peer), {}).get("bandwidth")
        return None if found is None else float(found)

    def train(self, rounds: Sequence[Round]) -> None:
        """Advance by the local phases."""
        for round in rounds if self.network.timed else ():
            given = round.plan.seconds
            took = self.network.compute(round.t, round.peer, round.local_steps) if given is None else given
            self._set(round.peer, time=self.now(round.peer) + took)

    def stamped(self, packets: Mapping[int, Packet]) -> dict[int, Packet]:
        """With the time at which each sender sends."""
        if not self.network.timed:
            return dict(packets)
        return {peer: packet._replace(meta={**packet.meta, CLOCK: bits_of(self.now(peer))}) for peer, packet in packets.items()}

    def wait(self, arrived: Arrived, t: int) -> None:
        """Whoever receives is as late as the last message."""
        for peer, inbox in arrived.items() if self.network.timed else ():
            late = [scalar_of(packet.meta[CLOCK])[0] + self.network.seconds(Link(sender, peer, t, 0), bytes_of(packet))
                    for sender, packet in inbox.items()]
            self._set(peer, time=torch.stack([self.now(peer), *late]).max())

    def measure(self, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]], t: int) -> None:
        """The moving mean of each sender's bandwidth, after its packet to the receivers that it is addressed to."""
        for peer, packet in packets.items():
            size, before = bytes_of(packet), self.bandwidth(peer)
            seconds = sum(self.network.seconds(Link(peer, j, t, 0), size) for j in addressed[peer])
            if seconds:
                now = size * len(addressed[peer]) / seconds
                mean = now if before is None else (1 - _LATEST) * before + _LATEST * now
                self._set(peer, bandwidth=torch.tensor(mean, dtype=torch.float64))

    def _set(self, peer: int, **values: Tensor) -> None:
        self.states()[str(peer)] = {**self.states().get(str(peer), {}), **values}
