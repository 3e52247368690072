"""Mixing that grows weaker as the learning rate falls, so that peers do not agree too early (adaptive consensus)."""

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_share
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import check_rule

LARGEST = "adaptive.largest_rate"


def adaptive_consensus(rule: Rule, *, layout: Layout, gamma: float = 1.0, power: float = 1.0) -> Rule:
    """Mix less as the learning rate falls, so that peers keep a disagreement to the end (DSGD-AC).

    x_i <- x_i + gamma_t sum_j w_ij (x_j - x_i), (D,);  gamma_t = gamma (lr_t / largest lr so far)^power, the same at
    every peer. Under plain gossip disagreement is of the size of lr_t and vanishes with it; with power = 1 mixing falls
    as fast as the steps do, so that it stays. The mean of all models, the one to use, profits: peers around it look for
    flat minima. The network mean moves by the mean step alone. power = 0 and gamma = 1, or a constant rate, is the rule
    as it is. One message, as without. Wang, Johansson 2026, arXiv 2602.02899, whose exact gamma_t is not known to us:
    that it scales with time and keeps the disagreement is, this one ties it to the rate.
    """
    check_rule("adaptive_consensus", rule)
    check_share("wrapper.gamma", gamma)
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power <= 4:
        raise ValueError(f"wrapper.power = {power!r} is not allowed; allowed: a number from 0 to 4")

    def init(x: Tensor) -> State:
        return {**rule.init(x), LARGEST: torch.zeros(1, dtype=torch.float64)}

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(x, state, round)
        return message, {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, inner = rule.mix(x, inbox, state, round)
        largest = max(float(state[LARGEST]), round.lr)
        share = gamma * ((round.lr / largest) ** power if largest else 1.0)
        for cut in layout.columns(round.plan.sends):
            out[cut] = torch.lerp(x[cut], out[cut], share)
        return out, {**inner, LARGEST: torch.full_like(state[LARGEST], largest)}

    return rule._replace(init=init, send=send, mix=mix, linear=False)
