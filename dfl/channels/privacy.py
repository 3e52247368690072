"""What keeps single messages from their receivers: noise that cancels over all of them, and masks that cancel in a sum.

These channels say what a method that protects messages costs in accuracy: what a receiver works with is what it would
have. The transport itself carries the message as it is, so that they protect nothing yet.
"""

from collections.abc import Mapping, Sequence
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


def masked(*, bits: int = 24, loss: float = 0.0, seed: int = 0) -> Channel:
    """Let a receiver have the weighted sum of its neighbours' messages and none of them (pairwise masks, secure aggregation).

    j sends round(2^bits w_ij x_j) + sum_{k > j} r_jk - sum_{k < j} r_kj modulo 2^64, over the other neighbours k of receiver
    i, r_jk uniform from a seed that j and k share: the masks cancel in the sum over j to the bit, as these are integers,
    and the sum is off by at most 2^-bits / 2 a message. loss: how likely a neighbour drops out, its masked message lost:
    those left then name the seeds that they share with it, i takes these masks off, and the weight stays with i; with
    fewer than two left i keeps to itself, since the sum would be a message. Two neighbours at the least. The mean moves by
    rounding alone, and where somebody drops out. For experiments, as the transport carries x_j, and the ledger counts
    neither seeds nor the larger numbers. Bonawitz et al. 2017 (CCS); by neighbourhoods: CESAR, Biswas et al. 2024, arXiv
    2405.07708.
    """
    check_count("channel.bits", bits)
    check_number("channel.bits", bits, most=40)
    check_number("channel.loss", loss, most=1.0)

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        return message, state

    def air(inbox: Mapping[int, Message], own: Message, weights: Mapping[int, float], state: State,
            link: Link) -> tuple[dict[int, Message], State]:
        if not inbox:
            return {}, state
        if len(inbox) == 1:
            raise ValueError(f"channel.name = 'masked' needs two neighbours of every peer, peer {link.receiver} receives from one in "
                             f"round {link.t}: the sum would be its message; allowed: a topology of degree 2 or more")
        left = [j for j in sorted(inbox) if not drops_out(j, link)]
        if len(left) < 2:
            return {j: message._replace(parts=own.parts) for j, message in inbox.items()}, state
        share = sum(weights[j] for j in left)
        parts = {name: summed(name, part, inbox, left, weights, link) / share for name, part in own.parts.items()}
        return {j: message._replace(parts=parts if j in left else own.parts) for j, message in inbox.items()}, state

    def drops_out(j: int, link: Link) -> bool:
        return loss > 0 and derive(seed, "drop", link.receiver, j, link.t) / 2 ** 63 < loss

    def summed(name: str, own: Tensor, inbox: Mapping[int, Message], left: Sequence[int], weights: Mapping[int, float],
               link: Link) -> Tensor:
        """What arrives, without the masks that those left share with those who dropped out."""
        total, gone = torch.zeros(own.shape, dtype=torch.int64), [j for j in inbox if j not in left]
        for j in left:
            total += sent(j, name, inbox, weights[j], link) - masks(j, gone, own.shape, name, link)
        return (total.double() / 2.0 ** bits).to(own)

    def sent(j: int, name: str, inbox: Mapping[int, Message], weight: float, link: Link) -> Tensor:
        """What j sends to this receiver, int64."""
        numbers = weight * inbox[j].parts[name].double().cpu() * 2.0 ** bits
        if not bool((numbers.abs() < 2.0 ** 61 / len(inbox)).all()):
            raise ValueError(f"channel.bits = {bits} leaves no room for the numbers of peer {j}; allowed: fewer bits")
        return numbers.round().long() + masks(j, [k for k in inbox if k != j], numbers.shape, name, link)

    def masks(j: int, others: Sequence[int], shape: torch.Size, name: str, link: Link) -> Tensor:
        """What j adds for all that it shares with `others` at this receiver, int64 modulo 2^64."""
        total = torch.zeros(shape, dtype=torch.int64)
        for k in others:
            mask = _mask(shape, derive(seed, "mask", link.receiver, *sorted((j, k)), link.t, name))
            total = total + mask if j < k else total - mask
        return total

    return Channel(lambda: {}, deliver, air=air, facts={"bits": bits})


def _mask(shape: torch.Size, seed: int) -> Tensor:
    """Uniform on all int64."""
    drawn = torch.Generator().manual_seed(seed)
    high, low = (torch.randint(0, 2 ** 32, shape, generator=drawn, dtype=torch.int64) for _ in range(2))
    return (high << 32) | low
