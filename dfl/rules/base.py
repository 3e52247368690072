"""What a mixing rule is: a tuple of pure functions over one peer's row x_D, with an explicit state."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.factors import Layout

BOTH = frozenset({"A", "B"})
State = dict[str, Tensor]
Inbox = Mapping[int, Tensor]  # message of each contributing peer, its own among them, by peer id


class Round(NamedTuple):
    """All that a rule may know of round t at one peer."""

    t: int
    peer: int
    weights: Mapping[int, float]  # the peer's row of W(t): neighbours and itself
    lr: float = 0.0
    local_steps: int = 0


class Rule(NamedTuple):
    """How a peer takes part in a round. No rank, no clock, no disk, no global generator inside.

    trains(t): the factor groups (A, B, head) that receive gradients in round t.
    sends(t): the groups whose current values make the message; empty: the rule never speaks.
    length(t): elements of the message in round t, known to both ends of every edge.
    init(x_D) -> state;  send(x_D, state, round) -> (message_M, state);
    mix(x_D, inbox, state, round) -> (x_D, state), a new row, the old one untouched;
    correct(state) -> a vector (D,) added to each local gradient, or None.
    linear: the mixed row is W x, so that with learning rate 0 t rounds give W(t-1) ... W(0) x0.
    product: the rule is about products; its consensus model is the best rank-r part of the mean product.
    changes_basis: mixing turns the factors' basis, so that optimiser moments no longer fit.
    facts: what was chosen when the rule was built (TAD's interval and why), for the log.
    """

    trains: Callable[[int], frozenset[str]]
    sends: Callable[[int], frozenset[str]]
    length: Callable[[int], int]
    init: Callable[[Tensor], State]
    send: Callable[[Tensor, State, Round], tuple[Tensor, State]]
    mix: Callable[[Tensor, Inbox, State, Round], tuple[Tensor, State]]
    correct: Callable[[State], Tensor | None]
    linear: bool = True
    product: bool = False
    changes_basis: bool = False
    facts: Mapping[str, object] = {}


def weighted_mean(inbox: Inbox, weights: Mapping[int, float]) -> Tensor:
    """sum_j w_j m_j over the inbox, accumulated in ascending peer id: the same bits however peers are hosted."""
    total = None
    for peer in sorted(inbox):
        message, weight = inbox[peer], float(weights[peer])
        total = message * weight if total is None else total.add_(message, alpha=weight)
    return total


def read_groups(x: Tensor, cuts: list[slice]) -> Tensor:
    """The columns `cuts` of row x_D as one message; a view where they are adjacent."""
    return x[cuts[0]] if len(cuts) == 1 else torch.cat([x[c] for c in cuts])


def write_groups(x: Tensor, cuts: list[slice], message: Tensor) -> None:
    start = 0
    for cut in cuts:
        stop = start + cut.stop - cut.start
        x[cut] = message[start:stop]
        start = stop


def factor_gossip(layout: Layout, trains, mixes, *, head: str = "frozen", facts: Mapping[str, object] = {}) -> Rule:
    """A rule that averages factors: x_F <- sum_j w_ij x_F,j for the groups F in mixes(t), the others untouched.

    `trains`, `mixes`: t -> groups among A and B. `head`: frozen, mixed (trained and mixed every round) or
    local (trained and never sent).
    """
    check_head(head)
    with_head = frozenset({"head"})

    def trained(t: int) -> frozenset[str]:
        return frozenset(trains(t)) | (with_head if head != "frozen" else frozenset())

    def sent(t: int) -> frozenset[str]:
        groups = frozenset(mixes(t))
        return groups | with_head if head == "mixed" and groups else groups

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        return read_groups(x, layout.columns(sent(round.t))), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        mean = weighted_mean(inbox, round.weights)
        if len(mean) == len(x):  # all of the row travels
            return mean, state
        mixed = x.clone()
        write_groups(mixed, layout.columns(sent(round.t)), mean)
        return mixed, state

    return Rule(trained, sent, lambda t: layout.length(sent(t)), no_state, send, mix, no_correction, facts=facts)


def check_head(head: str) -> None:
    if head not in ("frozen", "mixed", "local"):
        raise ValueError(f"head = {head!r} is not allowed; allowed: frozen, mixed, local")


def no_state(x: Tensor) -> State:
    return {}


def no_correction(state: State) -> None:
    return None
