"""Rules that average factors of unequal ranks slot by slot: HetLoRA's zero padding with pruning, and replication
(RBLA).

Slot l is row l of A and column l of B. Slots mean the same at two peers only as far as they began alike and drifted
little.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters.batched import uploaded
from dfl.adapters.layout import Layout, Pair, a_view, b_view, scalings, stack_a, stack_b
from dfl.adapters.lowrank import refactor, squared_norms, truncate
from dfl.plugins import check_count
from dfl.rules.pairs import Received, pair_gossip, write_slots
from dfl.slots import Round, Rule, State


def hetlora(layout: Layout, *, order: bool = False, gamma: float | None = None, penalty: float = 0.01, min_rank: int = 1,
            ranks: Sequence[int] | None = None) -> Rule:
    """Average factors padded with zeros, weighted by the norms of products; each peer keeps its slots (HetLoRA as gossip).

    nu_j = ||B_j A_j||_F over all layers;  p_j = w_ij nu_j / sum_l w_il nu_l;  A_i <- sum_j p_j A_j, B_i <- sum_j p_j
    B_j, zeros beyond each peer's rank, cut to the first R_i slots. No mean is kept, and slots that few peers have are
    diluted. Cho, Liu, Xu, Fahrezi, Joshi 2024, arXiv 2401.06432.
    order: put the slots of every pair in the order of its singular values first, so that cutting costs the least; not
    in the paper. gamma: prune. The slots from floor(gamma R_i) on are the tail; `penalty` times ||B_tail|| ||A_tail||,
    summed over layers, is added to the loss (its gradient at the start of the round), and where that has shrunk in a
    round the tail is dropped, down to min_rank. A pruned slot never comes back; `rank` tells how many are left.
    """
    check_pruning(order, gamma, penalty, min_rank)
    largest = max((pair.rank for pair in layout.pairs), default=0)

    def rank_of(state: State, round: Round) -> int:
        own = largest if ranks is None else ranks[round.peer]
        return own if gamma is None else min(own, round_rank(state))

    def combine(out: Tensor, received: Received, state: State) -> State:
        shares, rank = norm_weights(layout, received), rank_of(state, received.round)
        for pairs in layout.shapes():
            a, b = received.factors(pairs)
            a, b = in_order(a, b) if order else (a, b)
            kept = min(rank, pairs[0].rank)
            write_slots(out, pairs, torch.einsum("j,jlri->lri", shares.to(a), a[..., :kept, :]),
                        torch.einsum("j,jlor->lor", shares.to(b), b[..., :kept]))
        return state

    fixed = {"linear": False, "product": False, "changes_basis": order}
    if gamma is None:
        return pair_gossip(layout, combine, ranks=ranks, of_rows=ranks is None, facts={"order": order}, **fixed)

    def init(x: Tensor) -> State:
        # in round 0 nothing can have shrunk
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        return {"rank": zero + largest, "tail": zero, "penalty_gradient": torch.zeros_like(x)}

    def outgoing(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        rank = rank_of(state, round)
        cut = math.floor(gamma * rank)
        shrunk = bool(tail_score(layout, x, cut, rank) < state["tail"])
        return x, {**state, "rank": torch.full_like(state["rank"], max(min(min_rank, rank), cut) if shrunk else rank)}

    def message_ranks(state: State, round: Round) -> list[int]:
        rank = round_rank(state)
        return [min(rank, pair.rank) for pair in layout.pairs]

    def finalize(out: Tensor, state: State, round: Round) -> State:
        rank = round_rank(state)
        cut = math.floor(gamma * rank)
        for pair in layout.pairs:
            a_view(out, pair)[rank:] = 0
            b_view(out, pair)[:, rank:] = 0
        return {**state, "tail": tail_score(layout, out, cut, rank),
                "penalty_gradient": penalty * tail_gradient(layout, out, cut, rank)}

    rule = pair_gossip(layout, combine, init=init, outgoing=outgoing, message_ranks=message_ranks, finalize=finalize,
                       facts={"order": order, "gamma": gamma, "penalty": penalty, "min_rank": min_rank}, **fixed)
    return rule._replace(correct=lambda state: state["penalty_gradient"] if penalty else None)


def replicate(layout: Layout, *, ranks: Sequence[int] | None = None) -> Rule:
    """Average each slot over the peers that have it (replication-based padding, RBLA).

    A_i[l] <- sum_{j: R_j > l} w_ij A_j[l] / sum_{j: R_j > l} w_ij, B the same, for l < R_i. Nothing is diluted by
    zeros; a slot's weights sum to one but need not be doubly stochastic, so that its mean is not kept. With equal ranks
    it is `lora`. Byun, Lee 2024, arXiv 2406.17477; Chen, Tavallaie, Nazemi, Zomaya 2024, arXiv 2408.08699.
    """

    def combine(out: Tensor, received: Received, state: State) -> State:
        for pairs in layout.shapes():
            a, b = received.factors(pairs)
            shares = received.weights[:, None] * _has_slot(received, pairs, ranks)
            shares = shares / shares.sum(0)
            kept = pairs[0].rank if ranks is None else ranks[received.round.peer]
            write_slots(out, pairs, torch.einsum("jr,jlri->lri", shares.to(a), a)[:, :kept],
                        torch.einsum("jr,jlor->lor", shares.to(b), b)[..., :kept])
        return state

    return pair_gossip(layout, combine, ranks=ranks, linear=ranks is None, product=False, changes_basis=False,
                       averages=ranks is None)


def _has_slot(received: Received, pairs: Sequence[Pair], ranks: Sequence[int] | None) -> Tensor:
    """(J, R): whether peer j has slot l; a slot that nobody has counts as everybody's zeros."""
    slots = torch.arange(pairs[0].rank, device=received.rows.device)
    if ranks is None:
        return torch.ones(len(received.peers), len(slots), dtype=torch.bool, device=slots.device)
    held = slots < uploaded([ranks[j] for j in received.peers], slots)[:, None]
    return held | ~held.any(0)


