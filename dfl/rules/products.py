"""Rules that mix products B A instead of factors: DeCAF, FlexLoRA, FLoRIST."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.factors import Layout, Pair, stack_a
from dfl.lowrank import SPLITS, refactor, truncate, weighted_sum
from dfl.rules.base import Rule, State
from dfl.rules.pairs import Heard, pair_gossip, scalings, write_slots


def decaf(layout: Layout, *, split: str = "balanced", head: str = "frozen", ranks: Sequence[int] | None = None) -> Rule:
    """Mix products and truncate back to rank R by a compact SVD (DeCAF; FlexLoRA as gossip).

    P_i = sum_j w_ij B_j A_j;  U S V^T = its R leading singular triples;  balanced: B_i <- U S^1/2, A_i <- S^1/2 V^T;
    left: B_i <- U S, A_i <- V^T. Only factors travel. Keeps the mean product up to the truncation, whose error is
    kept in the state; with unequal ranks the energy beyond the smallest rank is lost for all. A peer that hears nobody
    keeps its factors. Saadati et al. 2025, arXiv 2505.21382; Bai et al. 2024, arXiv 2402.11505.
    """
    check_split(split)

    def combine(out: Tensor, heard: Heard, state: State) -> State:
        squared = torch.zeros((), dtype=torch.float64, device=out.device)
        for pairs in layout.shapes():
            rank = pairs[0].rank if ranks is None else ranks[heard.round.peer]
            squared += _mix_shape(out, heard, pairs, split, rank)
        return {"truncation_error": squared.sqrt()}

    return pair_gossip(layout, combine, head=head, ranks=ranks, diagnostics=("truncation_error",), facts={"split": split})


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"rule.split = {split!r} is not allowed; allowed: {', '.join(SPLITS)}")


def _mix_shape(out: Tensor, heard: Heard, pairs: list[Pair], split: str, rank: int) -> Tensor:
    """Refactorise the layers of one shape into row `out`; the squared truncation error, scaled as ΔW is."""
    a, b = heard.factors(pairs)
    svd = truncate(*weighted_sum(heard.weights, a, b), rank)
    new_a, new_b = refactor(svd, stack_a(out, pairs)[:, :rank], split)
    # while every B is zero there is no product to factor, and splitting it would kill the adapter: average the factors
    alive = (svd.spectrum[:, 0] > 0)[:, None, None]
    new_a = torch.where(alive, new_a, torch.einsum("j,jlri->lri", heard.weights.to(a), a[..., :rank, :]))
    new_b = torch.where(alive, new_b, torch.einsum("j,jlor->lor", heard.weights.to(b), b[..., :rank]))
    write_slots(out, pairs, new_a, new_b)
    return (svd.error.double() * scalings(pairs, out)).square().sum()
