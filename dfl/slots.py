"""What fills the slots of a round, as types: schedule, trigger, codec, channel, network, guard and rule.

Each is a tuple of pure functions with explicit state. None knows a rank, a clock, a disk or a global generator: what is
random is a function of a key. A peer's state in a slot is a flat dictionary of tensors, which nobody changes in place.

Shape suffixes: D numbers of a peer's row, M numbers of a part of a message, K integers beside the parts.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout

State = dict[str, Tensor]
EXACT = -1  # under this id an inbox holds the receiver's own message as it is, where others know it rounded or from before


class Mixing(Hashable, Protocol):
    """Who receives from whom, and how strongly: what `topologies.build` makes, or somebody's own."""

    @property
    def num_peers(self) -> int: ...

    def matrix(self, t: int) -> np.ndarray:
        """W(t), float64 (N, N)."""


class Message(NamedTuple):
    """What one peer tells another.

    parts: numbers by name, floating point (M,), which a codec may round. meta: integers by name, int64 (K,), which
    reach the receiver as they are: ranks, masks, and scalars as their bits (`bits_of`). lost: by part, bool (M,), which
    of its numbers did not arrive; nothing: all of them did.
    """

    parts: Mapping[str, Tensor]
    meta: Mapping[str, Tensor] = {}
    lost: Mapping[str, Tensor] = {}


def bits_of(value: Tensor) -> Tensor:
    """A scalar as the int64 (1,) of its float64 bits, for `Message.meta`, which is the host's."""
    return value.detach().reshape(1).to(torch.float64).view(torch.int64).cpu()


def scalar_of(bits: Tensor) -> Tensor:
    """What `bits_of` was given, as float64 (1,)."""
    return bits.view(torch.float64)


class Plan(NamedTuple):
    """What a peer does in a round: the groups (A, B, head, ...) that receive gradients, the groups whose exchange is
    due (none: nobody speaks), and which numbers of the row are trained, (D,) bool; None: all of the groups in
    `trains`. stretch: by what the change of each number in the local phase is multiplied at its end, (D,); None: 1.
    seconds: how long the local phase takes on the simulated clock; None: what the network says. away: the peer is not there: it
    neither sends nor receives, and what it remembers stays as it is."""

    trains: frozenset[str]
    sends: frozenset[str]
    mask: Tensor | None = None
    stretch: Tensor | None = None
    seconds: float | None = None
    away: bool = False


class Round(NamedTuple):
    """All that a slot may know of round t at one peer."""

    t: int
    peer: int
    weights: Mapping[int, float]  # the peer's row of W(t): neighbours and itself
    plan: Plan = Plan(frozenset(), frozenset())
    lr: float = 0.0  # train.lr in the middle of the round, the same at every peer
    local_steps: int = 0  # of this peer
    rates: Mapping[str, float] = {}  # the learning rate of each trained group, which may be a multiple of lr
    key: int = 0  # a seed of its own for every (peer, round), for the trigger
    bandwidth: float | None = None  # bytes a second that the peer has lately sent on the simulated network; None: no clock
    exchange: int = 0  # which of `Rule.exchanges`
    known: Mapping[str, Tensor] | None = None  # what others hold of the peer, by part; None: what it has said, for the trigger


class Schedule(NamedTuple):
    """What trains and what is sent in round t.

    plan(t, peer) -> Plan, a pure function: the groups are the same at every peer, the mask may differ. sends: what it
    has exchanged over the rounds, one of SENDS. common: groups that hold the same values at every peer and never
    travel; what changes them does so alike everywhere. facts: what was chosen when it was built, for the log.
    """

    plan: Callable[[int, int], Plan]
    sends: str = "pairs"
    common: frozenset[str] = frozenset()
    facts: Mapping[str, object] = {}


# what a schedule has exchanged: both factors in every round, the one that trains, B or A alone, cores, or nothing
SENDS = ("pairs", "active", "B", "A", "core", "nothing")
LAST = ".last"
OWN = "own"  # B beside an A of each peer's own: no rule takes it but one that says so, for a mean of these is nothing
Inbox = Mapping[int, Message]  # the message of each contributing peer, its own among them, by peer id


