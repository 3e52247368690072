"""How far peers are apart, and what mixing factors costs the product, as each receiver sees it: tensors in, floats out.

A process looks at its own peers and at those that they receive from; what is of all peers is added up (`Transport.total`). Products
come from Gram tables of low-rank pairs: nothing of size O x I is formed. They are scaled as ΔW is.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.layout import GROUPS, Layout, join, join_rows, scalings, stack_a, stack_b
from dfl.adapters.lowrank import gram_tables, products
from dfl.metrics.products import mean_row, squared_product_distance
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
    parts = [(*cross_terms(part), aggregation_errors(part)) for part in (of_receivers(look, rows) for rows in apart(look.weights))]
    rest = [torch.cat(values) for values in zip(*parts, strict=True)]
    means = (transport.total(torch.stack([*squares, *rest], 1)) / num_peers).tolist()
    found = dict(zip(columns, (value ** 0.5 for value in means), strict=False))
    found["product_distance"] = squared_product_distance(transport, look.whole_after, whole, look.whole, num_peers) ** 0.5
    return found | dict(zip(("cross_term", "cross_term_relative", "aggregation_error"), means[len(columns):], strict=True))


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


def scaled_product_gram(*rows: Tensor, layout: Layout, spread: Callable[[Tensor], Tensor] = lambda factors: factors) -> Tensor:
    """<ΔW_j, ΔW_l>_F over all layers for the rows (J, D), one set of rows after the other: (J, J) float64.

    `spread` maps the factors (J, L, ...) of the layers of one shape to those of other pairs, linearly in j. Layers of one shape at
    a time, so that a float64 copy of all rows is never there.
    """
    total = None
    for pairs in layout.shapes():
        scaling = scalings(pairs, rows[0])[:, None, None]
        a = spread(torch.cat([stack_a(x, pairs) for x in rows]).double() * scaling)
        b = spread(torch.cat([stack_b(x, pairs) for x in rows]).double())
        table = products(gram_tables(a, b)).sum(0)
        total = table if total is None else total + table
    return total


def _norms(gram: Tensor, coefficients: Tensor) -> Tensor:
    """||sum_j c_ij ΔW_j||_F for coefficients (I, J)."""
    return torch.einsum("ij,jl,il->i", coefficients, gram, coefficients).clamp_min(0).sqrt()


def cross_terms(look: Seen) -> tuple[Tensor, Tensor]:
    """||C_i||_F of each receiver (P,), and the same over ||sum_j w_ij ΔW_j||_F.

    C_i = sum_j w_ij B_j A_j - (sum_j w_ij B_j)(sum_j w_ij A_j) from the rows before mixing. It does not change when one matrix is
    taken from every B_j and one from every A_j, so means are taken off first: no cancellation when peers agree.
    """
    x, weights = look.before, look.weights

    def centred_and_mixed(factors: Tensor) -> Tensor:
        centred = factors - factors.mean(0)
        return torch.cat([centred, torch.tensordot(weights, centred, 1)])

    plain = scaled_product_gram(x, layout=look.layout)
    gram = scaled_product_gram(x, layout=look.layout, spread=centred_and_mixed)
    cross = _norms(gram, torch.cat([weights, -_eye(len(weights), x)], 1))
    size = _norms(plain, weights)
    return cross, torch.where(size > 0, cross / size.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(size))


def aggregation_errors(look: Seen) -> Tensor:
    """||sum_j w_ij ΔW_j - ΔW_i'||_F of each receiver (P,): what it holds after the round against product consensus."""
    gram = scaled_product_gram(look.whole_before, look.whole_after, layout=look.whole)
    return _norms(gram, torch.cat([look.weights, -_eye(len(look.after), look.after)], 1))


def _eye(num: int, like: Tensor) -> Tensor:
    return torch.eye(num, dtype=torch.float64, device=like.device)
