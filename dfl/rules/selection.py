"""Rules that train or send only some of the slots: LoRA-A2 those that matter, Fed-PLoRA random ones.

Slot l is row l of A and column l of B: a module of rank 1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, stack_a, stack_b, write_pairs
from dfl.plugins import check_share
from dfl.rules.base import BOTH, mean_of_groups, no_state, parts_of, same_shape, weighted_mean
from dfl.schedules.random_slots import draws_of
from dfl.slots import Inbox, Message, Round, Rule, State


def lora_a2(layout: Layout, *, keep: float = 0.25) -> Rule:
    """Send only the slots of the factor trained whose change counts most (LoRA-A2 as gossip).

    G_i is what peer i holds in common with others, D_i = F_i - G_i what it has changed since and not sent, F the factor trained.
    Score of slot l in a phase of B: ||D_i[:, l]|| ||A_i[l]|| (of A: ||B_i[:, l]|| ||D_i[l]||), the norm of the change of the product.
    The best ceil(keep * slots) of all layers together travel;  G_i[l] <- G_i[l] + sum over those j that sent slot l of
    w_ij (F_j[l] - G_i[l]);  D_i[l] <- 0 where i sent it itself, and stays else;  F_i = G_i + D_i. With the complete graph this is
    the server with error memory: what was not sent is part of the next difference, so that idle peers agree. keep = 1 is `rolora`.
    Elsewhere which slots are exchanged differs from peer to peer, so that no mean is kept, and the frozen factor keeps its
    disagreement. Koo, Jang, Ok 2024, arXiv 2410.22815; the memory is ours.
    """
    check_share("rule.keep", keep)
    num_kept = math.ceil(keep * sum(pair.rank for pair in layout.pairs))
    places = {"A": [torch.arange(p.a + l * p.d_in, p.a + (l + 1) * p.d_in) for p in layout.pairs for l in range(p.rank)],  # noqa: E741
              "B": [p.b + torch.arange(p.d_out) * p.rank + l for p in layout.pairs for l in range(p.rank)]}  # noqa: E741

    def columns(factor: str, sent: Tensor) -> Tensor:
        """Where the slots numbered in `sent` lie in a row."""
        return torch.cat([torch.zeros(0, dtype=torch.long), *(places[factor][slot] for slot in sent.tolist())])

    def init(x: Tensor) -> State:
        return {"start": x.clone()}

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        factor = active(round)
        order = scores(layout, x, state["start"], factor).argsort(descending=True, stable=True)
        sent = order[:num_kept].sort().values.cpu()
        return Message({"slots": x[columns(factor, sent)], **parts_of(x, layout, round.plan.sends - BOTH)}, {"slots": sent}), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        if len(inbox) == 1:  # what it sent has reached nobody, and stays part of the difference
            return x.clone(), state
        factor, rows, sent = active(round), {}, {}
        for peer, message in inbox.items():
            # what a peer does not send counts as the receiver's own G
            sent[peer] = columns(factor, message.meta["slots"])
            rows[peer] = state["start"].clone()
            rows[peer][sent[peer]] = message.parts["slots"]
        mean, out, start = weighted_mean(rows, round.weights), x.clone(), state["start"].clone()
        changed, mine = torch.cat(list(sent.values())).unique(), sent[round.peer]
        start[changed] = mean[changed]
        out[changed] += start[changed] - state["start"][changed]
        out[mine] = start[mine]
        mean_of_groups(out, layout, round.plan.sends - BOTH, inbox, round)
        return out, {"start": start}

    def readable(message: Message, own: Message, round: Round) -> bool:
        if not same_shape(message, own, round.plan.sends - BOTH):
            return False
        slots = message.meta["slots"]
        good = bool(((slots >= 0) & (slots < len(places["A"]))).all()) and len(slots.unique()) == len(slots)
        return good and message.parts["slots"].numel() == len(columns(active(round), slots))

    return Rule(init, send, mix, takes=frozenset({"active"}), dated=True, readable=readable, index=frozenset({"slots"}),
                facts={"keep": keep})


def active(round: Round) -> str:
    """The one factor that the plan has exchanged."""
    (factor,) = round.plan.sends & BOTH
    return factor


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


def plora(layout: Layout, *, slots: int | Sequence[int] | None = None, seed: int = 0,
          peers: int | None = None, rank: int | None = None) -> Rule:
    """Train a random part of the slots in every round and average each over those who trained it (Fed-PLoRA as gossip).

    S_j(t): the slots of peer j in round t, drawn from (seed, j, t), the same in all layers. For each l that somebody in N(i), i
    itself included, has trained:  A_i[l] <- sum_{j: l in S_j} w_ij A_j[l] / sum_{j: l in S_j} w_ij, and so B_i[:, l]; all other
    slots stay. Both ends know S_j(t): a message is r_j (O + I) numbers a layer, and no mask travels. One draw for all layers, so
    that the layers of a slot are trained together and each sends the same share.
    slots: how many a peer trains, r_j: a whole number from 1 to R, or a list with one a peer (unequal resources); none: half of R.

    With the complete graph and equal weights this is the server's method where peers start a round alike: all receive the same
    trainers, so that they end it alike. W = I changes nothing, slots = R is `lora`, a consensus is a fixed point. Who did not train
    a slot gives its own value no weight: the network mean of a slot is kept (W doubly stochastic) only in rounds in which all train
    it, and moves towards the trainers else. Weights that are not negative never widen the range of values over the peers.

    The slots outside S_i take part in the forward pass and do not move in the local phase, as if folded into the base. What a
    peer saves by folding is not simulated, only the bytes are: gradients and moments keep their full size, all gradients are
    computed, and lora.dropout falls on all slots. Zhang, Hu, Xu 2026, arXiv 2602.16936.
    """
    draws = draws_of(layout, slots, seed, peers, rank, "rule.slots")

    def send(x: Tensor, state: State, round: Round) -> tuple[Tensor, State]:
        mine = draws.chosen(round.t, round.peer).nonzero().flatten().to(x.device)
        factors = [f.flatten() for pairs in layout.shapes() for f in (stack_a(x, pairs)[:, mine], stack_b(x, pairs)[..., mine])]
        return Message({"slots": torch.cat(factors), **parts_of(x, layout, round.plan.sends - BOTH)}), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out = x.clone()
        if len(inbox) == 1:
            return out, state
        received = sorted(inbox)
        chosen = torch.stack([draws.chosen(round.t, j) for j in received])
        shares = slot_shares([round.weights[j] for j in received], chosen).to(x)
        slots = [mine.nonzero().flatten().to(x.device) for mine in chosen]
        known, starts = shares.any(0).nonzero().flatten(), [0] * len(received)
        for pairs in layout.shapes():
            a, b = stack_a(x, pairs), stack_b(x, pairs)
            a[:, known], b[..., known] = 0, 0
            for k, (j, share, mine) in enumerate(zip(received, shares, slots, strict=True)):
                part, (num, d_in, d_out) = share[mine], (len(mine), pairs[0].d_in, pairs[0].d_out)
                sizes = [len(pairs) * num * d_in, len(pairs) * d_out * num]
                sent_a, sent_b = inbox[j].parts["slots"][starts[k]:starts[k] + sum(sizes)].split(sizes)
                a[:, mine] += part[:, None] * sent_a.view(len(pairs), num, d_in)
                b[..., mine] += part * sent_b.view(len(pairs), d_out, num)
                starts[k] += sum(sizes)
            write_pairs(out, pairs, a, b)
        mean_of_groups(out, layout, round.plan.sends - BOTH, inbox, round)
        return out, state

    counts = draws.counts
    facts = {"slots": counts[0] if len(counts) == 1 else list(slots)}
    lengths = {count * sum(pair.d_in + pair.d_out for pair in layout.pairs) for count in counts}

    def readable(message: Message, own: Message, round: Round) -> bool:
        return same_shape(message, own, round.plan.sends - BOTH) and message.parts["slots"].numel() in lengths

    return Rule(no_state, send, mix, takes=frozenset({"pairs"}), dated=True, readable=readable, facts=facts)


def slot_shares(weights: Sequence[float], chosen: Tensor) -> Tensor:
    """What each of J messages contributes to each slot: (J, R) float64, columns that sum to one, zero where nobody trained the slot.

    weights: those of the J messages; chosen (J, R): who trained what.
    """
    shares = torch.tensor(weights, dtype=torch.float64)[:, None] * chosen
    total = shares.sum(0)
    return torch.where(total > 0, shares / torch.where(total > 0, total, torch.ones_like(total)), torch.zeros_like(shares))
