"""Rules that mix products B A instead of factors: DeCAF, FlexLoRA, FLoRIST."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters.batched import uploaded
from dfl.adapters.layout import Layout, Pair, scalings, stack_a, stack_b
from dfl.adapters.lowrank import SPLITS, align, cut, energy_rank, refactor, truncate, weighted_sum
from dfl.plugins import check_choice, check_share
from dfl.rules.pairs import Received, pair_gossip, write_slots
from dfl.slots import Round, Rule, State

GAUGES = ("none", "own")


def decaf(layout: Layout, *, split: str = "balanced", gauge: str = "none", ranks: Sequence[int] | None = None) -> Rule:
    """Mix products and truncate back to rank R by a compact SVD (DeCAF; FlexLoRA as gossip).

    P_i = sum_j w_ij B_j A_j;  U S V^T = its R leading singular triples;  balanced: B_i <- U S^1/2, A_i <- S^1/2 V^T;
    left: B_i <- U S, A_i <- V^T. Only factors travel. Keeps the mean product up to the truncation, whose error is
    kept in the state; with unequal ranks the energy beyond the smallest rank is lost for all. A peer that receives nothing
    keeps its factors. Saadati et al. 2025, arXiv 2505.21382; Bai et al. 2024, arXiv 2402.11505.
    gauge: an SVD chooses the frame of the factors anew each time (none); own turns the new pair, its product unchanged,
    to the one that the peer held, so that optimiser moments go on to fit.
    """
    check_split(split)
    check_gauge(gauge)

    def combine(out: Tensor, received: Received, state: State) -> State:
        squared = torch.zeros((), dtype=torch.float64, device=out.device)
        for pairs in layout.shapes():
            rank = pairs[0].rank if ranks is None else ranks[received.round.peer]
            squared += mix_products(out, received, pairs, split, rank, gauge=gauge)[0]
        return {"truncation_error": squared.sqrt()}

    return pair_gossip(layout, combine, ranks=ranks, diagnostics=("truncation_error",),
                       changes_basis=gauge == "none", averages=True, facts={"split": split, "gauge": gauge})


def florist(layout: Layout, *, tau: float = 0.99, cap: int | None = None, split: str = "balanced",
            ranks: Sequence[int] | None = None) -> Rule:
    """Mix products and keep as few directions of each layer as hold the share tau of its energy (FLoRIST as gossip).

    As `decaf`, with rank p = min{p : sum_{l<=p} S_l² >= tau sum_l S_l²}, at most `cap` (none: the peer's own rank, or
    the layout's). The slots beyond p are zero: they neither travel nor train until a later mix fills them. tau = 1 is
    `decaf`. A direction that has not enough energy in one neighbourhood is lost there, also if it is new: below tau = 1
    and with unequal caps the energy collapses into few directions, in idle rounds too. Ramesh, Dass 2025, arXiv
    2506.09199.
    """
    check_split(split)
    check_share("rule.tau", tau)
    check_cap(cap)
    place = {pair.name: index for index, pair in enumerate(layout.pairs)}

    def limit(rank: int, peer: int) -> int:
        return min([rank, *([] if cap is None else [cap]), *([] if ranks is None else [ranks[peer]])])

    def message_ranks(state: State, round: Round) -> list[int]:
        # before its first mix a peer fills as many slots as it has
        return [min(slots, pair.rank if ranks is None else ranks[round.peer])
                for slots, pair in zip(state["slots"].tolist(), layout.pairs, strict=True)]

    def init(x: Tensor) -> State:
        slots = uploaded([pair.rank for pair in layout.pairs], x)
        return {"slots": slots, "rank": slots.double().mean()}

    def combine(out: Tensor, received: Received, state: State) -> State:
        squared = torch.zeros((), dtype=torch.float64, device=out.device)
        slots = torch.zeros_like(state["slots"])
        for pairs in layout.shapes():
            error, kept = mix_products(out, received, pairs, split, limit(pairs[0].rank, received.round.peer), tau)
            squared += error
            slots[uploaded([place[pair.name] for pair in pairs], slots)] = kept
        return {"slots": slots, "rank": slots.double().mean(), "truncation_error": squared.sqrt()}

    return pair_gossip(layout, combine, ranks=ranks, init=init, message_ranks=message_ranks,
                       diagnostics=("truncation_error",), averages=True, facts={"tau": tau, "cap": cap, "split": split})


def check_split(split: str) -> None:
    check_choice("rule.split", split, SPLITS)


def check_gauge(gauge: str) -> None:
    check_choice("rule.gauge", gauge, GAUGES)


def check_cap(cap: object) -> None:
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise ValueError(f"rule.cap = {cap!r} is not allowed; allowed: null, or a whole number from 1")


def mix_products(out: Tensor, received: Received, pairs: list[Pair], split: str, rank: int, tau: float | None = None,
               gauge: str = "none") -> tuple[Tensor, Tensor]:
    """Refactorise the layers of one shape into row `out`: the squared truncation error, scaled as ΔW is, and the ranks kept (L,)."""
    a, b = received.factors(pairs)
    own_a, own_b = stack_a(out, pairs)[:, :rank], stack_b(out, pairs)[..., :rank]
    svd = truncate(*weighted_sum(received.weights, a, b), rank)
    kept = torch.full((len(pairs),), rank, device=out.device)
    if tau is not None:
        kept = energy_rank(svd.spectrum, tau).clamp_max(rank)
        svd = cut(svd, kept)
    new_a, new_b = refactor(svd, own_a, split)
    if gauge == "own":
        new_a, new_b, _ = align(new_a, new_b, own_a, own_b)
    # while every B is zero there is no product to factor, and splitting it would kill the adapter: average the factors
    alive = (svd.spectrum[:, 0] > 0)[:, None, None]
    new_a = torch.where(alive, new_a, torch.einsum("j,jlri->lri", received.weights.to(a), a[..., :rank, :]))
    new_b = torch.where(alive, new_b, torch.einsum("j,jlor->lor", received.weights.to(b), b[..., :rank]))
    write_slots(out, pairs, new_a, new_b)
    kept = torch.where(alive[:, 0, 0], kept, torch.full_like(kept, rank))
    return (svd.error.double() * scalings(pairs, out)).square().sum(), kept
