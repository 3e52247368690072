"""Signs, and levels of a block's norm."""

import math
from typing import Any

import torch
from torch import Tensor

from dfl.codecs.bits import bits_for, num_bytes, pack_bits, unpack_bits
from dfl.codecs.memory import Compressor, remembering
from dfl.plugins import check_count
from dfl.slots import Codec

OF_NORMAL = 2 / math.pi  # ||v||_1² / (M ||v||²) of normal numbers: what their signs keep


def sign(*, block: int = 256, memory: str = "differences", gamma: float | None = None, topology: Any = None) -> Codec:
    """One bit a number: the signs of a block of the difference, and the mean of its absolute values (CHOCO with sign).

    C(v) = sign(v) mean |v| by block; omega = ||v||_1² / (M ||v||²), 2 / pi for normal numbers and never below 1 / block.
    ceil(M / 8) bytes of signs and 4 a block. memory: differences, or feedback for graphs that change and for lossy channels;
    gamma: the step of a mix, found for the topology if not given (`dfl/codecs/memory.py`). Keeps the network mean of a rule that
    averages. Not invariant to the frame of B and A. Karimireddy, Rebjock, Stich, Jaggi 2019, arXiv 1901.09847.
    """
    check_count("codec.block", block)

    def pack(name: str, values: Tensor, seed: int | None) -> Tensor:
        padded = torch.nn.functional.pad(values.float(), (0, -len(values) % block)).view(-1, block)
        scales = padded.abs().sum(1) / sizes(len(values), block, values)
        return torch.cat([scales.view(torch.uint8), pack_bits(values >= 0, 1)])

    def unpack(name: str, data: Tensor, numel: int) -> Tensor:
        scales, rest = split(data, numel, block, 1)
        return (2.0 * unpack_bits(rest, 1, numel) - 1) * scales.repeat_interleave(block)[:numel]

    return remembering(Compressor(pack, unpack, OF_NORMAL), memory, ("differences", "feedback"), gamma, topology)


def qsgd(*, levels: int = 16, block: int = 256, memory: str = "differences", gamma: float | None = None,
         topology: Any = None) -> Codec:
    """Rounded at random to one of a few levels of its block's norm, right on average (QSGD), of the difference (CHOCO).

    C(v) = ||v|| sign(v) l / s with l one of the two whole numbers beside s |v| / ||v|| by block, the nearer more often: E C(v) = v,
    E ||C(v) - v||² <= b ||v||² with b = min(block / s², sqrt(block) / s). With a memory it is divided by 1 + b, which makes it a
    contraction with omega = 1 / (1 + b). ceil(log2(2 s + 1)) bits a number and 4 bytes a block. levels: s, from 1 to 127. memory:
    differences; feedback or none for graphs that change and for lossy channels. gamma: the step of a mix, found for the topology
    if not given (`dfl/codecs/memory.py`). Keeps the network mean of a rule that averages. Alistarh, Grubic, Li, Tomioka, Vojnovic
    2016, arXiv 1610.02132.
    """
    check_count("codec.block", block)
    if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= 127:
        raise ValueError(f"codec.levels = {levels!r} is not allowed; allowed: a whole number from 1 to 127")
    bits, spread = bits_for(2 * levels + 1), min(block / levels ** 2, math.sqrt(block) / levels)
    shrink = levels if memory == "none" else levels * (1 + spread)

    def pack(name: str, values: Tensor, seed: int | None) -> Tensor:
        assert seed is not None  # draws: the engine gives one
        padded = torch.nn.functional.pad(values.float(), (0, -len(values) % block)).view(-1, block)
        scales = torch.linalg.vector_norm(padded, dim=1)
        exact = padded.abs() * (levels / torch.where(scales > 0, scales, torch.ones_like(scales)))[:, None]
        draws = torch.rand(exact.shape, generator=torch.Generator(values.device).manual_seed(seed), device=values.device)
        found = (exact + draws).floor().clamp(max=levels) * padded.sign()
        return torch.cat([scales.view(torch.uint8), pack_bits(found.flatten()[:len(values)] + levels, bits)])

    def unpack(name: str, data: Tensor, numel: int) -> Tensor:
        scales, rest = split(data, numel, block, bits)
        return (unpack_bits(rest, bits, numel).float() - levels) * (scales / shrink).repeat_interleave(block)[:numel]

    compressor = Compressor(pack, unpack, 1 / (1 + spread), "peer")
    return remembering(compressor, memory, ("differences", "feedback", "none"), gamma, topology)


def sizes(numel: int, block: int, like: Tensor) -> Tensor:
    """How many numbers each block has, (blocks,): the last may have fewer."""
    found = torch.full((-(-numel // block),), float(block), device=like.device)
    if numel % block:
        found[-1] = numel % block
    return found


def split(data: Tensor, numel: int, block: int, bits: int) -> tuple[Tensor, Tensor]:
    """Scales (blocks,) float32, and the bytes of the numbers. ValueError for bytes that are not both."""
    num_scales = -(-numel // block)
    if len(data) != 4 * num_scales + num_bytes(numel, bits):
        raise ValueError(f"{len(data)} bytes, expected {4 * num_scales + num_bytes(numel, bits)}")
    return data[:4 * num_scales].view(torch.float32), data[4 * num_scales:]
