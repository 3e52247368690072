"""What travels: a message as raw bytes, and back."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.plugins import check_parameters, first_line, lookup


class Codec(NamedTuple):
    """encode(message_M) -> uint8; decode(uint8, dtype) -> message_M; size(M, dtype) -> bytes, known to both ends, or None where
    they depend on the message."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, torch.dtype], Tensor]
    size: Callable[[int, torch.dtype], int | None]


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
                 lambda n, dtype: n * wire.itemsize)


CODECS: dict[str, Callable[..., Codec]] = {"none": none, "bfloat16": bfloat16, "float16": float16}


def check(name: str, params: Mapping[str, object]) -> None:
    check_parameters("codec", name, lookup("codec.name", CODECS, name), params)


def build(name: str, **params) -> Codec:
    """The codec `name`. ValueError names an unknown codec or parameter and what is allowed."""
    check(name, params)
    return CODECS[name](**params)


def describe() -> dict[str, str]:
    return {name: first_line(factory) for name, factory in CODECS.items()}
