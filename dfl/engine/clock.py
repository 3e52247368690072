"""Simulated time: each peer has a clock, which a local phase and the messages that it waits for advance."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfl.engine.ledger import CLOCK, bytes_of
from dfl.slots import Link, Network, State, scalar_of
from dfl.transport.packet import Packet

_LATEST = 0.2  # the weight of the last round in a peer's measured bandwidth


def arrivals(network: Network, receiver: int, inbox: Mapping[int, Packet], t: int) -> list[Tensor]:
    """When each packet arrives, float64 scalars: the sender's time, and the link's for so many bytes."""
    return [scalar_of(packet.meta[CLOCK])[0] + network.seconds(Link(sender, receiver, t, 0), bytes_of(packet))
            for sender, packet in inbox.items()]


def bandwidth(state: State) -> float | None:
    """Bytes a second that a peer has sent lately; None before its first message."""
    found = state.get("bandwidth")
    return None if found is None else float(found)


def measured(network: Network, state: State, sender: int, packet: Packet, receivers: Sequence[int], t: int) -> Tensor | None:
    """The moving mean of the bandwidth after a packet to `receivers`."""
    seconds = sum(network.seconds(Link(sender, j, t, 0), bytes_of(packet)) for j in receivers)
    before = bandwidth(state)
    if not seconds:
        return state.get("bandwidth")
    now = bytes_of(packet) * len(receivers) / seconds
    return torch.tensor(now if before is None else (1 - _LATEST) * before + _LATEST * now, dtype=torch.float64)
