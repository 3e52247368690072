"""Some of the numbers: the largest with their places, or random ones that a seed names."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dfl.adapters.batched import uploaded
from dfl.codecs.bits import num_bytes, pack_bits, unpack_bits
from dfl.codecs.memory import Compressor, remembering
from dfl.plugins import check_share
from dfl.slots import Codec


def top_k(*, share: float = 0.01, memory: str = "differences", gamma: float | None = None, topology: Any = None) -> Codec:
    """The largest numbers of each part and their places, the rest of the difference in later rounds (CHOCO with top-k).

    C(v) = v at its k = ceil(share M) largest |v_m|, zero elsewhere; omega = k / M at the least. 4 k bytes of values, and of
    places the less of 4 k and ceil(M / 8), a bitmap. memory: differences, or feedback for graphs that change and for lossy
    channels; gamma: the step of a mix, found for the topology if not given (`dfl/codecs/memory.py`). Keeps the network mean of
    a rule that averages. Not invariant to the frame of B and A. Stich, Cordonnier, Jaggi 2018, arXiv 1809.07599.
    """
    check_share("codec.share", share)

    def pack(name: str, values: Tensor, seed: int | None) -> Tensor:
        k = count(values.numel(), share)
        at = values.abs().topk(k, sorted=False).indices.sort().values
        if by_bitmap(values.numel(), k):
            marks = torch.zeros(values.numel(), dtype=torch.uint8, device=values.device)
            marks[at] = 1
            places = pack_bits(marks, 1)
        else:
            places = at.to(torch.int32).view(torch.uint8)
        return torch.cat([values[at].float().view(torch.uint8), places])

    def unpack(name: str, data: Tensor, numel: int) -> Tensor:
        k = count(numel, share)
        places = data[4 * k:]
        if by_bitmap(numel, k):
            at = unpack_bits(places, 1, numel).nonzero()[:, 0]
        else:
            at = places.view(torch.int32).long()
        if len(at) != k or not bool(((at >= 0) & (at < numel)).all()):
            raise ValueError(f"part {name!r} names {len(at)} places, expected {k} from 0 to {numel - 1}")
        out = torch.zeros(numel, device=data.device)
        out[at] = data[:4 * k].view(torch.float32)
        return out

    def counts(name: str, numel: int, num_sent: int) -> tuple[int, int]:
        k = count(numel, share)
        index = num_bytes(numel, 1) if by_bitmap(numel, k) else 4 * k
        return (k, index) if num_sent == 4 * k + index else (numel, 0)  # the first message is full

    codec = remembering(Compressor(pack, unpack, share), memory, ("differences", "feedback"), gamma, topology)
    return codec._replace(counts=counts)


def random_k(*, share: float = 0.01, memory: str = "none", gamma: float | None = None, topology: Any = None) -> Codec:
    """The same random numbers of each part at all peers, drawn anew every round: values alone travel, and a seed.

    C(v) = v at k = ceil(share M) places that are a function of the seed and the round; omega = k / M. 4 k bytes of values and 8
    of the seed. memory none: x_i + sum_j w_ij (C(x_j) - C(x_i)) is plain gossip of those numbers, so that it needs no memory and
    no step, on any graph; a number travels every 1 / share rounds on average. differences (CHOCO) for rules that do not average
    numbers as they are, and for triggers, with the step gamma, found for the topology if not given. Keeps the network mean of a
    rule that averages. Tang, Shi, Chu 2020, arXiv 2002.09692 (a mask that all share).
    """
    check_share("codec.share", share)

    def pack(name: str, values: Tensor, seed: int | None) -> Tensor:
        at = drawn(seed, values.numel(), count(values.numel(), share)).to(values.device)
        return torch.cat([uploaded([seed], values).view(torch.uint8), values[at].float().view(torch.uint8)])

    def unpack(name: str, data: Tensor, numel: int) -> Tensor:
        k = count(numel, share)
        if len(data) != 8 + 4 * k:
            raise ValueError(f"part {name!r} has {len(data)} bytes, expected {8 + 4 * k}")
        at = drawn(int(data[:8].clone().view(torch.int64)), numel, k).to(data.device)
        out = torch.zeros(numel, device=data.device)
        out[at] = data[8:].view(torch.float32)
        return out

    def counts(name: str, numel: int, num_sent: int) -> tuple[int, int]:
        k = count(numel, share)
        return (k, 8) if num_sent == 8 + 4 * k else (numel, 0)  # the first message is full

    codec = remembering(Compressor(pack, unpack, share, "round"), memory, ("none", "differences"), gamma, topology)
    return codec._replace(counts=counts)


def count(numel: int, share: float) -> int:
    """How many of `numel` numbers travel: at least one."""
    return min(numel, max(1, math.ceil(share * numel)))


def by_bitmap(numel: int, k: int) -> bool:
    """Whether a bit for each number costs less than four bytes for each that travels."""
    return num_bytes(numel, 1) < 4 * k


@lru_cache(maxsize=16)
def drawn(seed: int, numel: int, k: int) -> Tensor:
    """k different places among `numel`, ascending: a function of the seed, drawn on the CPU whatever the device."""
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed % 2**63))[:k].sort().values
