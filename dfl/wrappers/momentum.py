"""Momentum that follows the consensus, and not each peer's own data (quasi-global momentum)."""

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_fraction
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import after_correction, at_round, check_rates, check_rule, corrected, num_steps, rate

START, LAST, BUFFER = (f"quasi_global.{name}" for name in ("start", "last", "buffer"))


def quasi_global(rule: Rule, *, layout: Layout, momentum: float = 0.9, keep: float | None = None) -> Rule:
    """Take a momentum from where the consensus went, not from the peer's own gradients (QG-DSGDm).

    K local steps x <- x - lr (g_i(x) + momentum m_i); x <- W x by the rule; m_i <- keep m_i + (1 - keep) (x_i at
    the round's start - x_i after the mix) / (K lr). All (D,), m_i = 0 at first; keep: momentum unless given. The
    network mean moves by the mean step alone. The fixed points are those of plain gossip, where m_i = 0: unequal data
    still pull peers apart, but momentum no longer multiplies that. momentum = 0 is the rule as it is. m_i is taken
    off behind the optimiser's step, so that train.momentum stays 0. Lin, Karimireddy, Stich, Jaggi 2021, arXiv
    2102.04761, where K = 1. One message, as without.
    """
    name = "quasi_global"
    check_rule(name, rule)
    check_fraction("wrapper.momentum", momentum)
    keep = momentum if keep is None else keep
    check_fraction("wrapper.keep", keep)

    def init(x: Tensor) -> State:
        return {**rule.init(x), START: x.clone(), LAST: at_round(-1), BUFFER: torch.zeros_like(x)}

    def after_step(x: Tensor, state: State, round: Round, k: int) -> Tensor:
        return after_correction(x, state[BUFFER], layout, round, momentum)

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(x, state, round)
        return message, {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, inner = rule.mix(x, inbox, state, round)
        buffer, steps = state[BUFFER].clone(), num_steps(name, round, state, LAST)
        check_rates(name, round, [group for group in corrected(layout, round)
                                  if not torch.equal(x[layout.groups[group]], state[START][layout.groups[group]])])
        for group in corrected(layout, round):
            cut, lr = layout.groups[group], rate(round, group)
            if lr > 0:
                buffer[cut] = keep * buffer[cut] + (1 - keep) / (steps * lr) * (state[START][cut] - out[cut])
        return out, {**inner, START: out.clone(), LAST: at_round(round.t), BUFFER: buffer}

    return rule._replace(init=init, send=send, mix=mix, after_step=after_step, linear=False)
