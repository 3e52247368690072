"""The mean of all peers' products B_i A_i, which no process has to hold all rows for.

Its rank is up to peers times R. It is found in two sums or more of fixed size by a randomised range finder (Halko, Martinsson,
Tropp, 2011, arXiv 0909.4061).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, Pair, stack_a, stack_b
from dfl.seeds import derive
from dfl.transport.base import Transport

# the mean product is kept in this rank, or in four times R
LEAST_RANK = 32
# rounds of sums that sharpen it, where it does not fit
_ITERATIONS = 2


class Product(NamedTuple):
    """left (L, O, K) with orthonormal columns, right (L, K, I), float64: for each of L layers left @ right."""

    left: Tensor
    right: Tensor


def mean_row(transport: Transport, x: Tensor, num_peers: int) -> Tensor:
    """The mean (D,) of the rows x (P, D) of all processes, in their type."""
    return (transport.total(x) / num_peers).to(x.dtype)


def mean_products(transport: Transport, x: Tensor, layout: Layout, num_peers: int,
                  seed: int = 0) -> Iterator[tuple[list[Pair], Product]]:
    """mean_i B_i A_i of the rows x (P, D) of all processes, unscaled, in rank K, for the layers of one shape at a time.

    K = min(O, I, max(32, 4 R)). Exact, but for rounding, where N R or the layer fits into K; else near the best of rank K.
    """
    for pairs in layout.shapes():
        a, b = stack_a(x, pairs).double(), stack_b(x, pairs).double()  # (P, L, R, I), (P, L, O, R)
        num_layers, outputs, inputs, rank = len(pairs), b.shape[-2], a.shape[-1], a.shape[-2]
        kept = min(outputs, inputs, max(LEAST_RANK, 4 * rank))
        fits = num_peers * rank <= kept or kept == min(outputs, inputs)

        def mean_times(right: Tensor, a=a, b=b) -> Tensor:  # mean ΔW @ right: (L, O, K)
            return _mean(transport, b @ (a @ right), num_peers)

        def mean_transposed_times(left: Tensor, a=a, b=b) -> Tensor:  # its transpose @ left: (L, I, K)
            return _mean(transport, a.mT @ (b.mT @ left), num_peers)

        generator = torch.Generator().manual_seed(derive(seed, "mean product", outputs, inputs))
        left = _basis(mean_times(torch.randn(num_layers, inputs, kept, dtype=torch.float64, generator=generator).to(a.device)))
        for _ in range(0 if fits else _ITERATIONS):
            left = _basis(mean_times(_basis(mean_transposed_times(left))))
        yield pairs, Product(left, mean_transposed_times(left).mT)


def _mean(transport: Transport, of_peers: Tensor, num_peers: int) -> Tensor:
    return transport.total(of_peers.flatten(1)).view(of_peers.shape[1:]) / num_peers


def _basis(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
