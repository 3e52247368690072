"""The consensus model: the mean of all peers' models, of their factors or of their products, made by all processes together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows
from dfl.adapters.layout import Layout, Pair, stack_a, write_pairs
from dfl.adapters.lowrank import refactor, truncate
from dfl.adapters.residuals import residual_rows
from dfl.metrics.products import Product, mean_products, mean_row
from dfl.rules.residual import largest_rank, split_model
from dfl.transport.base import Transport


def consensus_rows(transport: Transport, adapted: Adapted, x: Tensor, kept: Tensor | None, *, num_peers: int, product: bool,
                   residual: Layout | None) -> Rows:
    """The consensus model of the trained rows x (P, D) of all processes, scaled alike, and of the rules' residuals `kept` (P, D_E) in
    the layout `residual`; on all of them."""
    if adapted.cores:
        return Rows(adapted.factors(mean_row(transport, x, num_peers).to(x.dtype)[None]))
    if kept is None:
        row = consensus(transport, x, adapted.layout, num_peers, product)[None]
        return Rows(row, residual_rows(adapted, None, row))
    row, rest = consensus_with_residual(transport, x, adapted.layout, kept, residual, num_peers)
    return Rows(row[None], residual_rows(adapted, rest[None], row[None]))


def consensus(transport: Transport, x: Tensor, layout: Layout, num_peers: int, product: bool) -> Tensor:
    """The consensus model (D,) of rows x (P, D): the mean of the factors, or the best rank-R part of the mean product.

    The head, and what else there is, is the mean in both cases.
    """
    exact = mean_row(transport, x, num_peers)
    mean = exact.to(x.dtype)
    for pairs, found in mean_products(transport, x, exact, layout, num_peers) if product else ():
        svd = truncate(found.left.to(mean.dtype), found.right.to(mean.dtype), pairs[0].rank)
        write_pairs(mean, pairs, *refactor(svd, stack_a(mean, pairs), "balanced"))
    return mean


def consensus_with_residual(transport: Transport, x: Tensor, layout: Layout, kept: Tensor, residual: Layout,
                            num_peers: int) -> tuple[Tensor, Tensor]:
    """The mean of E_i + B_i A_i of rows x (P, D) and kept (P, D_E), as a row and its residual: what both ranks together can hold."""
    exact, of_kept = mean_row(transport, x, num_peers), mean_row(transport, kept, num_peers)
    mean = exact.to(x.dtype)
    factors = _by_layer(mean_products(transport, x, exact, layout, num_peers), mean.dtype)
    rests = _by_layer(mean_products(transport, kept, of_kept, residual, num_peers), mean.dtype)

    def products(pairs: Sequence[Pair]):
        return [tuple(torch.stack([found[pair.name][side] for pair in pairs]) for side in (0, 1)) for found in (factors, rests)]

    state = split_model(mean, layout, residual, largest_rank(layout), products, "balanced")
    return mean, state["residual"]


def _by_layer(found: Iterator[tuple[Sequence[Pair], Product]], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    return {pair.name: (left, right) for pairs, product in found
            for pair, left, right in zip(pairs, product.left.to(dtype), product.right.to(dtype), strict=True)}
