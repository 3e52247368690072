"""Push-sum on directed graphs: senders divide what they have, a mass travels along, and each peer divides by its
own."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import GROUPS, Layout
from dfl.slots import EXACT, Inbox, Message, Round, Rule, State
from dfl.wrappers.base import (
    after_correction,
    all_of,
    at_round,
    check_rates,
    check_rule,
    corrected,
    mean_of_parts,
    num_steps,
    rate,
    with_parts,
    without_parts,
)
from dfl.wrappers.stability import name_of

START, MASS, LAST, OFFSET, STEP = (f"push.{name}" for name in ("start", "mass", "last", "offset", "step."))


def push_sum(rule: Rule, *, layout: Layout) -> Rule:
    """Average over one-way links by a mass that travels along (push-sum, SGP).

    W with columns that sum to one: sender j gives a_ij of what it has. z_i = x_i (D,) is what the model reads, m_i its
    mass, 1 at first, for each group that is exchanged; X_i = m_i z_i. Local steps move z_i, and X_i by as much: X_i <-
    X_i + z_i' - z_i;  X_i <- sum_j a_ij X_j, m_i <- sum_j a_ij m_j;  z_i <- X_i / m_i. sum_i m_i = N, and sum_i X_i
    moves by local steps alone, so that without them all z_i tend to the plain mean however uneven the graph. The mass
    is in the message, 40 bytes: no message may be lost, held back or rejected. Where rows sum to one as well
    m_i stays 1, and it is the rule as it is. Assran, Loizou, Ballas, Rabbat 2019, arXiv 1811.10792 (SGP).
    """
    name = "push_sum"
    check_rule(name, rule)

    def init(x: Tensor) -> State:
        return {**rule.init(x), START: x.clone(), MASS: torch.ones(len(GROUPS), dtype=torch.float64)}

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(_pushed(x, x, state, layout, round), state, round)
        return _with_mass(message, state), {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, inner = rule.mix(_pushed(x, x, state, layout, round), _without_mass(inbox), state, round)
        mass = _mixed_mass(inbox, state, layout, round)
        _divide(out, mass, layout, round)
        return out, {**inner, START: out.clone(), MASS: mass}

    return rule._replace(init=init, send=send, mix=mix, linear=False, columns=True, conserves=True, dated=True,
                         check=all_of(rule.check, _columns(name)))


def push_diging(rule: Rule, *, layout: Layout) -> Rule:
    """Track the mean gradient over one-way links (Push-DIGing): exact for unequal data on directed graphs.

    As push_sum, and c_i (D,), 0 at first, in every local step z <- z - lr (g_i(z) + c_i);  y_i = (z_i at the round's
    start - z_i after K steps) / (K lr);  X_i <- sum_j a_ij X_j - K lr y_i, combine then adapt;  c_i <- sum_j a_ij y_j -
    (y_i - c_i): with K = 1, y <- A y + g_new - g_old at z = X / m. sum_i y_i is the sum of the peers' own mean
    gradients. Its steps have to be smaller than those of push_sum: it is stable on a directed ring of eight at a fifth
    of the rate. Two messages in one, and the mass. Nedic, Olshevsky, Shi 2017, arXiv 1607.03218, with local steps as
    K-GT has them.
    """
    name = "push_diging"
    check_rule(name, rule)

    def init(x: Tensor) -> State:
        return {**rule.init(x), START: x.clone(), MASS: torch.ones(len(GROUPS), dtype=torch.float64), LAST: at_round(-1),
                OFFSET: torch.zeros_like(x)}

    def after_step(x: Tensor, state: State, round: Round, k: int) -> Tensor:
        return after_correction(x, state[OFFSET], layout, round)

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(_pushed(x, state[START], state, layout, round), state, round)
        step = (state[START] - x) / num_steps(name, round, state, LAST)
        message = with_parts(message, STEP, step, layout, corrected(layout, round))
        return _with_mass(message, state), {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        own = _pushed(x, state[START], state, layout, round)
        out, inner = rule.mix(own, without_parts(_without_mass(inbox), STEP), state, round)
        steps, mass, offset = num_steps(name, round, state, LAST), _mixed_mass(inbox, state, layout, round), state[OFFSET].clone()
        moved = state[START] - x
        check_rates(name, round, [group for group in corrected(layout, round) if moved[layout.groups[group]].any()])
        for group in corrected(layout, round):
            cut, lr = layout.groups[group], rate(round, group)
            out[cut] -= moved[cut]
            if lr > 0:
                offset[cut] += (mean_of_parts(inbox, STEP, group, round) - moved[cut] / steps) / lr
        _divide(out, mass, layout, round)
        return out, {**inner, START: out.clone(), MASS: mass, LAST: at_round(round.t), OFFSET: offset}

    return rule._replace(init=init, send=send, mix=mix, after_step=after_step, linear=False, columns=True, conserves=True,
                         dated=True, check=all_of(rule.check, _columns(name)))


def _pushed(x: Tensor, base: Tensor, state: State, layout: Layout, round: Round) -> Tensor:
    """X of the groups that are exchanged: m start + base - start, which is `base` to the bit where m = 1."""
    out = x.clone()
    for group in layout.present(round.plan.sends):
        cut = layout.groups[group]
        out[cut] = base[cut] + (float(state[MASS][GROUPS.index(group)]) - 1) * state[START][cut]
    return out


def _with_mass(message: Message, state: State) -> Message:
    return message._replace(meta={**message.meta, MASS: state[MASS].view(torch.int64)})


def _without_mass(inbox: Inbox) -> Inbox:
    return {j: message._replace(meta={name: value for name, value in message.meta.items() if name != MASS})
            for j, message in inbox.items()}


def _mixed_mass(inbox: Inbox, state: State, layout: Layout, round: Round) -> Tensor:
    """sum_j a_ij m_j of the groups that are exchanged; the others keep theirs. Masses travel as they are, whatever
    the codec."""
    mixed = torch.zeros_like(state[MASS])
    for j in sorted(inbox):
        if j != EXACT:  # own mass, as under the own id: its weights come together there
            weight = round.weights[j] + (round.weights.get(EXACT, 0.0) if j == round.peer else 0.0)
            mixed += weight * inbox[j].meta[MASS].view(torch.float64)
    sent = torch.tensor([group in layout.present(round.plan.sends) for group in GROUPS])
    return torch.where(sent, mixed, state[MASS])


def _divide(out: Tensor, mass: Tensor, layout: Layout, round: Round) -> None:
    for group in layout.present(round.plan.sends):
        out[layout.groups[group]] /= float(mass[GROUPS.index(group)])


def _columns(name: str) -> Callable[[object], None]:
    """ValueError for a topology whose columns do not sum to one: mass would be made or lost."""
    def check(topology) -> None:
        sums = getattr(topology, "sums", None)
        if sums is None:
            w = np.asarray(topology.matrix(0))
            sums = "column" if np.allclose(w.sum(0), 1, rtol=0, atol=1e-9) else "row"
        if sums not in ("column", "doubly"):
            raise ValueError(f"wrapper.name = {name!r} needs W(t) whose columns sum to one; topology.name = {name_of(topology)!r} is "
                             f"{sums}-stochastic; allowed: weights: push_sum, or weights that are doubly stochastic")
    return check
