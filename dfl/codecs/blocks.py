"""A few bits a number, with a scale for every block of them and a memory of what rounding took."""

from typing import Any

import torch
from torch import Tensor

from dfl.codecs.bits import pack_bits, unpack_bits
from dfl.codecs.memory import Compressor, remembering
from dfl.plugins import check_choice, check_count
from dfl.slots import Codec

ROUNDINGS = ("nearest", "random")


def int8(*, block: int = 256, rounding: str = "nearest", memory: str = "feedback", gamma: float | None = None,
         topology: Any = None) -> Codec:
    """Rounded to one of 255 levels of its block of numbers, what is left is added to the next message (error feedback).

    s = max |m + e| / 127 by block;  q = round((m + e) / s);  e <- m + e - s q, so that the mean over time of what is
    sent is that of m, and no progress is erased. 1 byte an element and 4 a block. rounding: nearest; or random, up or
    down so that it is right on average, which alone may do with memory none. memory: feedback, differences, none
    (`dfl/codecs/memory.py`). block: numbers that share a scale. Keeps the network mean of a rule that averages. Tang,
    Lian, Qiu, Yuan, Zhang, Zhang, Liu 2019, arXiv 1907.07346 (DeepSqueeze); Alistarh, Grubic, Li, Tomioka, Vojnovic
    2016, arXiv 1610.02132 (random rounding).
    """
    return _integers(8, block, rounding, memory, gamma, topology)


def int4(*, block: int = 64, rounding: str = "nearest", memory: str = "feedback", gamma: float | None = None,
         topology: Any = None) -> Codec:
    """Rounded to one of 15 levels of its block of numbers, what is left is added to the next message (error feedback).

    As int8 with s = max |m + e| / 7: half a byte an element and 4 a block. With feedback the error of a message is that
    of one rounding, up to 1 / 14 of its block's largest number in every round; with memory differences, on a graph that
    stays, it shrinks with the difference.
    """
    return _integers(4, block, rounding, memory, gamma, topology)


def _integers(bits: int, block: int, rounding: str, memory: str, gamma: float | None, topology: Any) -> Codec:
    check_count("codec.block", block)
    check_choice("codec.rounding", rounding, ROUNDINGS)
    if memory == "none" and rounding == "nearest":
        raise ValueError("codec.memory = 'none' with codec.rounding = 'nearest' would lose every step below half a level; allowed: "
                         "rounding random, or memory feedback or differences")
    most = 2 ** (bits - 1) - 1

    def pack(name: str, values: Tensor, seed: int | None) -> Tensor:
        scales, levels = quantised(values, block, most, seed if rounding == "random" else None)
        return torch.cat([scales.view(torch.uint8), pack_bits(levels + most, bits)])

    def unpack(name: str, data: Tensor, numel: int) -> Tensor:
        num_scales = -(-numel // block)
        levels = unpack_bits(data[4 * num_scales:], bits, numel).to(torch.int16) - most
        return restored(data[:4 * num_scales].view(torch.float32), levels, block)

    # half a step to both sides, of a block whose largest number is about three times the usual one
    kept = 1 - 3 / most ** 2 / (1 if rounding == "nearest" else 0.5)
    return remembering(Compressor(pack, unpack, kept, "peer" if rounding == "random" else ""), memory,
                       ("feedback", "differences", "none"), gamma, topology, rounds=True)


def quantised(values: Tensor, block: int, most: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """Scales (blocks,) float32 and levels (M,) int16 from -most to most of values (M,); rounded at random where there is a seed."""
    padded = torch.nn.functional.pad(values.float(), (0, -len(values) % block)).view(-1, block)
    scales = padded.abs().amax(1) / most
    exact = padded / torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]
    if seed is None:
        levels = exact.round()
    else:
        generator = torch.Generator(values.device).manual_seed(seed)
        levels = (exact + torch.rand(exact.shape, generator=generator, device=values.device)).floor()
    return scales, levels.clamp(-most, most).to(torch.int16).flatten()[:len(values)]


def restored(scales: Tensor, levels: Tensor, block: int) -> Tensor:
    """The values (M,) float32 that scales and levels stand for."""
    return levels.float() * scales.repeat_interleave(block)[:len(levels)]
