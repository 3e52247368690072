"""What travels: a message as raw bytes, and back.

A codec that rounds must not undo training: a peer that replaced its own number by the rounded mean would stay for ever where
a round moves it by less than half the distance of two numbers. How `dfl.gossip` prevents that depends on the rule (`averages`).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.plugins import check_parameters, first_line, lookup


class Codec(NamedTuple):
    """encode(message_M) -> uint8; decode(uint8, dtype) -> message_M; size(M, dtype) -> bytes, known to both ends, or None where
    they depend on the message.

    unbiased(message_M, generator) -> uint8: the same with its error drawn so that the mean over draws is the message; None: encode
    loses nothing.
    """

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, torch.dtype], Tensor]
    size: Callable[[int, torch.dtype], int | None]
    unbiased: Callable[[Tensor, torch.Generator], Tensor] | None = None


def none() -> Codec:
    """The message as it is: 4 bytes an element for float32."""
    return Codec(lambda m: m.view(torch.uint8), lambda data, dtype: data.view(dtype), lambda n, dtype: n * dtype.itemsize)


def bfloat16() -> Codec:
    """Rounded to bfloat16: 2 bytes an element, 8 significant bits."""
    return _rounded(torch.bfloat16)


def float16() -> Codec:
    """Rounded to float16: 2 bytes an element, 11 significant bits, at most 65504."""
    return _rounded(torch.float16)


def _rounded(wire: torch.dtype) -> Codec:
    most = torch.finfo(wire).max  # a larger number would travel as infinity
    return Codec(lambda m: m.clamp(-most, most).to(wire).view(torch.uint8), lambda data, dtype: data.view(wire).to(dtype),
                 lambda n, dtype: n * wire.itemsize,
                 lambda m, generator: rounded_at_random(m.clamp(-most, most), wire, generator).view(torch.uint8))


def rounded_at_random(values: Tensor, wire: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each value to one of the two numbers of the 16-bit type `wire` beside it, the nearer one more often: E[result] = values.

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


CODECS: dict[str, Callable[..., Codec]] = {"none": none, "bfloat16": bfloat16, "float16": float16}


def check(name: str, params: Mapping[str, object]) -> None:
    check_parameters("codec", name, lookup("codec.name", CODECS, name), params)


def build(name: str, **params) -> Codec:
    """The codec `name`. ValueError names an unknown codec or parameter and what is allowed."""
    check(name, params)
    return CODECS[name](**params)


def describe() -> dict[str, str]:
    return {name: first_line(factory) for name, factory in CODECS.items()}
