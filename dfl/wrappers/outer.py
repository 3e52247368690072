"""Outer steps: what a round of local training and mixing did is a gradient for a second, slower optimiser."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_fraction
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import all_of, check_rule
from dfl.wrappers.stability import TOLERANCE, Mix, growth, mean_square, moments, name_of

START, BUFFER = "outer.start", "outer.buffer"


def outer(rule: Rule, *, layout: Layout, lr: float = 0.7, momentum: float = 0.5) -> Rule:
    """Take what local steps and mixing did as a gradient of a slower optimiser with momentum (NoLoCo, DiLoCo).

    phi_i = x_i at the round's start, p_i = x_i after the local steps; m_i <- momentum m_i + lr (sum_j w_ij p_j -
    phi_i); x_i <- phi_i + m_i, for the groups that are exchanged. All (D,), m_i = 0 at first. That is NoLoCo's
    momentum m + lr mean(p - phi) + lr (mean(phi) - phi), so that p alone has to travel: one message, as without. lr =
    1 with momentum 0 is the rule as it is. On a complete graph it is DiLoCo; the network mean moves as its model.
    Pairs (lr, momentum) under which disagreement grows by itself are refused: in the mean square where W(t) are
    independent draws (at momentum 0.5, pairs allow lr below 1.5; at 0.9 below 0.38), over the run's own W(t)
    elsewhere. Kolehmainen et al. 2025, arXiv 2506.10911 (lr 0.7, momentum 0.5, pairs); Douillard et al. 2023, arXiv
    2311.08105 (DiLoCo, with Nesterov's momentum).
    """
    name = "outer"
    check_rule(name, rule)
    check_fraction("wrapper.momentum", momentum)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr <= 4:
        raise ValueError(f"wrapper.lr = {lr!r} is not allowed; allowed: a number above 0, up to 4")

    def init(x: Tensor) -> State:
        return {**rule.init(x), START: x.clone(), BUFFER: torch.zeros_like(x)}

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(x, state, round)
        return message, {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, inner = rule.mix(x, inbox, state, round)
        buffer = state[BUFFER].clone()
        for group in layout.present(round.plan.sends):
            cut = layout.groups[group]
            start = state[START][cut]
            # start + momentum m + lr (out - start), which for lr = 1 and momentum 0 is `out` to the bit
            new = torch.lerp(start, out[cut], lr) + momentum * buffer[cut]
            buffer[cut] = new - start
            out[cut] = new
        return out, {**inner, START: out.clone(), BUFFER: buffer}

    return rule._replace(init=init, send=send, mix=mix, linear=False,
                         check=all_of(rule.check, _stable(name, lr, momentum)))


def _stable(name: str, lr: float, momentum: float) -> Callable[[object], None]:
    def recursion(mix: Mix, t: int, state: np.ndarray) -> np.ndarray:
        x, m = state
        m = momentum * m + lr * (mix(x) - x)
        return np.stack([x + m, m])

    def check(topology) -> None:
        if getattr(topology, "exchangeable", False):
            factor = mean_square(momentum, lr, *moments(topology)) ** 0.5
        else:
            factor = growth(topology, recursion, 2)
        if factor > TOLERANCE:
            raise ValueError(f"wrapper.lr = {lr} with wrapper.momentum = {momentum} is unstable on topology.name = "
                             f"{name_of(topology)!r}: disagreement grows by {factor:.3f} a round; allowed: less of both, as "
                             "lr 0.7 with momentum 0.5")
    return check
