"""A message as bytes: what transports move, without knowing what it means."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Packet(NamedTuple):
    """payload: uint8 (bytes,) by part; numel: how many numbers each part has; meta: int64 (K,) on the CPU, by name."""

    payload: Mapping[str, Tensor]
    numel: Mapping[str, int]
    meta: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Of payload and metadata."""
        return sum(part.nbytes for part in self.payload.values()) + sum(value.nbytes for value in self.meta.values())
