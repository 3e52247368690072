"""What a mixing rule is: a tuple of pure functions over one peer's row x_D, with an explicit state."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.factors import GROUPS, Layout

BOTH = frozenset({"A", "B"})
NEEDS = ("any", "static", "complete")
EXACT = -1  # under this id an inbox holds the receiver's own message as it was before a codec rounded it
State = dict[str, Tensor]
Inbox = Mapping[int, Tensor]  # message of each contributing peer, its own among them, by peer id


class Round(NamedTuple):
    """All that a rule may know of round t at one peer."""

    t: int
    peer: int
    weights: Mapping[int, float]  # the peer's row of W(t): neighbours and itself
    lr: float = 0.0  # train.lr at this time of its schedule
    local_steps: int = 0
    rates: Mapping[str, float] = {}  # the learning rate of each trained group, which may be a multiple of lr


class Rule(NamedTuple):
    """How a peer takes part in a round. No rank, no clock, no disk, no global generator inside.

    trains(t): the groups (A, B, head, ...) that receive gradients in round t.
    sends(t): the groups whose current values make the message; empty: nobody speaks in round t.
    length(t): elements of the message in round t, known to both ends of every edge; None: they differ from peer to peer.
    init(x_D) -> state;  send(x_D, state, round) -> (message_M, state);
    mix(x_D, inbox, state, round) -> (x_D, state), a new row, the old one untouched;
    correct(state) -> a vector (D,) added to each local gradient, or None.
    linear: the mixed row is W x, so that with learning rate 0 t rounds give W(t-1) ... W(0) x0.
    product: the rule is about products; its consensus model is the best rank-r part of the mean product.
    changes_basis: mixing turns the factors' basis, so that optimiser moments no longer fit.
    facts: what was chosen when the rule was built (TAD's interval and why), for the log.
    residual: the layout of state["residual"], a row of low-rank products E that the model adds to those of the factors;
        None: the rule keeps none.
    common: groups that hold the same values at every peer and never travel; what changes them does so alike everywhere. Their digest,
        as the run starts or is resumed, travels with every message.
    needs: what W(t) must be: any; static, the same in every round; complete, static with all rows equal.
    masks(t, peer): the numbers of the row that the peer trains in round t among those of the groups in trains(t), (D,) bool; None:
        all of them, at every peer and in every round.
    averages: `mix` uses messages, or the products of their factors, only in sums over the inbox weighted by round.weights, whatever
        the ids in it are. Then a codec that rounds keeps the mean that the rule keeps: mix gets the peer's own message as it is,
        with weight 1, under the id EXACT, and the rounded one with w_ii - 1, so that x_i + sum_j w_ij (Q(x_j) - Q(x_i)) is computed.
        Any other rule gets what everybody gets, rounded at random: the mean is kept in expectation, and no progress is erased.
    integers: how many numbers at the head of a message are counts or marks; no codec touches them.
    parts(t): the lengths of what a message of round t consists of after those (A, B, ...), to be guarded one by one; None: it is one.
    readable(message) -> whether `mix` can read it, for messages of many lengths; None: always.
    """

    trains: Callable[[int], frozenset[str]]
    sends: Callable[[int], frozenset[str]]
    length: Callable[[int], int | None]
    init: Callable[[Tensor], State]
    send: Callable[[Tensor, State, Round], tuple[Tensor, State]]
    mix: Callable[[Tensor, Inbox, State, Round], tuple[Tensor, State]]
    correct: Callable[[State], Tensor | None]
    linear: bool = True
    product: bool = False
    changes_basis: bool = False
    facts: Mapping[str, object] = {}
    residual: Layout | None = None
    common: frozenset[str] = frozenset()
    needs: str = "any"
    masks: Callable[[int, int], Tensor] | None = None
    averages: bool = False
    integers: int = 0
    parts: Callable[[int], Sequence[int]] | None = None
    readable: Callable[[Tensor], bool] | None = None


def weighted_mean(inbox: Inbox, weights: Mapping[int, float]) -> Tensor:
    """sum_j w_j m_j over the inbox, accumulated in ascending peer id: the same bits however peers are hosted."""
    total = None
    for peer in sorted(inbox):
        message, weight = inbox[peer], float(weights[peer])
        total = message * weight if total is None else total.add_(message, alpha=weight)
    return total


def read_groups(x: Tensor, cuts: list[slice]) -> Tensor:
    """The columns `cuts` of row x_D as one message, empty for none; a view where they are adjacent."""
    return x[cuts[0]] if len(cuts) == 1 else torch.cat([x[:0], *(x[c] for c in cuts)])


def write_groups(x: Tensor, cuts: list[slice], message: Tensor) -> None:
    start = 0
    for cut in cuts:
        stop = start + cut.stop - cut.start
        x[cut] = message[start:stop]
        start = stop


def beside_factors(layout: Layout, head: str) -> tuple[frozenset[str], frozenset[str]]:
    """What is trained, and what is averaged, beside A and B: magnitudes where the layout has them, and the head.

    `head`: frozen, mixed (trained and mixed every round) or local (trained and never sent).
    """
    check_head(head)
    magnitudes = frozenset({"M"}) if layout.has("M") else frozenset()
    return (magnitudes | (frozenset({"head"}) if head != "frozen" else frozenset()),
            magnitudes | (frozenset({"head"}) if head == "mixed" else frozenset()))


def factor_gossip(layout: Layout, trains, mixes, *, head: str = "frozen", facts: Mapping[str, object] = {},
                  common: frozenset[str] = frozenset()) -> Rule:
    """A rule that averages factors: x_F <- sum_j w_ij x_F,j for the groups F in mixes(t), the others untouched.

    `trains`, `mixes`: t -> groups among A and B. What else there is (`beside_factors`) is trained, and mixed with them.
    """
    also_trained, also_mixed = beside_factors(layout, head)

    def trained(t: int) -> frozenset[str]:
        return frozenset(trains(t)) | also_trained

    def sent(t: int) -> frozenset[str]:
        groups = frozenset(mixes(t))
        return groups | also_mixed if groups else groups

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        return read_groups(x, layout.columns(sent(round.t))), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        mean = weighted_mean(inbox, round.weights)
        if len(mean) == len(x):  # all of the row travels
            return mean, state
        mixed = x.clone()
        write_groups(mixed, layout.columns(sent(round.t)), mean)
        return mixed, state

    return Rule(trained, sent, lambda t: layout.length(sent(t)), no_state, send, mix, no_correction, facts=facts,
                common=common, averages=True, parts=lambda t: part_lengths(layout, sent(t)))


def part_lengths(layout: Layout, groups) -> list[int]:
    """The lengths of A, B, ... in a message of `groups`, in row order."""
    return [layout.length({group}) for group in GROUPS if group in groups and layout.has(group)]


def check_head(head: str) -> None:
    check_choice("head", head, ("frozen", "mixed", "local"))


def check_choice(field: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: {', '.join(allowed)}")


def check_count(field: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: a whole number from {least}")


def no_state(x: Tensor) -> State:
    return {}


def no_correction(state: State) -> None:
    return None
