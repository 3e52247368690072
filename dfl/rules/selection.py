"""Rules that train or send only some of the slots: LoRA-A2 those that matter, Fed-PLoRA random ones.

Slot l is row l of A and column l of B: a module of rank 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.factors import Layout, a_view, b_view, stack_a, stack_b, write_pairs
from dfl.rules.alternating import phase, schedule
from dfl.rules.base import (
    BOTH,
    Inbox,
    Round,
    Rule,
    State,
    beside_factors,
    no_correction,
    no_state,
    read_groups,
    weighted_mean,
    write_groups,
)
from dfl.rules.products import check_share
from dfl.seeds import permutation


def lora_a2(layout: Layout, *, keep: float = 0.25, T: int = 1, head: str = "frozen") -> Rule:
    """Train B and A in turn and send only the slots whose change counts most (LoRA-A2 as gossip).

    G_i is what peer i holds in common with others, D_i = F_i - G_i what it has changed since and not sent, F the factor trained.
    Score of slot l in a phase of B: ||D_i[:, l]|| ||A_i[l]|| (of A: ||B_i[:, l]|| ||D_i[l]||), the norm of the change of the product.
    The best ceil(keep * slots) of all layers together travel;  G_i[l] <- G_i[l] + sum over those j that sent slot l of
    w_ij (F_j[l] - G_i[l]);  D_i[l] <- 0 where i sent it itself, and stays else;  F_i = G_i + D_i. With the complete graph this is
    the server with error memory: what was not sent is part of the next difference, so that idle peers agree. keep = 1 is `rolora`.
    Elsewhere which slots are exchanged differs from peer to peer, so that no mean is kept, and the frozen factor keeps its
    disagreement. Koo, Jang, Ok 2024, arXiv 2410.22815; the memory is ours.
    """
    check_share("rule.keep", keep)
    facts = schedule(T, None)
    also_trained, also_mixed = beside_factors(layout, head)
    also_cuts = layout.columns(also_mixed)
    num_kept = math.ceil(keep * sum(pair.rank for pair in layout.pairs))
    places = {"A": [torch.arange(p.a + l * p.d_in, p.a + (l + 1) * p.d_in) for p in layout.pairs for l in range(p.rank)],  # noqa: E741
              "B": [p.b + torch.arange(p.d_out) * p.rank + l for p in layout.pairs for l in range(p.rank)]}  # noqa: E741

    def columns(factor: str, sent: Tensor) -> Tensor:
        """Where the slots marked in `sent` (slots,) lie in a row."""
        chosen = [places[factor][slot] for slot in sent.nonzero().flatten().tolist()]
        return torch.cat([torch.zeros(0, dtype=torch.long), *chosen]).to(sent.device)

    def init(x: Tensor) -> State:
        return {"start": x.clone()}

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        factor = phase(round.t, T)
        order = scores(layout, x, state["start"], factor).argsort(descending=True, stable=True)
        sent = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, order[:num_kept], True)
        return torch.cat([sent.to(x), x[columns(factor, sent)], read_groups(x, also_cuts)]), state

    def readable(message: Tensor) -> bool:
        marks, num_slots = message[:len(places["A"])], len(places["A"])
        lengths = [len(message) - num_slots - layout.length(also_mixed) - len(columns(factor, marks > 0.5)) for factor in "AB"]
        return len(marks) == num_slots and bool(((marks == 0) | (marks == 1)).all()) and 0 in lengths

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        if len(inbox) == 1:  # what it sent has reached nobody, and stays part of the difference
            return x.clone(), state
        factor, num_slots, num_beside = phase(round.t, T), len(places["A"]), layout.length(also_mixed)
        rows, sent = {}, {}
        for peer, message in inbox.items():
            # what a peer does not send counts as the receiver's own G
            sent[peer] = columns(factor, message[:num_slots] > 0.5)
            rows[peer] = state["start"].clone()
            rows[peer][sent[peer]] = message[num_slots:num_slots + len(sent[peer])]
            if num_beside:
                write_groups(rows[peer], also_cuts, message[-num_beside:])
        mean, out, start = weighted_mean(rows, round.weights), x.clone(), state["start"].clone()
        changed, mine = torch.cat(list(sent.values())).unique(), sent[round.peer]
        start[changed] = mean[changed]
        out[changed] += start[changed] - state["start"][changed]
        out[mine] = start[mine]
        for cut in also_cuts:
            out[cut] = mean[cut]
        return out, {"start": start}

    return Rule(lambda t: frozenset(phase(t, T)) | also_trained, lambda t: frozenset(phase(t, T)) | also_mixed, lambda t: None, init,
                send, mix, no_correction, linear=False, facts={**facts, "keep": keep}, integers=len(places["A"]),
                readable=readable)


def scores(layout: Layout, x: Tensor, start: Tensor, factor: str) -> Tensor:
    """The norm of the change of the product by slot (slots,), layer by layer: the change of one factor times the size of the other."""
    found = {}
    for pairs in layout.shapes():
        a, b = stack_a(x, pairs), stack_b(x, pairs)
        if factor == "A":
            a = a - stack_a(start, pairs)
        else:
            b = b - stack_b(start, pairs)
        found |= zip((pair.name for pair in pairs), a.norm(dim=-1) * b.norm(dim=-2), strict=True)
    return torch.cat([found[pair.name] for pair in layout.pairs])


class Draws(NamedTuple):
    """Which of `num_slots` slots each peer trains in each round: a function of (seed, peer, t), the same in all layers.

    slots: how many, for every peer or by peer.
    """

    layout: Layout
    num_slots: int
    slots: int | Sequence[int]
    seed: int

    @property
    def counts(self) -> list[int]:
        """How many slots there may be in a message."""
        return [self.slots] if isinstance(self.slots, int) else sorted(set(self.slots))

    def chosen(self, t: int, peer: int) -> Tensor:
        """(R,) bool."""
        count = self.slots if isinstance(self.slots, int) else self.slots[peer]
        order = torch.from_numpy(permutation(self.num_slots, self.seed, "slots", peer, t))
        return torch.zeros(self.num_slots, dtype=torch.bool).index_fill_(0, order[:count], True)

    def mask(self, t: int, peer: int) -> Tensor:
        """The numbers of a row that the peer trains if their group is trained: (D,) bool, all of those that are no factor's."""
        mask, left_out = torch.ones(self.layout.size, dtype=torch.bool), ~self.chosen(t, peer)
        for pair in self.layout.pairs:
            a_view(mask, pair)[left_out] = False
            b_view(mask, pair)[:, left_out] = False
        return mask