def norm_weights(layout: Layout, received: Received) -> Tensor:
    """w_j ||ΔW_j||_F over all layers, scaled to sum to one: (J,) float64. Where every product is zero, the weights themselves."""
    squares = torch.zeros_like(received.weights)
    for pairs in layout.shapes():
        a, b = (f.double() for f in received.factors(pairs))
        squares = squares + squared_norms(a, b).clamp_min(0) @ scalings(pairs, a).square()
    shares = received.weights * squares.sqrt()
    total = shares.sum()
    return torch.where(total > 0, shares / torch.where(total > 0, total, torch.ones_like(total)), received.weights)


def in_order(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with slots by falling singular value, balanced; a pair whose product is zero stays as it is."""
    svd = truncate(b, a, a.shape[-2])
    new_a, new_b = refactor(svd, a, "balanced")
    alive = (svd.spectrum[..., 0] > 0)[..., None, None]
    return torch.where(alive, new_a, a), torch.where(alive, new_b, b)


def round_rank(state: State) -> int:
    return round(float(state["rank"]))


def tails(layout: Layout, row: Tensor, cut: int, rank: int) -> list[tuple[list[Pair], Tensor, Tensor]]:
    """(pairs, A (L, R, I), B (L, O, R)) of each shape with every slot outside cut ... rank - 1 set to zero, in float64."""
    found = []
    for pairs in layout.shapes():
        slots = torch.arange(pairs[0].rank, device=row.device)
        inside = ((slots >= cut) & (slots < rank)).double()
        found.append((pairs, stack_a(row, pairs).double() * inside[:, None], stack_b(row, pairs).double() * inside))
    return found


def tail_score(layout: Layout, row: Tensor, cut: int, rank: int) -> Tensor:
    """sum over layers of ||B[:, cut:]|| ||A[cut:]||."""
    zero = torch.zeros((), dtype=torch.float64, device=row.device)
    return sum(((_size(a) * _size(b)).sum() for _, a, b in tails(layout, row, cut, rank)), zero)


def tail_gradient(layout: Layout, row: Tensor, cut: int, rank: int) -> Tensor:
    """The gradient of `tail_score` in the row (D,); zero where a factor's tail is."""
    gradient = torch.zeros_like(row)
    for pairs, a, b in tails(layout, row, cut, rank):
        of_a, of_b = _size(a), _size(b)
        ratio = torch.where((of_a > 0) & (of_b > 0), of_b / of_a, torch.zeros_like(of_a))
        write_slots(gradient, pairs, (ratio * a).to(row), (torch.where(ratio > 0, 1 / ratio, ratio) * b).to(row))
    return gradient


def _size(factor: Tensor) -> Tensor:
    return factor.square().sum((-2, -1), keepdim=True).sqrt()


def check_pruning(order: object, gamma: object, penalty: object, min_rank: object) -> None:
    if not isinstance(order, bool):
        raise ValueError(f"rule.order = {order!r} is not allowed; allowed: true, false")
    if gamma is not None and (isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma < 1):
        raise ValueError(f"rule.gamma = {gamma!r} is not allowed; allowed: null (no pruning), or a number between 0 and 1")
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not 0 <= penalty < math.inf:
        raise ValueError(f"rule.penalty = {penalty!r} is not allowed; allowed: a number from 0")
    check_count("rule.min_rank", min_rank)
