"""How far peers are apart, and what mixing factors costs the product. Tensors in, floats out.

All of it comes from Gram tables of low-rank pairs: nothing of size O x I is formed. Products are scaled as ΔW is.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import GROUPS, Layout, join, join_rows, scalings, stack_a, stack_b
from dfl.adapters.lowrank import gram_tables, products


def consensus_distance(x: Tensor) -> float:
    """sqrt(mean_i ||x_i - mean x||²) of rows x (N, D)."""
    centred = x - x.mean(0, dtype=torch.float64).to(x.dtype)
    return float(centred.square().sum(1, dtype=torch.float64).mean().sqrt())


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


def cross_term(x: Tensor, w: np.ndarray, layout: Layout) -> tuple[float, float]:
    """Mean over receivers of ||C_i||_F, and of it over ||sum_j w_ij ΔW_j||_F, for the rows x (N, D) before mixing.

    C_i = sum_j w_ij B_j A_j - (sum_j w_ij B_j)(sum_j w_ij A_j). It does not change when one matrix is taken from every B_j
    and one from every A_j, so the network means are taken off first: no cancellation when peers agree.
    """
    weights = torch.as_tensor(w, dtype=torch.float64, device=x.device)

    def centred_and_mixed(factors: Tensor) -> Tensor:
        centred = factors - factors.mean(0)
        return torch.cat([centred, torch.tensordot(weights, centred, 1)])

    plain = scaled_product_gram(x, layout=layout)
    gram = scaled_product_gram(x, layout=layout, spread=centred_and_mixed)
    cross = _norms(gram, torch.cat([weights, -torch.eye(len(x), dtype=torch.float64, device=x.device)], 1))
    size = _norms(plain, weights)
    relative = torch.where(size > 0, cross / size.clamp_min(torch.finfo(torch.float64).tiny), torch.zeros_like(size))
    return float(cross.mean()), float(relative.mean())


def aggregation_error(before: Tensor, after: Tensor, w: np.ndarray, layout: Layout) -> float:
    """Mean over receivers of ||sum_j w_ij ΔW_j - ΔW_i'||_F: what each holds after the round against product consensus.

    before, after: rows (N, D) around the mix.
    """
    weights = torch.as_tensor(w, dtype=torch.float64, device=before.device)
    gram = scaled_product_gram(before, after, layout=layout)
    eye = torch.eye(len(before), dtype=torch.float64, device=before.device)
    return float(_norms(gram, torch.cat([weights, -eye], 1)).mean())


def product_distance(x: Tensor, layout: Layout) -> float:
    """sqrt(mean_i ||ΔW_i - mean ΔW||_F²) of rows x (N, D): disagreement that no change of basis hides."""
    num = len(x)
    centred = torch.eye(num, dtype=torch.float64, device=x.device) - 1 / num
    return float(_norms(scaled_product_gram(x, layout=layout), centred).square().mean().sqrt())


def whole(x: Tensor, layout: Layout, kept: Tensor | None, residual: Layout | None) -> tuple[Tensor, Layout]:
    """Rows x (N, D) of A and B together with the residuals `kept` (N, D_E) beside them, as factors of larger rank."""
    if kept is None:
        return x, layout
    joined = join((layout, residual))
    return join_rows(joined, (layout, residual), (x, kept), len(x)), joined


Models = tuple[Tensor, Tensor, Layout]


def measure(before: Tensor, after: Tensor, w: np.ndarray, layout: Layout, models: Models | None = None) -> dict[str, float]:
    """All measures of a round from the rows before and after the mix (N, D).

    models: the same with what lies beside the factors (`whole`), for what is said of products.
    """
    whole_before, whole_after, whole_layout = models or (before, after, layout)
    cross, relative = cross_term(before, w, layout)
    result = {"consensus_distance": consensus_distance(after)}
    for group in GROUPS:
        if layout.has(group):
            result[f"consensus_distance_{group}"] = consensus_distance(after[:, layout.groups[group]])
    return result | {
        "product_distance": product_distance(whole_after, whole_layout),
        "cross_term": cross,
        "cross_term_relative": relative,
        "aggregation_error": aggregation_error(whole_before, whole_after, w, whole_layout),
    }
