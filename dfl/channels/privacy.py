"""What keeps single messages from their receivers: noise that cancels over all of them, and masks that cancel in a sum.

These channels say what a method that protects messages costs in accuracy: what a receiver works with is what it would
have. The transport itself carries the message as it is, so that they protect nothing yet.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dfl.plugins import check_count, check_number
from dfl.seeds import derive
from dfl.slots import Channel, Link, Message, State


def zip_noise(*, sigma: float, seed: int = 0, topology: Any = None) -> Channel:
    """Add noise to every message that cancels over all receivers of a peer in the same round (Zip-DL).

    j receives x_i + z_ij from i, z_ij = e_ij - w_ji (sum_k w_ki e_ik) / sum_k w_ki^2, e_ij ~ N(0, sigma^2 I), so that
    sum_j w_ji z_ij = 0: the network mean is that without, to rounding, while every message is noisy and every mix is
    off for this round. Two receivers at the least, as one alone would have no noise. For experiments, as the transport
    carries x_i. Biswas, Even, Kermarrec, Massoulie, Pires, Sharma, de Vos 2024, arXiv 2403.11795, whose construction is
    not known to us; this projection is ours.
    """
    check_number("channel.sigma", sigma)

    @lru_cache(maxsize=4)
    def columns(sender: int, t: int) -> dict[int, float]:
        return {j: float(topology.neighbors(t, j)[sender]) for j in topology.receivers(t, sender)}

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        if message is None or not sigma:
            return message, state
        weights = columns(link.sender, link.t)
        if len(weights) < 2:
            raise ValueError(f"channel.name = 'zip_noise' needs two receivers of every peer, peer {link.sender} has {len(weights)} in "
                             f"round {link.t}; allowed: a topology of degree 2 or more")
        parts = {name: part + noise(part, name, weights, link) for name, part in message.parts.items()}
        return message._replace(parts=parts), state

    def noise(part: Tensor, name: str, weights: Mapping[int, float], link: Link) -> Tensor:
        draws = {j: _drawn(part, derive(seed, "zip", link.sender, j, link.t, name)) for j in sorted(weights)}
        common = sum((draws[j] * weights[j] for j in sorted(weights)), torch.zeros_like(part)) / sum(w ** 2 for w in weights.values())
        return sigma * (draws[link.receiver] - weights[link.receiver] * common)

    return Channel(lambda: {}, deliver, cancels=True, facts={"sigma": sigma})


def _drawn(part: Tensor, seed: int) -> Tensor:
    return torch.randn(part.shape, generator=torch.Generator().manual_seed(seed), dtype=part.dtype).to(part.device)


def masked(*, bits: int = 24, seed: int = 0) -> Channel:
    """Let a receiver have the weighted sum of its neighbours' messages and none of them (pairwise masks, secure aggregation).

    j sends round(2^bits w_ij x_j) + sum_{k > j} r_jk - sum_{k < j} r_kj modulo 2^64, over the other neighbours k of receiver
    i, r_jk uniform from a seed that j and k share: the masks cancel in the sum over j to the bit, as these are integers,
    and the sum is off by at most 2^-bits / 2 a message. Who drops out takes its masks along: the others have named the
    seeds that they share with it. Two neighbours at the least. The mean moves by rounding alone. For experiments, as the
    transport carries x_j. Bonawitz et al. 2017 (CCS); by neighbourhoods: CESAR, Biswas et al. 2024, arXiv 2405.07708.
    """
    check_count("channel.bits", bits)
    check_number("channel.bits", bits, most=40)

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        return message, state

    def air(inbox: Mapping[int, Message], own: Message, weights: Mapping[int, float], state: State,
            link: Link) -> tuple[dict[int, Message], State]:
        if not inbox:
            return {}, state
        if len(inbox) == 1:
            raise ValueError(f"channel.name = 'masked' needs two neighbours of every peer, peer {link.receiver} receives from one in "
                             f"round {link.t}: the sum would be its message; allowed: a topology of degree 2 or more")
        share = sum(weights[j] for j in inbox)
        parts = {name: summed(name, part, inbox, weights, link) / share for name, part in own.parts.items()}
        return {j: message._replace(parts=parts) for j, message in inbox.items()}, state

    def summed(name: str, own: Tensor, inbox: Mapping[int, Message], weights: Mapping[int, float], link: Link) -> Tensor:
        total = torch.zeros(own.shape, dtype=torch.int64)
        for j in sorted(inbox):
            total += sent(j, name, inbox, weights[j], link)
        return (total.double() / 2.0 ** bits).to(own)

    def sent(j: int, name: str, inbox: Mapping[int, Message], weight: float, link: Link) -> Tensor:
        """What j sends to this receiver, int64."""
        numbers = weight * inbox[j].parts[name].double().cpu() * 2.0 ** bits
        if not bool((numbers.abs() < 2.0 ** 61 / len(inbox)).all()):
            raise ValueError(f"channel.bits = {bits} leaves no room for the numbers of peer {j}; allowed: fewer bits")
        found = numbers.round().long()
        for k in inbox:
            if k != j:
                mask = _mask(found.shape, derive(seed, "mask", link.receiver, *sorted((j, k)), link.t, name))
                found = found + mask if j < k else found - mask
        return found

    return Channel(lambda: {}, deliver, air=air, facts={"bits": bits})


def _mask(shape: torch.Size, seed: int) -> Tensor:
    """Uniform on all int64."""
    drawn = torch.Generator().manual_seed(seed)
    high, low = (torch.randint(0, 2 ** 32, shape, generator=drawn, dtype=torch.int64) for _ in range(2))
    return (high << 32) | low
