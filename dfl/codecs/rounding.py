"""Numbers as they are, or rounded to a floating type of 16 bits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfl.slots import Codec, State


def none() -> Codec:
    """The message as it is: 4 bytes an element for float32."""
    def encode(parts: Mapping[str, Tensor], state: State, key: int | None) -> tuple[dict[str, Tensor], State]:
        return {name: part.contiguous().view(torch.uint8) for name, part in parts.items()}, state

    return Codec(lambda parts: {}, encode, lambda name, data, numel, dtype: data.view(dtype), exact=True)


def bfloat16() -> Codec:
    """Rounded to bfloat16: 2 bytes an element, 8 significant bits.

    C(v) = v (1 + e), |e| <= 2^-9 to the nearest, where a rule averages: x_i + sum_j w_ij (C(x_j) - C(x_i)) keeps the network
    mean exactly, and what rounding took from a peer is still its own. Elsewhere up or down at random, |e| <= 2^-8, with E
    C(v) = v (Gupta, Agrawal, Gopalakrishnan, Narayanan 2015, arXiv 1502.02551): then means are kept on average. No memory.
    Kalamkar et al. 2019, arXiv 1905.12322 (the type).
    """
    return _rounded(torch.bfloat16)


def float16() -> Codec:
    """Rounded to float16: 2 bytes an element, 11 significant bits, at most 65504.

    As bfloat16, with |e| <= 2^-12 to the nearest and 2^-11 at random, down to 6e-5; below it steps of 6e-8. What is larger
    travels as 65504. IEEE 754 (2008).
    """
    return _rounded(torch.float16)


def _rounded(wire: torch.dtype) -> Codec:
    most = torch.finfo(wire).max  # a larger number would travel as infinity

    def encode(parts: Mapping[str, Tensor], state: State, key: int | None) -> tuple[dict[str, Tensor], State]:
        found = {}
        for name, part in parts.items():
            part = part.clamp(-most, most)
            if key is not None:
                generator = torch.Generator(part.device).manual_seed(key)
                part, key = rounded_at_random(part, wire, generator), key + 1
            found[name] = part.to(wire).view(torch.uint8)
        return found, state

    return Codec(lambda parts: {}, encode, lambda name, data, numel, dtype: data.view(wire).to(dtype))


def rounded_at_random(values: Tensor, wire: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each value to one of the two numbers of the 16-bit type `wire` beside it, the nearer one more often: E[result] =
    values.

    What `wire` holds exactly stays. values within its range, none of them NaN.
    """
    nearest = values.to(wire)
    error = values - nearest.to(values)
    # of sign and magnitude, the next number away from zero is one bit pattern up, also across powers of two
    bits = nearest.view(torch.int16)
    away = bits + torch.where((error > 0) == (nearest > 0), 1, -1).to(torch.int16)
    beside_zero = torch.where(error > 0, 1, -(2**15) + 1).to(torch.int16)
    other = torch.where(nearest == 0, beside_zero, away).view(wire)
    share = error / (other.to(values) - nearest.to(values))
    draws = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=generator)
    return torch.where(draws < share, other, nearest)
