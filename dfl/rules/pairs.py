"""The frame of rules that combine whole pairs (A_j, B_j): what travels, how it is stacked, what is averaged beside it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.factors import Layout, Pair, stack_a, stack_b, write_pairs
from dfl.rules.base import (
    BOTH,
    Inbox,
    Round,
    Rule,
    State,
    beside_factors,
    no_correction,
    part_lengths,
    read_groups,
    weighted_mean,
    write_groups,
)


class Heard(NamedTuple):
    """What reaches one peer in a round: J peers in ascending id, its own message among them.

    rows (J, D): the columns of A and B as the layout has them, zero beyond the rank of a peer. weights (J,) float64.
    """

    peers: tuple[int, ...]
    rows: Tensor
    weights: Tensor
    own: int  # index of the peer itself
    round: Round
    beside: Tensor | None = None  # (J, K) what travels with A and B: magnitudes, the head; averaged already
    notes: Tensor | None = None  # (J, 1) what each peer added to its message

    def factors(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """A (J, L, R, I) and B (J, L, O, R) of the layers of one shape."""
        return stack_a(self.rows, pairs), stack_b(self.rows, pairs)


# writes the new factors into the row and returns the new state; the row comes as a clone of the peer's own
Combine = Callable[[Tensor, Heard, State], State]


def pair_gossip(layout: Layout, combine: Combine, *, head: str = "frozen", ranks: Sequence[int] | None = None,
                init: Callable[[Tensor], State] = lambda x: {}, outgoing: Callable | None = None, note: str | None = None,
                carries: Callable[[State, Round], Sequence[int]] | None = None,
                settle: Callable[[Tensor, State, Round], State] | None = None,
                diagnostics: Sequence[str] = (), trains: frozenset[str] = BOTH, wire: Layout | None = None, **facts) -> Rule:
    """A rule whose message is all of A and B, and whose `combine` makes new ones from what the neighbours sent.

    ranks: the rank of every peer where they differ; a message then carries its ranks and only the slots that they fill.
    outgoing(x, state, round) -> (row, state): what is sent instead of the peer's own row.
    note: a scalar of the state that travels with the message.
    carries(state, round) -> the rank of each layer in the message, where a peer's ranks change from round to round.
    settle(out, state, round) -> state: called last in every round, also where nobody was heard; may write into the row.
    wire: the layout of the factors in a message, where that is another one; `outgoing` then makes a row of it, `carries` is needed.
    diagnostics: names of scalars (float64) that `combine` puts into the state; zero in a round without neighbours.
    A peer that hears nobody keeps its bits. `facts`: further fields of the Rule.
    """
    also_trained, also_mixed = beside_factors(layout, head)
    sends = BOTH | also_mixed
    cuts, also_cuts = layout.columns(sends), layout.columns(also_mixed)
    slots = Slots(layout if wire is None else wire)
    num_factors = slots.num_factors
    num_sent = num_factors + layout.length(also_mixed)
    packed = ranks is not None or carries is not None

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        row = x
        if outgoing is not None:
            row, state = outgoing(x, state, round)
        message = read_groups(row, cuts) if wire is None else torch.cat([row, read_groups(x, also_cuts)])
        if packed:
            message = slots.pack(message, [ranks[round.peer]] * len(layout.pairs) if carries is None else carries(state, round))
        return (message if note is None else torch.cat([message, state[note].reshape(1).to(message)])), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, state = hear(x, inbox, state, round)
        return out, (state if settle is None else settle(out, state, round))

    def hear(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        silent = {name: torch.zeros((), dtype=torch.float64, device=x.device) for name in diagnostics}
        if len(inbox) == 1:
            return x.clone(), {**state, **silent}
        messages = inbox if not packed else {j: slots.unpack(message) for j, message in inbox.items()}
        out = x.clone()
        peers = tuple(sorted(messages))
        weights = torch.tensor([round.weights[j] for j in peers], dtype=torch.float64, device=x.device)
        rows = torch.stack([messages[j][:num_factors] for j in peers])
        beside = {j: messages[j][num_factors:num_sent] for j in peers}
        if also_cuts:
            write_groups(out, also_cuts, weighted_mean(beside, round.weights))
        notes = None if note is None else torch.stack([messages[j][-1:] for j in peers])
        heard = Heard(peers, rows, weights, peers.index(round.peer), round, torch.stack(list(beside.values())), notes)
        return out, combine(out, heard, state)

    def start(x: Tensor) -> State:
        return {**init(x), **{name: torch.zeros((), dtype=torch.float64, device=x.device) for name in diagnostics}}

    length = layout.length(sends) + (note is not None) if not packed else None
    parts = part_lengths(layout, sends) + [1] * (note is not None)
    after = layout.length(also_mixed) + (note is not None)
    kind = {"integers": len(layout.pairs), "readable": lambda message: slots.readable(message, after)} if packed else {
        "parts": lambda t: parts}
    return Rule(lambda t: trains | also_trained, lambda t: sends, lambda t: length, start, send, mix, no_correction,
                **{"linear": False, "product": True, "changes_basis": True, **kind, **facts})


class Slots:
    """Messages of fewer slots than the layout has: a rank per layer, then only the numbers that those ranks fill."""

    def __init__(self, layout: Layout):
        self.layout, self.num_factors = layout, layout.length(BOTH)
        self._columns: dict[tuple[int, ...], Tensor] = {}

    def columns(self, ranks: Sequence[int]) -> Tensor:
        """Where the first ranks[l] slots of each layer lie in a row of A and B: indices, ascending within A and within B."""
        key = tuple(ranks)
        if key not in self._columns:
            pairs = list(zip(self.layout.pairs, key, strict=True))
            in_a = [torch.arange(p.a, p.a + r * p.d_in) for p, r in pairs]
            in_b = [(p.b + torch.arange(p.d_out)[:, None] * p.rank + torch.arange(r)).flatten() for p, r in pairs]
            self._columns[key] = torch.cat(in_a + in_b)
        return self._columns[key]

    def pack(self, row: Tensor, ranks: Sequence[int]) -> Tensor:
        """[ranks (L,) | A and B of those slots | whatever follows them in the row]."""
        columns = self.columns(ranks).to(row.device)
        return torch.cat([row.new_tensor(list(ranks)), row[columns], row[self.num_factors:]])

    def readable(self, message: Tensor, after: int) -> bool:
        """Whether its ranks are ranks of the layout, and the slots that they fill and `after` numbers more are there."""
        pairs = self.layout.pairs
        ranks = message[:len(pairs)].tolist()
        if len(ranks) < len(pairs) or not all(r in range(pair.rank + 1) for r, pair in zip(ranks, pairs, strict=True)):
            return False
        return len(message) == len(pairs) + sum(int(r) * (p.d_in + p.d_out) for r, p in zip(ranks, pairs, strict=True)) + after

    def unpack(self, message: Tensor) -> Tensor:
        """The whole row, zero in the slots that did not travel. ValueError for ranks that the layout cannot hold."""
        pairs = self.layout.pairs
        ranks = [round(r) for r in message[:len(pairs)].tolist()]
        for pair, rank in zip(pairs, ranks, strict=True):
            if not 0 <= rank <= pair.rank:
                raise ValueError(f"a message carries rank {rank} for layer {pair.name!r}; allowed: up to {pair.rank}")
        columns = self.columns(ranks).to(message.device)
        row = message.new_zeros(self.num_factors)
        row[columns] = message[len(pairs):len(pairs) + len(columns)]
        return torch.cat([row, message[len(pairs) + len(columns):]])


def write_slots(out: Tensor, pairs: Sequence[Pair], a: Tensor, b: Tensor) -> None:
    """Put factors (L, r, I) and (L, O, r) of at most the layers' rank into a row, zeros into the other slots."""
    missing = pairs[0].rank - a.shape[-2]
    write_pairs(out, pairs, torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))
