"""How far peers are apart, and what mixing factors costs the product, as each receiver sees it: tensors in, floats out.

A process looks at its own peers and at those that they receive from; what is of all peers is added up (`Transport.total`). Products
come from Gram tables of low-rank pairs: nothing of size O x I is formed. They are scaled as ΔW is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.batched import uploaded
from dfl.adapters.layout import GROUPS, Layout, Pair, join, join_rows, scalings, stack_a, stack_b
from dfl.adapters.lowrank import factor_error, gram_tables, inner_products, product_gram, squared_norms
from dfl.metrics.products import mean_row, product_table, squared_product_distance
from dfl.transport.base import Transport

FEW = 32  # peers whose products are compared pair by pair in one table


class Seen(NamedTuple):
    """The rows before and after a mix of P hosted peers, and before it of the J peers that they received from, themselves included.

    before (J, D), after (P, D); weights (P, J) float64: the rows of W; own: where the hosted peers stand among the J. products
    before and after: the same with what lies beside the factors (`with_residual`), in the layout `whole`.
    """

    before: Tensor
    after: Tensor
    weights: Tensor
    own: Sequence[int]
    layout: Layout
    whole_before: Tensor
    whole_after: Tensor
    whole: Layout


def seen(before: Tensor, after: Tensor, weights, own: Sequence[int], layout: Layout, kept_before: Tensor | None = None,
         kept_after: Tensor | None = None, residual: Layout | None = None) -> Seen:
    """kept (., D_E): the residuals beside the rows, in the layout `residual`."""
    weights = torch.as_tensor(weights, dtype=torch.float64, device=before.device)
    (whole_before, whole), (whole_after, _) = (with_residual(before, layout, kept_before, residual),
                                               with_residual(after, layout, kept_after, residual))
    return Seen(before, after, weights, own, layout, whole_before, whole_after, whole)


def with_residual(x: Tensor, layout: Layout, kept: Tensor | None, residual: Layout | None) -> tuple[Tensor, Layout]:
    """Rows x (P, D) of A and B together with the residuals `kept` (P, D_E) beside them, as factors of larger rank."""
    if kept is None:
        return x, layout
    joined = join((layout, residual))
    return join_rows(joined, (layout, residual), (x, kept), len(x)), joined


def measure(transport: Transport, look: Seen, num_peers: int) -> dict[str, float]:
    """All measures of a round, the same on all processes: consensus distance sqrt(mean_i ||x_i - mean x||²), also by group of factors
    and of products, and means over receivers of the cross term and the aggregation error."""
    columns = {"consensus_distance": slice(None)}
    columns |= {f"consensus_distance_{group}": look.layout.groups[group] for group in GROUPS if look.layout.has(group)}
    mean = mean_row(transport, look.after, num_peers)
    whole = mean if look.whole_after is look.after else mean_row(transport, look.whole_after, num_peers)
    centred = look.after - mean.to(look.after.dtype)
    squares = [centred[:, cut].square().sum(1, dtype=torch.float64) for cut in columns.values()]
    parts = [mixing_errors(of_receivers(look, rows)) for rows in apart(look.weights)]
    rest = [torch.cat(values) for values in zip(*parts, strict=True)]
    table = torch.stack([*squares, *rest], 1)
    of_products = product_table(look.whole_after, whole, look.whole)
    means, of_products = (transport.total(torch.cat([table, of_products], 1)) / num_peers).tensor_split([table.shape[1]])
    found = dict(zip(columns, means.sqrt().tolist(), strict=False))
    found["product_distance"] = squared_product_distance(of_products) ** 0.5
    return found | dict(zip(MixingErrors._fields, means[len(columns):].tolist(), strict=True))


def apart(weights: Tensor) -> list[range]:
    """The receivers of W's rows (P, J) that are looked at together: as many, in order, as see FEW peers among them.

    A table of all pairs grows with the square of the peers, and of a sparse graph no receiver asks for most of them. Where nearly all
    see nearly all, it is one table.
    """
    num, others = weights.shape
    found, known, asked = [0], set[int](), 0
    for row, mine in enumerate((weights != 0).tolist() if others > FEW else ()):
        sees = {j for j, used in enumerate(mine) if used}
        if row > found[-1] and len(known | sees) > FEW:
            asked += (len(known) + row - found[-1]) ** 2
            found.append(row)
            known = set()
        known |= sees
    if asked + (len(known) + num - found[-1]) ** 2 >= (num + others) ** 2:
        found = [0]
    return [range(first, end) for first, end in zip(found, [*found[1:], num], strict=True)]


def of_receivers(look: Seen, rows: range) -> Seen:
    """What some of the receivers see."""
    if len(rows) == len(look.weights):
        return look
    mine = slice(rows.start, rows.stop)
    columns = (look.weights[mine] != 0).any(0)
    columns[list(look.own[mine])] = True
    place = (columns.cumsum(0) - 1).tolist()
    before, after = look.before[columns], look.after[mine]
    same = look.whole_before is look.before
    return Seen(before, after, look.weights[mine][:, columns], [place[j] for j in look.own[mine]], look.layout,
                before if same else look.whole_before[columns], after if same else look.whole_after[mine], look.whole)


def scaled_product_gram(x: Tensor, layout: Layout) -> Tensor:
    """<ΔW_j, ΔW_l>_F over all layers for the rows (J, D): (J, J) float64. Layers of one shape at a time, so that a float64 copy of
    all rows is never there."""
    return torch.stack([product_gram(*scaled_pairs(x, pairs)).sum(0) for pairs in layout.shapes()]).sum(0)


def scaled_pairs(x: Tensor, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """A (J, L, R, I) and B (J, L, O, R), float64, of which B A is ΔW."""
    return stack_a(x, pairs).double() * scalings(pairs, x)[:, None, None], stack_b(x, pairs).double()


class MixingErrors(NamedTuple):
    """Of each receiver, (P,): the norm of the cross term, the same over ||sum_j w_ij ΔW_j||_F, and the aggregation error
    ||sum_j w_ij ΔW_j - ΔW_i'||_F, what it holds after the round against product consensus."""

    cross_term: Tensor
    cross_term_relative: Tensor
    aggregation_error: Tensor


