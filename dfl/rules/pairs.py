"""The frame of rules that combine whole pairs (A_j, B_j): what travels, how it is stacked, what is averaged beside it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.batched import uploaded
from dfl.adapters.layout import Layout, Pair, stack_a, stack_b, write_pairs
from dfl.rules.base import BOTH, mean_of_groups, parts_of, same_shape
from dfl.slots import Inbox, Message, Round, Rule, State, bits_of, scalar_of


class Received(NamedTuple):
    """What reaches one peer in a round: J messages in ascending id of their senders, its own among them.

    rows (J, D): A and B as the layout has them, zero beyond the rank of a message. weights (J,) float64.
    """

    peers: tuple[int, ...]
    rows: Tensor
    weights: Tensor
    own: int  # index of the peer itself
    round: Round
    others: dict[str, Tensor]  # {group: (J, K)} of what travels with A and B: magnitudes, the head; averaged already
    notes: Tensor | None = None  # (J, 1) float64, what each peer added to its message

    def factors(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """A (J, L, R, I) and B (J, L, O, R) of the layers of one shape."""
        return stack_a(self.rows, pairs), stack_b(self.rows, pairs)


# writes the new factors into the row and returns the new state; the row comes as a clone of the peer's own
Combine = Callable[[Tensor, Received, State], State]


def pair_gossip(layout: Layout, combine: Combine, *, ranks: Sequence[int] | None = None,
                init: Callable[[Tensor], State] = lambda x: {}, outgoing: Callable | None = None, note: str | None = None,
                message_ranks: Callable[[State, Round], Sequence[int]] | None = None,
                finalize: Callable[[Tensor, State, Round], State] | None = None,
                diagnostics: Sequence[str] = (), wire: Layout | None = None, **facts) -> Rule:
    """A rule whose message is all of A and B, and whose `combine` makes new ones from what the neighbours sent.

    ranks: the rank of every peer where they differ; a message then has its ranks beside it and only the slots that they
    fill. outgoing(x, state, round) -> (row, state): what is sent instead of the peer's own row.
    note: a scalar of the state that travels with the message.
    message_ranks(state, round) -> the rank of each layer in the message, where a peer's ranks change from round to round.
    finalize(out, state, round) -> state: called last in every round, also where nobody was received; may write into the row.
    wire: the layout of the factors in a message, where that is another one; `outgoing` then makes a row of it,
    `message_ranks` is needed. diagnostics: names of scalars (float64) that `combine` puts into the state; zero in a round
    without neighbours. A peer that receives nothing keeps its bits. `facts`: further fields of the Rule.
    """
    slots = Slots(layout if wire is None else wire)
    packed = ranks is not None or message_ranks is not None

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        row = x
        if outgoing is not None:
            row, state = outgoing(x, state, round)
        meta = {} if note is None else {note: bits_of(state[note])}
        if packed:
            own = [ranks[round.peer]] * len(layout.pairs) if message_ranks is None else message_ranks(state, round)
            parts, meta = slots.cut(row, own), meta | {"ranks": torch.tensor(list(own))}
        else:
            parts = parts_of(row, layout, BOTH)
        return Message({**parts, **parts_of(x, layout, round.plan.sends - BOTH)}, meta), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, state = receive(x, inbox, state, round)
        return out, (state if finalize is None else finalize(out, state, round))

    def receive(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        silent = {name: torch.zeros((), dtype=torch.float64, device=x.device) for name in diagnostics}
        if len(inbox) == 1:
            return x.clone(), {**state, **silent}
        out, peers, others = x.clone(), tuple(sorted(inbox)), layout.present(round.plan.sends - BOTH)
        rows = slots.stack([inbox[j] for j in peers], packed)
        mean_of_groups(out, layout, others, inbox, round)
        notes = None if note is None else torch.stack([scalar_of(inbox[j].meta[note]) for j in peers]).to(x.device)
        weights = uploaded([round.weights[j] for j in peers], x, torch.float64)
        received = Received(peers, rows, weights, peers.index(round.peer), round,
                      {group: torch.stack([inbox[j].parts[group] for j in peers]) for group in others}, notes)
        return out, combine(out, received, state)

    def start(x: Tensor) -> State:
        return {**init(x), **{name: torch.zeros((), dtype=torch.float64, device=x.device) for name in diagnostics}}

    def readable(message: Message, own: Message, round: Round) -> bool:
        return same_shape(message, own, round.plan.sends - BOTH) and slots.readable(message)

    facts = {"readable": readable, **facts} if packed else facts
    return Rule(start, send, mix, **{"product": True, "changes_basis": True, "takes": frozenset({"pairs"}), **facts})


class Slots:
    """Messages of fewer slots than the layout has: only the numbers that their ranks fill."""

    def __init__(self, layout: Layout):
        self.layout, self.num_factors = layout, layout.length(BOTH)
        self._columns: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}

    def columns(self, ranks: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the first ranks[l] slots of each layer lie in A and in B of a row: ascending indices, made once for a device."""
        key = (tuple(ranks), device)
        if key not in self._columns:
            pairs = list(zip(self.layout.pairs, ranks, strict=True))
            in_a = [torch.arange(p.a, p.a + r * p.d_in) for p, r in pairs]
            in_b = [(p.b + torch.arange(p.d_out)[:, None] * p.rank + torch.arange(r)).flatten() for p, r in pairs]
            self._columns[key] = torch.cat(in_a).to(device), torch.cat(in_b).to(device)
        return self._columns[key]

    def cut(self, row: Tensor, ranks: Sequence[int]) -> dict[str, Tensor]:
        """A and B of those slots, as parts of a message."""
        return {group: row[where] for group, where in zip("AB", self.columns(ranks, row.device), strict=True)}

    def readable(self, message: Message) -> bool:
        """Whether its ranks are ranks of the layout, and the slots that they fill are there."""
        ranks, pairs = message.meta["ranks"].tolist(), self.layout.pairs
        if len(ranks) != len(pairs) or not all(0 <= rank <= pair.rank for rank, pair in zip(ranks, pairs, strict=True)):
            return False
        wanted = {"A": sum(r * p.d_in for r, p in zip(ranks, pairs, strict=True)),
                  "B": sum(r * p.d_out for r, p in zip(ranks, pairs, strict=True))}
        return all(message.parts[group].numel() == wanted[group] for group in "AB")

    def stack(self, messages: Sequence[Message], packed: bool) -> Tensor:
        """The factors (J, A and B) of J messages, zero in the slots that did not travel."""
        parts = [message.parts for message in messages]
        rows = parts[0]["A"].new_zeros(len(messages), self.num_factors)
        if not packed:
            for group in "AB":
                torch.stack([part[group] for part in parts], out=rows[:, self.layout.groups[group]])
            return rows
        for row, part, message in zip(rows, parts, messages, strict=True):
            ranks = message.meta["ranks"].tolist()
            for group, where in zip("AB", self.columns(ranks, row.device), strict=True):
                row[where] = part[group]
        return rows


def write_slots(out: Tensor, pairs: Sequence[Pair], a: Tensor, b: Tensor) -> None:
    """Put factors (L, r, I) and (L, O, r) of at most the layers' rank into a row, zeros into the other slots."""
    missing = pairs[0].rank - a.shape[-2]
    write_pairs(out, pairs, torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing)))
