"""The mean of all peers' products B_i A_i, which no process has to hold all rows for.

With the means of the factors, B_i = B + b_i and A_i = A + a_i, it is B A + M with M = mean_i b_i a_i: what is left when peers agree
is of second order. So a sum over peers gives the factors' means, and what M needs beside them is of fixed size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.batched import qr
from dfl.adapters.layout import Layout, Pair, scalings, stack_a, stack_b
from dfl.adapters.lowrank import squared_norms
from dfl.seeds import derive
from dfl.transport.base import Transport

# M is kept in this rank, or in 2 R
LEAST_RANK = 16
# sums that sharpen M, where it does not fit
_ITERATIONS = 1
# M is seen through so many directions on each side, where its side is longer than twice as many
_DIRECTIONS = 32


def mean_row(transport: Transport, x: Tensor, num_peers: int) -> Tensor:
    """The mean (D,) float64 of the rows x (P, D) of all processes."""
    return transport.total(x) / num_peers


class Apart(NamedTuple):
    """Factors of L layers of one shape, float64: means a (L, R, I) and b (L, O, R), deviations da (P, L, R, I) and db (P, L, O, R)."""

    a: Tensor
    b: Tensor
    da: Tensor
    db: Tensor


def _apart(x: Tensor, mean: Tensor, pairs: list[Pair]) -> Apart:
    a, b = stack_a(mean[None], pairs)[0], stack_b(mean[None], pairs)[0]
    return Apart(a, b, stack_a(x, pairs).double() - a, stack_b(x, pairs).double() - b)


def product_table(x: Tensor, mean: Tensor, layout: Layout) -> Tensor:
    """What each of the rows x (P, D) adds to the distance of products, (P, 1 + K): `squared_product_distance` takes its mean over the
    peers of all processes. mean: their `mean_row`."""
    squares, sketches = torch.zeros(len(x), dtype=torch.float64, device=x.device), []
    for pairs in layout.shapes():
        scaling, apart = scalings(pairs, x).double(), _apart(x, mean, pairs)
        left = torch.cat([apart.b.expand_as(apart.db), apart.db], -1)
        right = torch.cat([apart.da, apart.a + apart.da], -2)
        squares += (squared_norms(right, left) * scaling.square()).sum(1)
        outputs, inputs = left.shape[-2], right.shape[-1]
        sketch = (_directions(outputs, 0).to(x.device) @ apart.db) @ (apart.da @ _directions(inputs, 1).to(x.device).mT)
        sketches.append((sketch * scaling[:, None, None]).flatten(1))
    return torch.cat([squares[:, None], *sketches], 1)


def squared_product_distance(means: Tensor) -> float:
    """mean_i ||ΔW_i - mean ΔW||_F² of all peers: disagreement that no change of basis hides. means: of `product_table`, (1 + K,).

    It is mean_i ||ΔW_i - scaled B A||² - ||M||². The first is exact. ||M||² is exact where both sides of a layer are at most 64 long,
    else an unbiased estimate from 32 random directions on each side (Johnson-Lindenstrauss), a small part of the whole where peers
    are near each other.
    """
    return max(0.0, float(means[0] - means[1:].square().sum()))


def _directions(length: int, side: int) -> Tensor:
    """(K, length) float64 whose product with a vector has its expected length."""
    if length <= 2 * _DIRECTIONS:
        return torch.eye(length, dtype=torch.float64)
    generator = torch.Generator().manual_seed(derive(0, "directions", length, side))
    return torch.randn(_DIRECTIONS, length, dtype=torch.float64, generator=generator) / _DIRECTIONS ** 0.5


class Product(NamedTuple):
    """left (L, O, R + K) and right (L, R + K, I), float64: for each of L layers left @ right."""

    left: Tensor
    right: Tensor


def mean_products(transport: Transport, x: Tensor, mean: Tensor, layout: Layout,
                  num_peers: int) -> Iterator[tuple[list[Pair], Product]]:
    """mean_i B_i A_i of the rows x (P, D) of all processes and their `mean_row`, unscaled, for the layers of one shape at a time.

    M is kept in rank K = min(O, I, max(16, 2 R)): exact, but for rounding, where (N - 1) R or the layer fits into K; else found by a
    randomised range finder (Halko, Martinsson, Tropp, 2011, arXiv 0909.4061), whose sums are the same length whatever N.
    """
    for pairs in layout.shapes():
        apart = _apart(x, mean, pairs)
        outputs, inputs, rank = apart.db.shape[-2], apart.da.shape[-1], apart.da.shape[-2]
        kept = min(outputs, inputs, max(LEAST_RANK, 2 * rank))
        fits = (num_peers - 1) * rank <= kept or kept == min(outputs, inputs)

        def times(right: Tensor, apart=apart) -> Tensor:  # M @ right: (L, O, K)
            return _mean(transport, apart.db @ (apart.da @ right), num_peers)

        def transposed_times(left: Tensor, apart=apart) -> Tensor:  # its transpose @ left: (L, I, K)
            return _mean(transport, apart.da.mT @ (apart.db.mT @ left), num_peers)

        generator = torch.Generator().manual_seed(derive(0, "mean product", outputs, inputs))
        left = _basis(times(torch.randn(len(pairs), inputs, kept, dtype=torch.float64, generator=generator).to(x.device)))
        for _ in range(0 if fits else _ITERATIONS):
            left = _basis(times(_basis(transposed_times(left))))
        yield pairs, Product(torch.cat([apart.b, left], -1), torch.cat([apart.a, transposed_times(left).mT], -2))


def _mean(transport: Transport, of_peers: Tensor, num_peers: int) -> Tensor:
    return transport.total(of_peers.flatten(1)).view(of_peers.shape[1:]) / num_peers


def _basis(columns: Tensor) -> Tensor:
    return qr(columns)[0]