class Rule(NamedTuple):
    """How what arrives is combined.

    init(x_D) -> state;  send(x_D, state, round) -> (Message, state);  an entry of a state that is a round (int64) has a name that
        ends in LAST: it goes on by one in each round in which the peer is away, which then does not count;
    mix(x_D, inbox, state, round) -> (x_D, state), a new row, the old one untouched; the inbox has one message for each
    weight; correct(state) -> a vector (D,) added to each local gradient, or None.
    after_step(x_D, state, round, k) -> x_D: what becomes of the row after the optimiser's step k = 0 .. local_steps - 1, in the
        numbers that are trained; whatever the optimiser, for what is a step of its own and no part of the gradient. None: nothing.
    speaks(t) -> whether round t exchanges anything, the same at every peer.
    exchanges: how often a round sends and mixes, one after the other; the last one makes the new row.
    linear: the mixed row is W x, so that with learning rate 0 t rounds give W(t-1) ... W(0) x0.
    averages: `mix` uses messages, or the products of their factors, only in sums over the inbox weighted by
    round.weights, whatever
        the ids in it are. Then rounding and silence keep the mean that the rule keeps: mix gets the peer's own message
        as it is, with weight 1, under the id EXACT, and what the others know of it with w_ii - 1: m_i + sum_j w_ij
        (m^_j - m^_i).
    product: the rule is about products; its consensus model is the best rank-r part of the mean product.
    changes_basis: mixing turns the factors' basis, so that optimiser moments no longer fit.
    residual: the layout of state["residual"], a row of low-rank products E that the model adds to those of the factors;
        None: the rule keeps none.
    needs: what W(t) must be: any; static, the same in every round; complete, static with all rows equal.
    takes: the kinds of schedule (SENDS) that it can mix under.
    dated: a message means something in its own round alone, so that none can be held back.
    lossless: no message may be lost or held back, since both ends keep copies that have to stay equal.
    conserves: no message may be lost, since what the peers keep has to cancel, or to sum to the same, over all of them.
    remembers: it adds what mixing did in the last round, so that a codec may round its messages, but leave nothing for later.
    columns: it divides by a mass that travels too, so that the columns of W have to sum to one and not the rows.
    check(topology): ValueError for one that the rule cannot use.
    updates: messages are what the local phase changed, and not rows: a peer takes its own as the others know it.
    of_rows: messages are groups of the rows as they are, and `mix` knows nothing beside them and the weights: it may be asked what
        it would do to other rows.
    readable(message, own, round) -> whether `mix` can read a neighbour's message beside the peer's own, for messages of many
        lengths; None: where its parts are those of the own, as long as they.
    index: metadata that say which numbers the parts hold, and are counted as such.
    facts: what was chosen when the rule was built, for the log.
    """

    init: Callable[[Tensor], State]
    send: Callable[[Tensor, State, Round], tuple[Message, State]]
    mix: Callable[[Tensor, Inbox, State, Round], tuple[Tensor, State]]
    correct: Callable[[State], Tensor | None] = lambda state: None
    after_step: Callable[[Tensor, State, Round, int], Tensor] | None = None
    speaks: Callable[[int], bool] = lambda t: True
    exchanges: int = 1
    linear: bool = False
    averages: bool = False
    product: bool = False
    changes_basis: bool = False
    residual: Layout | None = None
    needs: str = "any"
    takes: frozenset[str] = frozenset(SENDS)
    dated: bool = False
    lossless: bool = False
    conserves: bool = False
    remembers: bool = False
    columns: bool = False
    check: Callable[[object], None] = lambda topology: None
    updates: bool = False
    of_rows: bool = False
    readable: Callable[[Message, Message, Round], bool] | None = None
    index: frozenset[str] = frozenset()  # type: ignore[assignment]  # the method of tuples of that name is not used
    facts: Mapping[str, object] = {}


class Trigger(NamedTuple):
    """Whether a peer speaks.

    init(message) -> state;  decide(message, state, round) -> (whether it speaks, state). Who is silent is taken by its
    neighbours to be where it was when it last spoke. always: it speaks in every round, whatever the message.
    holds: so it is; False: a link over which nobody spoke is not used in that round, its weight stays with the receiver.
    answers: who is told something answers over the same link in the same round. greets: a link that was not there in
    the round before is used in both directions. Both need a W(t) of links that go both ways.
    due(t) -> whether anybody may speak in round t; None: in every one. merges(t) -> whether all peers take the mean of
    all in round t, whatever W(t) is.
    common_start: the start is known to everybody, so that nobody has to say where it begins; `init` is given the
    message of the start. pairs: it compares products, and can do so where A and B travel as they are.
    tensors(message) -> {name: (part, columns)}, what is sent or kept back one by one; `decide` gives the names that
    are sent. None: a message is sent whole.
    measures: it asks for `Round.bandwidth`.
    """

    init: Callable[[Message], State]
    decide: Callable[[Message, State, Round], tuple[bool | frozenset[str], State]]
    always: bool = False
    facts: Mapping[str, object] = {}
    holds: bool = True
    answers: bool = False
    greets: bool = False
    due: Callable[[int], bool] | None = None
    merges: Callable[[int], bool] | None = None
    common_start: bool = False
    pairs: bool = False
    tensors: Callable[[Message], Mapping[str, tuple[str, slice]]] | None = None
    measures: bool = False


