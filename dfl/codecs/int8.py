"""One byte a number, with a scale for every block of them and a memory of what rounding took."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfl.plugins import check_count
from dfl.slots import Codec, State

LEVELS = 127


def int8(*, block: int = 256) -> Codec:
    """Rounded to one of 255 levels of its block of numbers, what is left is added to the next message (error feedback).

    s = max |m + e| / 127 by block;  q = round((m + e) / s);  e <- m + e - s q, so that the mean over time of what is
    sent is that of m, and no progress is erased. 1 byte an element and 4 a block. Tang, Lian, Qiu, Yuan, Zhang, Zhang,
    Liu 2019, arXiv 1907.07346 (DeepSqueeze). block: numbers that share a scale.
    """
    check_count("codec.block", block)

    def encode(parts: Mapping[str, Tensor], state: State, key: int | None) -> tuple[dict[str, Tensor], State]:
        found, state = {}, dict(state)
        for name, part in parts.items():
            error = state.get(name)
            wanted = part if error is None or error.shape != part.shape else part + error
            scales, levels = quantised(wanted, block)
            found[name] = torch.cat([scales.view(torch.uint8), levels.view(torch.uint8)])
            state[name] = wanted - restored(scales, levels, block).to(part)
        return found, state

    def decode(name: str, data: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        num_scales = -(-numel // block)
        scales = data[:4 * num_scales].view(torch.float32)
        return restored(scales, data[4 * num_scales:].view(torch.int8), block).to(dtype)

    return Codec(lambda parts: {}, encode, decode)


def quantised(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Scales (blocks,) float32 and levels (M,) int8 of values (M,)."""
    padded = torch.nn.functional.pad(values.float(), (0, -len(values) % block)).view(-1, block)
    scales = padded.abs().amax(1) / LEVELS
    levels = (padded / torch.where(scales > 0, scales, torch.ones_like(scales))[:, None]).round().clamp(-LEVELS, LEVELS)
    return scales, levels.to(torch.int8).flatten()[:len(values)]


def restored(scales: Tensor, levels: Tensor, block: int) -> Tensor:
    """The values (M,) float32 that scales and levels stand for."""
    return levels.float() * scales.repeat_interleave(block)[:len(levels)]
