"""Rules that turn the neighbours' pairs into one frame before factors are averaged: FedRot-LoRA.

(B R)(R^T A) = B A for every orthogonal R: the same product in another frame. Averages of factors in different frames
interfere.
"""

from torch import Tensor

from dfl.adapters.layout import Layout, stack_a, stack_b, write_pairs
from dfl.adapters.lowrank import align
from dfl.plugins import check_choice
from dfl.rules.base import BOTH, weighted_mean
from dfl.rules.pairs import Received, pair_gossip
from dfl.slots import Round, Rule, State

SIDES = ("receiver", "sender")
REFERENCES = ("trained", "start")
CRITERIA = ("A", "B", "alternate", "joint")


def fedrot(layout: Layout, *, side: str = "receiver", criterion: str | None = None, strength: float = 1.0,
           reference: str | None = None) -> Rule:
    """Turn every neighbour's pair into the peer's own frame, then average factors (FedRot-LoRA as gossip).

    R_ij = argmin_R ||R^T A_j - A_ref|| over orthogonal R (R, R);  A_i <- sum_j w_ij R_ij^T A_j;  B_i <- sum_j w_ij B_j
    R_ij. Each product B_j A_j is unchanged by it, and rotated copies of one pair are averaged exactly. The network
    means are not kept. Zhang, Kim, Cha, Vikalo 2026, arXiv 2602.23638.
    side: receiver; or sender, the published server method: each peer turns its own pair to the one it began the round
    with, before it sends, A's and B's frame in turn. There the frame is common only as far as the peers agree.
    criterion: which factor is brought close: A (default), B, both in turn (alternate: B in even rounds; the default of
    sender), or both at once (joint). strength: 1 turns fully, any orthogonal matrix; below it only a part of each
    angle, and properly (0.4 to 0.6 in the paper); 0 is `lora`. reference: the peer's own pair now (trained) or as the
    round began (start).
    """
    check_choice("rule.side", side, SIDES)
    criterion = criterion or ("A" if side == "receiver" else "alternate")
    reference = reference or ("trained" if side == "receiver" else "start")
    check_choice("rule.criterion", criterion, CRITERIA)
    check_choice("rule.reference", reference, REFERENCES)
    check_strength(strength)
    if side == "sender" and reference != "start":
        raise ValueError(f"rule.reference = {reference!r} does not fit rule.side = 'sender'; allowed: start")
    num_factors = layout.length(BOTH)

    def outgoing(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        # in round 0 there is no earlier common pair: B was zero
        if strength == 0 or round.t == 0:
            return x, state
        row = x.clone()
        turn_rows(layout, row, state["start"], factor(criterion, round.t), strength)
        return row, state

    def combine(out: Tensor, received: Received, state: State) -> State:
        rows = received.rows
        if side == "receiver" and strength > 0:
            rows = in_own_frame(layout, received, out if reference == "trained" else state["start"],
                                factor(criterion, received.round.t), strength, keep_own=reference == "trained")
        out[:num_factors] = weighted_mean(dict(zip(received.peers, rows, strict=True)), received.round.weights)
        return state

    remembers = reference == "start"
    return pair_gossip(layout, combine, outgoing=outgoing if side == "sender" else None,
                       init=(lambda x: {"start": x[:num_factors].clone()}) if remembers else (lambda x: {}),
                       finalize=(lambda out, state, round: {**state, "start": out[:num_factors].clone()}) if remembers else None,
                       changes_basis=False, linear=strength == 0, product=strength > 0,
                       of_rows=side == "receiver" and not remembers,
                       facts={"side": side, "criterion": criterion, "strength": strength, "reference": reference})


def factor(criterion: str, t: int) -> str:
    """What is brought close in round t."""
    return ("B" if t % 2 == 0 else "A") if criterion == "alternate" else criterion


def in_own_frame(layout: Layout, received: Received, reference: Tensor, criterion: str, strength: float = 1.0,
                 keep_own: bool = True) -> Tensor:
    """The rows received (J, D), each pair turned to that of row `reference`; with `keep_own` the peer's own keeps its bits."""
    rows = received.rows.clone()
    turn_rows(layout, rows, reference, criterion, strength)
    if keep_own:
        rows[received.own] = received.rows[received.own]
    return rows


def turn_rows(layout: Layout, rows: Tensor, reference: Tensor, criterion: str, strength: float) -> None:
    """Turn each pair of rows (..., D) in place into the frame of the pairs of row `reference`."""
    for pairs in layout.shapes():
        a, b, _ = align(stack_a(rows, pairs), stack_b(rows, pairs), stack_a(reference, pairs), stack_b(reference, pairs),
                        criterion, strength)
        write_pairs(rows, pairs, a, b)


def check_strength(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"rule.strength = {value!r} is not allowed; allowed: a number from 0 to 1")