class Codec(NamedTuple):
    """How a part becomes bytes.

    init(parts) -> state;  encode(parts, state, key) -> ({name: uint8 (bytes,)}, state);  decode(name, bytes, numel,
    dtype) -> (M,). key: a seed of its own for every (peer, round), by which to round at random so that no number is
    biased; None: the rule takes care of that (`Rule.averages`). exact: what is decoded is what was encoded, to the bit.
    draws: peer: it gets a key under every rule; round: one that is the same at all peers; empty: as said.
    update(name, bytes, copy, numel, dtype) -> (M,), a new tensor, for a codec of differences: each receiver holds a copy
        of what it knows of a sender, and this is the copy after the message (before the first one it is None); `decode`
        is not used. Its state holds the sender's own copy under the part's name.
    partial: a message holds so little of the parts that only sums over many rounds are right.
    gamma: the step of a mix of what was decoded: m_i + gamma sum_j w_ij (m^_j - m^_i).
    counts(name, M, bytes) -> how many numbers a part of so many bytes holds, and how many of the bytes say which ones they
        are; None: all, and none.
    facts: what was chosen when it was built, for the log.
    """

    init: Callable[[Mapping[str, Tensor]], State]
    encode: Callable[[Mapping[str, Tensor], State, int | None], tuple[dict[str, Tensor], State]]
    decode: Callable[[str, Tensor, int, torch.dtype], Tensor]
    exact: bool = False
    draws: str = ""
    update: Callable[[str, Tensor, Tensor | None, int, torch.dtype], Tensor] | None = None
    partial: bool = False
    gamma: float = 1.0
    counts: Callable[[str, int, int], tuple[int, int]] | None = None
    facts: Mapping[str, object] = {}


class Link(NamedTuple):
    """A way on which one message goes. key: a seed of its own for every (sender, receiver, round, aggregation). held:
    the receiver keeps what came before, and both ends know what did not come."""

    sender: int
    receiver: int
    t: int
    key: int
    held: bool = False


class Channel(NamedTuple):
    """What the way from one peer to another does to a message.

    init() -> state of a link;  deliver(message, state, link) -> (message, or None where it is lost, state). Where only
    some of the numbers arrive, `Message.lost` says which do not. perfect: it delivers everything unchanged.
    fill(inbox, own, weights) -> inbox, what stands for the numbers that were lost, given all that arrived, the
    receiver's own message and its row of W(t); None: its own numbers. A trigger that holds messages back keeps what
    arrived before.
    air(inbox, own, weights, state, link) -> (inbox, state): what neighbours send at once adds up, and this is what stands
    for each of their messages, so that the weighted sum is what is received; state and link are the receiver's. None:
    messages come one by one. shared(t): whether a use of the way serves all senders in round t. static: it needs the
    same W in every round.
    delays: it may deliver a message of an earlier round; it is then asked in every round, with None where nothing came.
    repeats: state["sent"], a scalar, is how often the last message was sent, as a sum over its parts (1: once).
    aggregations: how often peers exchange and mix in one round; None: chosen in every round (`injects`).
    most: the largest number that may be. injects(receiver, weights, mean square of a number) -> the variance that one
    aggregation adds to a number of the receiver's; None: none.
    updates: it is for messages that are what a local phase changed (`Rule.updates`).
    cancels: what it adds cancels in the sums that all receivers of a message take with W(t), and in no others.
    """

    init: Callable[[], State]
    deliver: Callable[[Message | None, State, Link], tuple[Message | None, State]]
    perfect: bool = False
    fill: Callable[[Mapping[int, Message], Message, Mapping[int, float]], dict[int, Message]] | None = None
    air: Callable[[Mapping[int, Message], Message, Mapping[int, float], State, Link], tuple[dict[int, Message], State]] | None = None
    shared: Callable[[int], bool] = lambda t: False
    static: bool = False
    delays: bool = False
    repeats: bool = False
    aggregations: int | None = 1
    most: int = 1
    injects: Callable[[int, Mapping[int, float], float], float] | None = None
    updates: bool = False
    cancels: bool = False
    facts: Mapping[str, object] = {}


class Network(NamedTuple):
    """How long things take, on a simulated clock.

    seconds(link, num_bytes) -> how long a message of so many bytes is under way. compute(t, peer, local_steps) -> how
    long a local phase takes. timed: there is a clock at all.
    """

    seconds: Callable[[Link, int], float] = lambda link, num_bytes: 0.0
    compute: Callable[[int, int, int], float] = lambda t, peer, local_steps: 0.0
    timed: bool = False
    facts: Mapping[str, object] = {}


class Guard(NamedTuple):
    """What may enter a receiver's mix at all: rejects(norms, peer, x_D) -> the ids of the neighbours whose messages may not.

    norms: of each part of each message that the receiver holds, {peer: {part: norm}}, its own among them, not finite where a number is
    not; x_D: its row, to compare with.
    screen(inbox, round, x_D) -> (inbox, weights): what is mixed in place of the messages that are left, the receiver's own among
    them, and of its row of W(t); the ids stay, the weights sum to one. None: nothing else. numbers: it goes number by number, so that
    messages have to be rows as they are.
    """

    rejects: Callable[[Mapping[int, Mapping[str, float]], int, Tensor], list[int]]
    screen: Callable[[Inbox, Round, Tensor], tuple[dict[int, Message], dict[int, float]]] | None = None
    numbers: bool = False
