"""Whole numbers of a few bits each, without gaps."""

import torch
from torch import Tensor


def bits_for(values: int) -> int:
    """The bits that tell `values` values apart."""
    return max(1, (values - 1).bit_length())


def num_bytes(numel: int, bits: int) -> int:
    """The bytes of `numel` numbers of `bits` bits."""
    return -(-numel * bits // 8)


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Numbers (M,) from 0 to 2^bits - 1, bits from 1 to 8, as uint8 (ceil(M bits / 8),), the low bits first."""
    if bits == 8:
        return numbers.to(torch.uint8)
    flat = (numbers.to(torch.uint8)[:, None] >> _places(bits, numbers)) & 1
    flat = torch.nn.functional.pad(flat.flatten(), (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << _places(8, numbers)).sum(1, dtype=torch.uint8)


def unpack_bits(data: Tensor, bits: int, numel: int) -> Tensor:
    """The numbers (numel,) uint8 that `pack_bits` was given. ValueError for another number of bytes than theirs."""
    if len(data) != num_bytes(numel, bits):
        raise ValueError(f"{len(data)} bytes are not {numel} numbers of {bits} bits")
    if bits == 8:
        return data
    flat = ((data[:, None] >> _places(8, data)) & 1).flatten()[:numel * bits].view(-1, bits)
    return (flat << _places(bits, data)).sum(1, dtype=torch.uint8)


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=like.device)
