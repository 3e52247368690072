"""Gradient and momentum tracking with local steps: every peer comes to follow the mean gradient of all."""

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_fraction
from dfl.slots import Inbox, Message, Round, Rule, State
from dfl.wrappers.base import (
    after_correction,
    all_of,
    at_round,
    check_rates,
    check_rule,
    corrected,
    doubly_stochastic,
    mean_of_parts,
    num_steps,
    rate,
    with_parts,
    without_parts,
)

PREFIX = "tracking."
START, LAST, OFFSET, BUFFER, STEP = (PREFIX + name for name in ("start", "last", "offset", "buffer", "step."))


def gradient_tracking(rule: Rule, *, layout: Layout) -> Rule:
    """Follow the mean gradient of all in every local step: add how far it is from the peer's own (K-GT).

    K local steps x <- x - lr (g_i(x) + c_i); y_i = (x_i at the round's start - x_i after K steps) / (K lr), the mean
    of g_i + c_i; c_i <- c_i - y_i + sum_j w_ij y_j, c_i = 0 at first; x <- W x by the rule. All of them (D,). For
    doubly stochastic W, also one that changes from round to round, sum_i c_i = 0, so that the network mean moves by
    the mean step alone and sum_i y_i is the sum of the peers' own mean gradients; c_i tends to the mean gradient less
    the peer's own, which takes off what unequal data add to local steps. With K = 1 it is y <- W y + g_new - g_old, x
    <- W (x - lr y), the tracking of NEXT and SONATA. One more vector travels, lr y: two messages in one. c_i is taken
    off behind the optimiser's step: with SGD that is adding it to the gradient; with momentum, clipping or Adam the
    sums above still hold and peers follow the mean of what the optimisers do, of which exactness is not proven. Liu,
    Lin, Koloskova, Stich 2023, arXiv 2301.01313; K = 1: Di Lorenzo, Scutari 2016, arXiv 1602.00591.
    """
    return _tracking("gradient_tracking", rule, layout, 0.0)


def momentum_tracking(rule: Rule, *, layout: Layout, momentum: float = 0.9) -> Rule:
    """Follow the mean of all peers' momentum buffers (Momentum Tracking).

    u_i <- momentum u_i + g_i; y_i <- sum_j w_ij y_j + u_i - u_i before; x <- W (x - lr y). All (D,), with g_i the
    mean over K local steps, in each of which the peer takes off what y_i has beside its own gradient. sum_i y_i =
    sum_i u_i for doubly stochastic W. The buffer is the wrapper's, so that train.momentum stays 0. Takezawa, Bao,
    Niwa, Sato, Yamada 2022, arXiv 2209.15505, whose order of mixing and adding u is not known to us; momentum = 0 is
    gradient_tracking. Two messages in one.
    """
    check_fraction("wrapper.momentum", momentum)
    return _tracking("momentum_tracking", rule, layout, momentum)


def _tracking(name: str, rule: Rule, layout: Layout, momentum: float) -> Rule:
    check_rule(name, rule)

    def init(x: Tensor) -> State:
        own = {START: x.clone(), LAST: at_round(-1), OFFSET: torch.zeros_like(x)}
        return {**rule.init(x), **own, **({BUFFER: torch.zeros_like(x)} if momentum else {})}

    def after_step(x: Tensor, state: State, round: Round, k: int) -> Tensor:
        return after_correction(x, state[OFFSET], layout, round)

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        message, inner = rule.send(x, state, round)
        return with_parts(message, STEP, _step(x, state, round), layout, corrected(layout, round)), {**state, **inner}

    def _step(x: Tensor, state: State, round: Round) -> Tensor:
        return (state[START] - x) / num_steps(name, round, state, LAST)

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, inner = rule.mix(x, without_parts(inbox, STEP), state, round)
        groups, step = corrected(layout, round), _step(x, state, round)
        check_rates(name, round, [group for group in groups if step[layout.groups[group]].any()])
        offset, buffer = state[OFFSET].clone(), state[BUFFER].clone() if momentum else None
        for group in groups:
            cut, lr = layout.groups[group], rate(round, group)
            if not lr > 0:  # nobody moves
                continue
            own = step[cut] / lr - offset[cut]  # the mean of the peer's own gradients
            offset[cut] = mean_of_parts(inbox, STEP, group, round) / lr
            if momentum:
                buffer[cut] = momentum * buffer[cut] + own
                offset[cut] -= (1 - momentum) * buffer[cut]
            else:
                offset[cut] -= own
        kept = {START: out.clone(), LAST: at_round(round.t), OFFSET: offset, **({BUFFER: buffer} if momentum else {})}
        return out, {**inner, **kept}

    return rule._replace(init=init, send=send, mix=mix, after_step=after_step, conserves=True,
                         check=all_of(rule.check, doubly_stochastic(name)))
