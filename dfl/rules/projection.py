"""Rules that average factors and then correct B for what the average of A cannot undo: LoRA-FAIR."""

import torch
from torch import Tensor

from dfl.adapters.batched import eigh
from dfl.adapters.layout import Layout, write_pairs
from dfl.rules.pairs import Received, pair_gossip
from dfl.slots import Rule, State

# an eigenvalue of A A^T below this fraction of the largest is numerically null
_NULL = 1e-10


def lora_fair(layout: Layout, *, ridge: float = 0.01) -> Rule:
    """Average factors, then correct B so that the product comes as close to the mean product as A allows (LoRA-FAIR).

    A = sum_j w_ij A_j;  M = sum_j w_ij B_j A_j;  B_i <- B + (M - B A) A^T (A A^T + ridge I)^-1 with B = sum_j w_ij B_j;
     A_i <- A: the closed form of min_D ||M - (B + D) A||² + ridge ||D||², in place of the paper's gradient steps on a
     cosine similarity. ridge = 0
    projects M on the rows of A. Nothing is sent beyond the factors; closer to M than plain averaging, for every ridge.
    Keeps the mean of A. Bian, Wang, Zhang, Xu 2024, arXiv 2411.14961.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < float("inf"):
        raise ValueError(f"rule.ridge = {ridge!r} is not allowed; allowed: a number from 0")

    def combine(out: Tensor, received: Received, state: State) -> State:
        for pairs in layout.shapes():
            write_pairs(out, pairs, *corrected(*received.factors(pairs), received.weights, ridge))
        return state

    return pair_gossip(layout, combine, changes_basis=False, averages=True, facts={"ridge": ridge})


def corrected(a: Tensor, b: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The mean A (L, R, I) and the corrected B (L, O, R) of pairs a (J, L, R, I), b (J, L, O, R)."""
    mean_a, mean_b = (torch.einsum("j,j...->...", weights.to(f), f) for f in (a, b))
    # (M - B A) A^T, rank by rank: no O x I matrix
    mixed = torch.einsum("j,jlor,jlrs->los", weights, b.double(), a.double() @ mean_a.double().mT)
    gram = mean_a.double() @ mean_a.double().mT
    values, vectors = eigh(gram)
    kept = values > _NULL * values[..., -1:]
    inverse = torch.where(kept, 1 / torch.where(kept, values + ridge, torch.ones_like(values)), torch.zeros_like(values))
    residual = mixed - mean_b.double() @ gram
    return mean_a, mean_b + (residual @ vectors * inverse[..., None, :] @ vectors.mT).to(mean_b)
