"""What a round did layer by layer, from Gram tables: aggregation error, tail energy, R_weak, R_strong, norms, angles.

R_weak and R_strong are the mismatches of products and of factors that the aggregation-broadcast analysis bounds (Chen et al.
2025, arXiv 2508.01348), here between what a peer holds after the round and what its neighbours sent.
"""

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout, scalings, stack_a, stack_b
from dfl.adapters.lowrank import gram_tables, procrustes, products, truncate, weighted_sum

_TINY = torch.finfo(torch.float64).tiny


def diagnose(before: Tensor, after: Tensor, w: np.ndarray, layout: Layout,
             models: tuple[Tensor, Tensor, Layout] | None = None) -> dict[str, dict[str, float]]:
    """{diagnostic: {layer: value}} of a round from the rows before and after the mix (N, D), W (N, N).

    aggregation_error: ||sum_j w_ij ΔW_j - ΔW_i'|| over ||sum_j w_ij ΔW_j||, mean over receivers; tail_energy: the part of that
    sum's energy beyond the adapter's rank, mean; r_weak: ||ΔW_i' - ΔW_j||, mean over links; r_strong: ||B_i' - B_j||² +
    ||A_i' - A_j||², mean over links; norm_A, norm_B: the largest over peers; alignment_angle: degrees by which a neighbour's frame
    is turned against the receiver's, mean over links. models: the same rows with what lies beside the factors.
    """
    whole_before, whole_after, whole_layout = models or (before, after, layout)
    weights = torch.as_tensor(w, dtype=torch.float64, device=before.device)
    found: dict[str, dict[str, float]] = {}
    for pairs in layout.shapes():
        values = _of_products(whole_before, whole_after, whole_layout.like(pairs), weights, pairs[0].rank)
        values |= _of_factors(before, after, pairs, weights)
        for name, by_layer in values.items():
            found.setdefault(name, {}).update(zip((pair.name for pair in pairs), by_layer.tolist(), strict=True))
    return found


def _of_products(before: Tensor, after: Tensor, pairs, weights: Tensor, rank: int) -> dict[str, Tensor]:
    """(L,) each."""
    num = len(before)
    a = torch.cat([stack_a(before, pairs), stack_a(after, pairs)]).double()
    b = torch.cat([stack_b(before, pairs), stack_b(after, pairs)]).double() * scalings(pairs, before)[:, None, None]
    table = products(gram_tables(a, b))  # (L, 2N, 2N)

    def norms(coefficients: Tensor) -> Tensor:  # (K, 2N) -> (L, K)
        return torch.einsum("kj,ljm,km->lk", coefficients, table, coefficients).clamp_min(0).sqrt()

    eye, none = torch.eye(num, dtype=torch.float64, device=a.device), torch.zeros_like(weights)
    target = norms(torch.cat([weights, none], 1))
    error = norms(torch.cat([weights, -eye], 1)) / target.clamp_min(_TINY)
    receivers, senders = _links(weights)
    weak = norms(torch.cat([-eye[senders], eye[receivers]], 1))
    return {"aggregation_error": error.mean(1), "tail_energy": _tail(a[:num], b[:num], weights, rank), "r_weak": _mean(weak)}


def _tail(a: Tensor, b: Tensor, weights: Tensor, rank: int) -> Tensor:
    """Mean over receivers of the energy of sum_j w_ij ΔW_j beyond `rank`, as a part of all of it (L,)."""
    parts = []
    for row in weights:
        heard = row.nonzero().flatten()
        squared = truncate(*weighted_sum(row[heard], a[heard], b[heard]), 1).spectrum.square()
        parts.append(squared[:, rank:].sum(1) / squared.sum(1).clamp_min(_TINY))
    return torch.stack(parts).mean(0)


def _of_factors(before: Tensor, after: Tensor, pairs, weights: Tensor) -> dict[str, Tensor]:
    """(L,) each."""
    a, b = stack_a(before, pairs).double(), stack_b(before, pairs).double()
    new_a, new_b = stack_a(after, pairs).double(), stack_b(after, pairs).double()
    receivers, senders = _links(weights)
    strong = sum((new[receivers] - old[senders]).square().sum((-1, -2)) for new, old in ((new_a, a), (new_b, b)))
    rotation = procrustes(a[senders] @ a[receivers].mT)
    cosine = rotation.diagonal(dim1=-1, dim2=-2).mean(-1).clamp(-1, 1)
    return {"r_strong": _mean(strong.mT), "norm_A": new_a.square().sum((-1, -2)).sqrt().amax(0),
            "norm_B": new_b.square().sum((-1, -2)).sqrt().amax(0), "alignment_angle": _mean(cosine.arccos().rad2deg().mT)}


def _links(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Receivers and senders of all links but the loops."""
    away = weights.clone()
    away.fill_diagonal_(0)
    return away.nonzero(as_tuple=True)


def _mean(values: Tensor) -> Tensor:
    """Over links, the last dimension; 0 without any."""
    return values.mean(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