def mixing_errors(look: Seen) -> MixingErrors:
    mixed, error = _of_whole(look)
    if look.whole_before is not look.before:  # the cross term is of the factors alone
        mixed = _squared(look.weights, scaled_product_gram(look.before, look.layout))
    cross, size = cross_terms(look), mixed.clamp_min(0).sqrt()
    relative = torch.where(size > 0, cross / size.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(size))
    return MixingErrors(cross, relative, error.clamp_min(0).sqrt())


def _of_whole(look: Seen) -> tuple[Tensor, Tensor]:
    """||sum_j w_ij ΔW_j||² and ||sum_j w_ij ΔW_j - ΔW_i'||² of each receiver (P,)."""
    found = []
    for pairs in look.whole.shapes():
        before, after = scaled_pairs(look.whole_before, pairs), scaled_pairs(look.whole_after, pairs)
        mixed = _squared(look.weights, product_gram(*before).sum(0))
        across = (look.weights * inner_products(*after, *before).sum(0)).sum(1)
        found.append(torch.stack([mixed, mixed - 2 * across + squared_norms(*after).sum(1)]))
    mixed, error = torch.stack(found).sum(0)
    return mixed, error


def _squared(weights: Tensor, gram: Tensor) -> Tensor:
    """||sum_j w_ij ΔW_j||_F² (P,) for weights (P, J) and the products' inner products."""
    return torch.einsum("ij,jl,il->i", weights, gram, weights)


def cross_terms(look: Seen) -> Tensor:
    """||C_i||_F of each receiver (P,): C_i = sum_j w_ij B_j A_j - (sum_j w_ij B_j)(sum_j w_ij A_j) from the rows before mixing.

    It does not change when one matrix is taken from every B_j and one from every A_j, so those of one peer are: no cancellation when
    peers agree, and the table of inner products is of the others alone.
    """
    others, weights = look.before[1:], look.weights[:, 1:]
    found = look.before.new_zeros(len(weights), dtype=torch.float64)
    received = [uploaded([j for j, used in enumerate(row) if used], weights, torch.int64) for row in weights.tolist()]
    for pairs in look.layout.shapes() if len(others) else ():
        first, pair = scaled_pairs(look.before[:1], pairs), scaled_pairs(others, pairs)
        grams = gram_tables(*(factors - of_first for factors, of_first in zip(pair, first, strict=True)))
        for i, (row, known) in enumerate(zip(weights, received, strict=True)):
            coefficients = row[known]
            found[i] += factor_error(grams.of(known), coefficients, coefficients, coefficients).sum()
    return found.sqrt()
