"""Rules that mix products B A instead of factors: DeCAF."""

import torch
from torch import Tensor

from dfl.factors import Layout, Pair, stack_a, stack_b, write_pairs
from dfl.lowrank import Truncated, truncate, weighted_sum
from dfl.rules.base import (
    BOTH,
    Inbox,
    Round,
    Rule,
    State,
    check_head,
    no_correction,
    read_groups,
    weighted_mean,
    write_groups,
)

SPLITS = ("balanced", "left")
# a singular direction below this fraction of the largest is numerically null in float32
_NULL = 1e-6


def decaf(layout: Layout, *, split: str = "balanced", head: str = "frozen") -> Rule:
    """Mix products and truncate back to rank R by a compact SVD (DeCAF).

    P_i = sum_j w_ij B_j A_j;  U S V^T = its R leading singular triples;  balanced: B_i <- U S^1/2, A_i <- S^1/2 V^T;
    left: B_i <- U S, A_i <- V^T. Only factors travel. Keeps the mean product up to the truncation, whose error is
    kept in the state. A peer that hears nobody keeps its factors. Saadati et al. 2025, arXiv 2505.21382.
    """
    check_head(head)
    if split not in SPLITS:
        raise ValueError(f"rule.split = {split!r} is not allowed; allowed: {', '.join(SPLITS)}")
    trains = BOTH if head == "frozen" else BOTH | {"head"}
    sends = BOTH | {"head"} if head == "mixed" else BOTH
    cuts = layout.columns(sends)
    num_factors = layout.length(BOTH)

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        return read_groups(x, cuts), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        if len(inbox) == 1:
            return x.clone(), {"truncation_error": torch.zeros_like(state["truncation_error"])}
        mixed = x.clone()
        if head == "mixed":
            heads = {j: m[num_factors:] for j, m in inbox.items()}
            write_groups(mixed, layout.columns({"head"}), weighted_mean(heads, round.weights))
        peers = sorted(inbox)
        rows = torch.stack([inbox[j][:num_factors] for j in peers])
        weights = torch.tensor([round.weights[j] for j in peers], dtype=torch.float64, device=x.device)
        squared = torch.zeros_like(state["truncation_error"])
        for pairs in layout.shapes():
            squared += _mix_shape(mixed, x, rows, weights, pairs, split)
        return mixed, {"truncation_error": squared.sqrt()}

    def init(x: Tensor) -> State:
        return {"truncation_error": torch.zeros((), dtype=torch.float64, device=x.device)}

    return Rule(lambda t: trains, lambda t: sends, lambda t: layout.length(sends), init, send, mix, no_correction,
                linear=False, product=True, changes_basis=True, facts={"split": split})


def _mix_shape(out: Tensor, own: Tensor, rows: Tensor, weights: Tensor, pairs: list[Pair], split: str) -> Tensor:
    """Refactorise the layers of one shape into row `out`; the squared truncation error, scaled as ΔW is."""
    a, b = stack_a(rows, pairs), stack_b(rows, pairs)
    svd = truncate(*weighted_sum(weights, a, b), pairs[0].rank)
    new_a, new_b = refactor(svd, stack_a(own, pairs), split)
    # while every B is zero there is no product to factor, and splitting it would kill the adapter: average the factors
    alive = (svd.spectrum[:, 0] > 0)[:, None, None]
    new_a = torch.where(alive, new_a, torch.einsum("j,jlri->lri", weights.to(a), a))
    new_b = torch.where(alive, new_b, torch.einsum("j,jlor->lor", weights.to(b), b))
    write_pairs(out, pairs, new_a, new_b)
    scaling = torch.tensor([p.scaling for p in pairs], dtype=torch.float64, device=out.device)
    return (svd.error.double() * scaling).square().sum()


def refactor(svd: Truncated, own_a: Tensor, split: str) -> tuple[Tensor, Tensor]:
    """Factors A (..., R, I), B (..., O, R) with B A = U S V^T. A null direction keeps a row in A and a zero column in B.

    In a null direction a balanced split would leave zeros on both sides, which no gradient ever revives; there A gets the
    right vector at the mean row norm of the peer's own A, which changes no product and stays trainable.
    """
    s, vh = svd.s, svd.vh
    null = s <= _NULL * s[..., :1]
    size = own_a.square().sum(-1).mean(-1, keepdim=True).sqrt().expand_as(s)
    root = s.sqrt() if split == "balanced" else torch.ones_like(s)
    left = torch.where(null, torch.zeros_like(s), s / root.clamp_min(torch.finfo(s.dtype).tiny))
    right = torch.where(null, size if split == "balanced" else torch.ones_like(s), root)
    return right[..., None] * vh, svd.u * left[..., None, :]