def plora(layout: Layout, *, slots: int | Sequence[int] | None = None, seed: int = 0, head: str = "frozen",
          peers: int | None = None, rank: int | None = None) -> Rule:
    """Train a random part of the slots in every round and average each over those who trained it (Fed-PLoRA as gossip).

    S_j(t): the slots of peer j in round t, drawn from (seed, j, t), the same in all layers. For each l that somebody in N(i), i
    itself included, has trained:  A_i[l] <- sum_{j: l in S_j} w_ij A_j[l] / sum_{j: l in S_j} w_ij, and so B_i[:, l]; all other
    slots stay. Both ends know S_j(t): a message is r_j (O + I) numbers a layer, and no mask travels. One draw for all layers, so
    that the layers of a slot are trained together and each sends the same share.
    slots: how many a peer trains, r_j: a whole number from 1 to R, or a list with one a peer (unequal resources); none: half of R.

    With the complete graph and equal weights this is the server's method where peers start a round alike: all hear the same
    trainers, so that they end it alike. W = I changes nothing, slots = R is `lora`, a consensus is a fixed point. Who did not train
    a slot gives its own value no weight: the network mean of a slot is kept (W doubly stochastic) only in rounds in which all train
    it, and moves towards the trainers else. Weights that are not negative never widen the range of values over the peers.

    The slots outside S_i take part in the forward pass and do not move in the local phase, as if folded into the base. What a
    peer saves by folding is not simulated, only the bytes are: gradients and moments keep their full size, all gradients are
    computed, and lora.dropout falls on all slots. Zhang, Hu, Xu 2026, arXiv 2602.16936.
    """
    num_slots = one_rank(layout, rank)
    check_slots(slots, num_slots, peers)
    draws = Draws(layout, num_slots, max(1, num_slots // 2) if slots is None else slots, seed)
    also_trained, also_mixed = beside_factors(layout, head)
    also_cuts, num_beside = layout.columns(also_mixed), layout.length(also_mixed)

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        mine = draws.chosen(round.t, round.peer).nonzero().flatten().to(x.device)
        factors = [f.flatten() for pairs in layout.shapes() for f in (stack_a(x, pairs)[:, mine], stack_b(x, pairs)[..., mine])]
        return torch.cat([*factors, read_groups(x, also_cuts)]), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out = x.clone()
        if len(inbox) == 1:
            return out, state
        heard = sorted(inbox)
        chosen = torch.stack([draws.chosen(round.t, j) for j in heard])
        shares = slot_shares([round.weights[j] for j in heard], chosen).to(x)
        slots = [mine.nonzero().flatten().to(x.device) for mine in chosen]
        known, starts = shares.any(0).nonzero().flatten(), [0] * len(heard)
        for pairs in layout.shapes():
            a, b = stack_a(x, pairs), stack_b(x, pairs)
            a[:, known], b[..., known] = 0, 0
            for k, (j, share, mine) in enumerate(zip(heard, shares, slots, strict=True)):
                part, (num, d_in, d_out) = share[mine], (len(mine), pairs[0].d_in, pairs[0].d_out)
                sizes = [len(pairs) * num * d_in, len(pairs) * d_out * num]
                sent_a, sent_b = inbox[j][starts[k]:starts[k] + sum(sizes)].split(sizes)
                a[:, mine] += part[:, None] * sent_a.view(len(pairs), num, d_in)
                b[..., mine] += part * sent_b.view(len(pairs), d_out, num)
                starts[k] += sum(sizes)
            write_pairs(out, pairs, a, b)
        if also_cuts:
            write_groups(out, also_cuts, weighted_mean({j: inbox[j][-num_beside:] for j in heard}, round.weights))
        return out, state

    counts = draws.counts
    length = counts[0] * sum(pair.d_in + pair.d_out for pair in layout.pairs) + num_beside if len(counts) == 1 else None
    return Rule(lambda t: BOTH | also_trained, lambda t: BOTH | also_mixed, lambda t: length, no_state, send, mix, no_correction,
                linear=counts == [num_slots], facts={"slots": counts[0] if len(counts) == 1 else list(slots)}, masks=draws.mask)


def slot_shares(weights: Sequence[float], chosen: Tensor) -> Tensor:
    """What each of J messages contributes to each slot: (J, R) float64, columns that sum to one, zero where nobody trained the slot.

    weights: those of the J messages; chosen (J, R): who trained what.
    """
    shares = torch.tensor(weights, dtype=torch.float64)[:, None] * chosen
    total = shares.sum(0)
    return torch.where(total > 0, shares / torch.where(total > 0, total, torch.ones_like(total)), torch.zeros_like(shares))


def one_rank(layout: Layout, rank: int | None) -> int:
    """The rank R of all layers; `rank` for a layout without any, 0 where that is not given. ValueError where layers differ."""
    ranks = {pair.rank for pair in layout.pairs}
    if len(ranks) > 1:
        raise ValueError(f"rule.name = 'plora' draws the same slots in all layers, whose ranks are {sorted(ranks)}; allowed: one rank")
    return ranks.pop() if ranks else rank or 0


def check_slots(slots: object, rank: int, peers: int | None) -> None:
    """ValueError unless `slots` is none, a whole number from 1 to `rank` (0: not known) or a list of them, one a peer."""
    if slots is None:
        return
    many = isinstance(slots, list | tuple)
    counts = list(slots) if many else [slots]
    whole = all(isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= (rank or count) for count in counts)
    if not whole or not counts or (many and peers is not None and len(counts) != peers):
        raise ValueError(f"rule.slots = {slots!r} is not allowed; allowed: null (half of them), a whole number from 1 to "
                         f"{rank or 'lora.rank'}, or a list of {peers or 'them'}, one a peer")
