"""The blocks that stragglers reached, mixed one by one (SALF as gossip)."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_choice, check_number
from dfl.rules.base import same_shape
from dfl.schedules.depths import Depths
from dfl.schedules.stragglers import ESTIMATORS
from dfl.slots import Inbox, Message, Round, Rule, State

LINKS = ("sent", "mutual")


def salf(layout: Layout, *, links: str = "sent", speed: str = "uniform", deadline: float | None = None,
         seconds: float | Sequence[float] = 1.0, share: float = 1.0, late: str = "blocks", estimator: str = "step",
         largest: float = 5.0, seed: int = 0, peers: int | None = None) -> Rule:
    """Send the blocks that a peer reached before the deadline, and average each over those who reached it (SALF as gossip).

    x_i^l <- x_i^l + sum_{j in S_l} w_ij (x_j^l - x_i^l), (D_l,), block by block; S_l: the neighbours whose message holds
    block l, nested, as who sent a block sent all behind it. links sent: all of them; mutual: those among them where i
    reached l as well, which keeps the network mean of every block for symmetric W. With sent, who is late still follows
    the others, but does not hold them back: the mean moves by more than the mean step. Where sending is not what is
    slow, `rule: average` under the same schedule sends all, and keeps the mean. All reach all: the plain average, to
    the bit.

    What makes up for who is missing is `estimator`: step, the schedule's own correction of the local update. paper, the
    server's: ((mean of block l over those of S_l and i that reached it) - p_l x_i^l before the round) / (1 - p_l), p_l =
    prod_j (1 - q_j^l) that nobody does, at most `largest` for 1 / (1 - p_l); where nobody did, the block stays. On the
    complete graph with equal weights its mean over the depths is the full average; p_l = (1 - l / L)^U for U peers with
    uniform depths. code, what the authors' program does: the value before the round in place of every block that is
    missing, so that a step shrinks to |S_l| / U of itself. none. Lang, Cohen, Shlezinger 2024, arXiv 2403.18375.
    """
    check_choice("rule.estimator", estimator, ESTIMATORS)
    check_choice("rule.links", links, LINKS)
    check_number("rule.largest", largest, least=1.0)
    depths = Depths(layout, speed=speed, deadline=deadline, seconds=seconds, share=share, late=late, seed=seed, peers=peers)
    known: dict[tuple[str, int], Tensor] = {}

    def places(group: str, depth: int) -> Tensor:
        """Which numbers of a group lie in the last `depth` blocks."""
        if (group, depth) not in known:
            known[group, depth] = depths.reached(depth)[layout.groups[group]].nonzero().flatten()
        return known[group, depth]

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        depth = reached(round)
        parts = {group: x[layout.groups[group]][places(group, depth).to(x.device)] for group in layout.present(round.plan.sends)}
        return Message(parts, {"depth": torch.tensor([depth])}), state

    def reached(round: Round) -> int:
        """How deep the peer's own plan goes: all blocks where it masks none."""
        return depths.num_blocks if round.plan.mask is None else depths.depth(round.t, round.peer)

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out = x.clone()
        if len(inbox) > 1:
            deep, mine = {j: int(message.meta["depth"]) for j, message in inbox.items()}, reached(round)
            for group in layout.present(round.plan.sends):
                cut = layout.groups[group]
                sent = {j: (places(group, deep[j]).to(x.device), inbox[j].parts[group]) for j in sorted(inbox)}
                if estimator == "paper":
                    out[cut] = as_server(sent, state["start"][cut], x[cut], round.weights, bound(group, inbox))
                elif estimator == "code":
                    out[cut] = filled_mean(sent, state["start"][cut], round.weights)
                else:
                    base = x[cut].clone()
                    base[sent[round.peer][0]] = sent[round.peer][1]  # as the others know it
                    both = places(group, mine).to(x.device) if links == "mutual" else None
                    out[cut] = filled_mean(sent, base, round.weights, x[cut], both)
        return out, {"start": out.clone()} if state else state

    def bound(group: str, inbox: Inbox) -> Tensor:
        """1 / (1 - p_l) of every number of a group, at most `largest`."""
        missed = [math.prod(1 - depths.reach(j)[block] for j in inbox) for block in range(depths.num_blocks)]
        factors = [min(1 / (1 - p), largest) if p < 1 else 1.0 for p in missed]
        return torch.tensor([1.0, *factors])[depths.block_of[layout.groups[group]]]

    def readable(message: Message, own: Message, round: Round) -> bool:
        if message.parts.keys() != own.parts.keys() or message.meta.keys() != own.meta.keys() or not same_shape(message, own, ()):
            return False
        depth = message.meta["depth"]
        return depth.numel() == 1 and 0 <= int(depth) <= depths.num_blocks and all(
            part.numel() == len(places(group, int(depth))) for group, part in message.parts.items())

    keeps_start = estimator in ("paper", "code")
    return Rule(lambda x: {"start": x.clone()} if keeps_start else {}, send, mix, averages=not keeps_start, takes=frozenset({"pairs"}),
                dated=True, readable=readable, index=frozenset({"depth"}), facts={"links": links})


Sent = Mapping[int, tuple[Tensor, Tensor]]  # by peer, which numbers it sent, and what they are


def filled_mean(sent: Sent, base: Tensor, weights: Mapping[int, float], own: Tensor | None = None,
                both: Tensor | None = None) -> Tensor:
    """sum_j w_j m_j with `base` for the numbers that are missing, in ascending peer id. both: the only numbers that are mixed.

    own: what stays of the numbers that are in no message but ones that `base` is made of; base if not given.
    """
    total: Tensor | None = None
    for j, (at, values) in sent.items():
        full = values if len(at) == len(base) else base.index_put((at,), values)
        total = full * float(weights[j]) if total is None else total.add_(full, alpha=float(weights[j]))
    assert total is not None
    if own is None:
        return total
    touched = torch.zeros(len(base), dtype=torch.bool, device=base.device)
    for at, _ in sent.values():
        touched[at] = True
    if both is not None:
        touched &= torch.zeros_like(touched).index_fill_(0, both, True)
    return total if bool(touched.all()) else torch.where(touched, total, own)


def as_server(sent: Sent, start: Tensor, own: Tensor, weights: Mapping[int, float], factors: Tensor) -> Tensor:
    """start + (weighted mean of what was sent - start) / (1 - p), for each number that anybody sent; the own for the others."""
    total, mass = torch.zeros_like(start), torch.zeros_like(start)
    for j, (at, values) in sent.items():
        total[at] += float(weights[j]) * values
        mass[at] += float(weights[j])
    mean = total / torch.where(mass > 0, mass, torch.ones_like(mass))
    return torch.where(mass > 0, start + factors.to(start) * (mean - start), own)
