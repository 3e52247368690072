"""Rules that send only the slots that matter: LoRA-A2."""

import math

import torch
from torch import Tensor

from dfl.factors import Layout, stack_a, stack_b
from dfl.rules.alternating import phase, schedule
from dfl.rules.base import Inbox, Round, Rule, State, beside_factors, no_correction, read_groups, weighted_mean, write_groups
from dfl.rules.products import check_share


def lora_a2(layout: Layout, *, keep: float = 0.25, T: int = 1, head: str = "frozen") -> Rule:
    """Train B and A in turn and send only the slots whose change counts most (LoRA-A2 as gossip).

    Score of slot l in a phase of B: ||dB[:, l]|| ||A[l]||, dB what the round's training changed (of A: ||B[:, l]|| ||dA[l]||): the
    norm of the change of the product. The best ceil(keep * slots) of all layers together travel;  F_i[l] <- F_i[l] + sum over those j
    that sent slot l of w_ij (F_j[l] - F_i[l]), F the factor trained. keep = 1 is `rolora`. Which slots are exchanged differs from
    peer to peer, so that no mean is kept, and the frozen factor keeps its disagreement. Koo, Jang, Ok 2024, arXiv 2410.22815.
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
        parts = [sent.to(x), x[columns(factor, sent)], *([read_groups(x, also_cuts)] if also_cuts else [])]
        return torch.cat(parts), state

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        factor, num_slots, num_beside = phase(round.t, T), len(places["A"]), layout.length(also_mixed)
        out, rows, heard = x.clone(), {}, []
        for peer, message in inbox.items():
            # what a neighbour does not send counts as the peer's own
            rows[peer] = x.clone()
            if peer != round.peer:
                where = columns(factor, message[:num_slots] > 0.5)
                rows[peer][where] = message[num_slots:num_slots + len(where)]
                heard.append(where)
            if num_beside:
                write_groups(rows[peer], also_cuts, message[-num_beside:])
        if heard:
            mean = weighted_mean(rows, round.weights)
            for cut in (torch.cat(heard), *also_cuts):
                out[cut] = mean[cut]
        return out, {"start": out.clone()}

    return Rule(lambda t: frozenset(phase(t, T)) | also_trained, lambda t: frozenset(phase(t, T)) | also_mixed, lambda t: None, init,
                send, mix, no_correction, linear=False, facts={**facts, "keep": keep})


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
