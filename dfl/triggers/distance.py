"""How far a message is from the one last sent."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, Pair


def distance(parts: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensor:
    """||m - m^|| over all parts by the root of their number of elements, float64."""
    squares = sum((part.double() - before[name].double()).square().sum() for name, part in parts.items())
    return torch.as_tensor(squares / max(1, sum(part.numel() for part in parts.values())), dtype=torch.float64).sqrt()


def product_distance(parts: Mapping[str, Tensor], before: Mapping[str, Tensor], layout: Layout) -> float:
    """sqrt(sum over layers of scaling² ||B A - B^ A^||_F² + ||others - others^||²), others: a head, magnitudes.

    B A - B^ A^ = dB A + B^ dA, of which Gram matrices of 2 R x 2 R give the norm; nothing of O x I is formed, and
    products that are close cost no digits.
    """
    total = sum(pair.scaling ** 2 * _square(*_factors(parts, pair, layout), *_factors(before, pair, layout)) for pair in layout.pairs)
    total += sum(float((part.double() - before[name].double()).square().sum()) for name, part in parts.items() if name not in "AB")
    return math.sqrt(total)


def _factors(parts: Mapping[str, Tensor], pair: Pair, layout: Layout) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of one layer, from parts that hold all layers."""
    a, b = pair.a - layout.groups["A"].start, pair.b - layout.groups["B"].start
    return (parts["A"][a:a + pair.rank * pair.d_in].view(pair.rank, pair.d_in).double(),
            parts["B"][b:b + pair.d_out * pair.rank].view(pair.d_out, pair.rank).double())


def _square(a: Tensor, b: Tensor, a_before: Tensor, b_before: Tensor) -> float:
    """||B A - B^ A^||_F²."""
    left = torch.cat([b - b_before, b_before], 1)
    right = torch.cat([a, a - a_before])
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
