"""What a round did layer by layer, from Gram tables: aggregation error, tail energy, R_weak, R_strong, norms, angles.

R_weak and R_strong are the mismatches of products and of factors that the aggregation-broadcast analysis bounds (Chen et al.
2025, arXiv 2508.01348), here between what a peer holds after the round and what its neighbours sent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import stack_a, stack_b
from dfl.adapters.lowrank import inner_products, procrustes, product_gram, singular_values, squared_norms, weighted_sum
from dfl.metrics.measures import Seen, apart, of_receivers, scaled_pairs
from dfl.transport.base import Transport

_TINY = torch.finfo(torch.float64).tiny
_OF_RECEIVERS, _LARGEST = ("aggregation_error", "tail_energy"), ("norm_A", "norm_B")
_OF_LINKS = ("r_weak", "r_strong", "alignment_angle")


def diagnose(transport: Transport, look: Seen, num_peers: int) -> dict[str, dict[str, float]]:
    """{diagnostic: {layer: value}} of a round, the same on all processes.

    aggregation_error: ||sum_j w_ij ΔW_j - ΔW_i'|| over ||sum_j w_ij ΔW_j||, mean over receivers; tail_energy: the part of that
    sum's energy beyond the adapter's rank, mean; r_weak: ||ΔW_i' - ΔW_j||, mean over links; r_strong: ||B_i' - B_j||² +
    ||A_i' - A_j||², mean over links; norm_A, norm_B: the largest over peers; alignment_angle: degrees by which a neighbour's frame
    is turned against the receiver's, mean over links.
    """
    parts = [(part, _links(part)) for part in (of_receivers(look, rows) for rows in apart(look.weights))]
    numbers = torch.cat([torch.bincount(links[0], minlength=len(part.after)) for part, links in parts]).double()[:, None]
    names, values = [pair.name for pairs in look.layout.shapes() for pair in pairs], _by_layer(look, parts)
    sums = transport.total(torch.cat([values[name] for name in (*_OF_RECEIVERS, *_OF_LINKS)] + [numbers], 1))
    means = sums[:-1].view(-1, len(names)) / num_peers
    means[len(_OF_RECEIVERS):] *= num_peers / sums[-1].clamp_min(1)
    largest = torch.cat([values[name].amax(0) for name in _LARGEST])
    largest = transport.summary(largest.expand(3, -1).contiguous().cpu())[2].view(-1, len(names))
    return {name: dict(zip(names, by_layer, strict=True)) for name, by_layer in
            zip((*_OF_RECEIVERS, *_OF_LINKS, *_LARGEST), [*means.tolist(), *largest.tolist()], strict=True)}


def _by_layer(look: Seen, parts: Sequence[tuple[Seen, tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """(P, L) each, of all layers, those of one shape after the other."""
    made = [[_of_products(part, pairs, links) | _of_factors(part, pairs, links) for part, links in parts]
            for pairs in look.layout.shapes()]
    return {name: torch.cat([torch.cat([one[name] for one in of_shape]) for of_shape in made], 1) for name in made[0][0]}


def _of_products(look: Seen, pairs, links: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """(P, L) each; what is of links is summed up for each receiver."""
    others, weights, (receivers, senders) = look.whole.like(pairs), look.weights, links
    a, b = scaled_pairs(look.whole_before, others)
    new_a, new_b = scaled_pairs(look.whole_after, others)
    table, with_after = product_gram(a, b), inner_products(new_a, new_b, a, b)  # (L, J, J), (L, P, J)
    after = squared_norms(new_a, new_b)  # (P, L)
    mixed = torch.einsum("ij,ljm,im->il", weights, table, weights)
    error = mixed - 2 * torch.einsum("ij,lij->il", weights, with_after) + after
    weak = table.diagonal(dim1=1, dim2=2).T[senders] - 2 * with_after.permute(1, 2, 0)[receivers, senders] + after[receivers]
    target = mixed.clamp_min(0).sqrt().clamp_min(_TINY)
    return {"aggregation_error": error.clamp_min(0).sqrt() / target, "tail_energy": _tail(a, b, weights, pairs[0].rank),
            "r_weak": _summed(weak.clamp_min(0).sqrt(), receivers, len(after))}


def _tail(a: Tensor, b: Tensor, weights: Tensor, rank: int) -> Tensor:
    """The energy of sum_j w_ij ΔW_j of each receiver beyond `rank`, as a part of all of it (P, L)."""
    parts = []
    for row in weights:
        received = row.nonzero().flatten()
        squared = singular_values(*weighted_sum(row[received], a[received], b[received])).square()
        parts.append(squared[:, rank:].sum(1) / squared.sum(1).clamp_min(_TINY))
    return torch.stack(parts)


def _of_factors(look: Seen, pairs, links: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """(P, L) each; what is of links is summed up for each receiver."""
    receivers, senders = links
    a, b = stack_a(look.before, pairs).double(), stack_b(look.before, pairs).double()
    new_a, new_b = stack_a(look.after, pairs).double(), stack_b(look.after, pairs).double()
    strong = sum((new[receivers] - old[senders]).square().sum((-1, -2)) for new, old in ((new_a, a), (new_b, b)))
    rotation = procrustes(a[senders] @ a[torch.as_tensor(look.own)[receivers]].mT)
    cosine = rotation.diagonal(dim1=-1, dim2=-2).mean(-1).clamp(-1, 1)
    return {"r_strong": _summed(strong, receivers, len(new_a)), "norm_A": new_a.square().sum((-1, -2)).sqrt(),
            "norm_B": new_b.square().sum((-1, -2)).sqrt(),
            "alignment_angle": _summed(cosine.arccos().rad2deg(), receivers, len(new_a))}


def _links(look: Seen) -> tuple[Tensor, Tensor]:
    """Receivers (of the P) and senders (of the J) of all links but the loops."""
    away = look.weights.clone()
    away[torch.arange(len(away)), torch.as_tensor(look.own)] = 0
    return away.nonzero(as_tuple=True)


def _summed(values: Tensor, receivers: Tensor, num: int) -> Tensor:
    """Values (links, L) summed up for each of `num` receivers (num, L)."""
    return values.new_zeros(num, values.shape[1]).index_add_(0, receivers, values)
