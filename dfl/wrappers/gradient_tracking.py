"""Gradient tracking with local steps: every peer comes to follow the mean gradient of all."""

import torch
from torch import Tensor

from dfl.rules.base import weighted_mean
from dfl.slots import Inbox, Message, Round, Rule, State

PREFIX = "tracking."


def gradient_tracking(rule: Rule) -> Rule:
    """Add to every local gradient how far the neighbourhood's mean gradient is from the peer's own (K-GT).

    z_i = (x_i at the round's start - x_i after K steps) / (K lr);  c_i <- c_i - z_i + sum_j w_ij z_j, added to each
    local gradient of the next round. For doubly stochastic W the c_i sum to zero, so that the mean step is that of the
    rule; c_i tends to the mean gradient less the peer's own, which takes off what unequal data add to local steps. One
    more vector of the row's length travels. For plain SGD without momentum, clipping or schedule. Liu, Lin, Koloskova,
    Stich 2023, arXiv 2301.01313.
    """
    if not (rule.linear and rule.averages):
        raise ValueError("wrapper.name = 'gradient_tracking' needs a rule that averages rows as they are; allowed: average")

    def init(x: Tensor) -> State:
        return {**rule.init(x), **_own(x, torch.zeros_like(x))}

    def send(x: Tensor, state: State, round: Round) -> tuple[Message, State]:
        if round.lr <= 0 or round.local_steps < 1:
            raise ValueError(f"wrapper.name = 'gradient_tracking' needs the rate and the number of local steps, got lr = {round.lr} "
                             f"and local_steps = {round.local_steps}")
        message, inner = rule.send(x, state, round)
        z = (state[PREFIX + "start"] - x) / (round.local_steps * round.lr)
        return message._replace(parts={**message.parts, PREFIX + "z": z}), {**state, **inner}

    def mix(x: Tensor, inbox: Inbox, state: State, round: Round) -> tuple[Tensor, State]:
        out, inner = rule.mix(x, {j: _without(message) for j, message in inbox.items()}, state, round)
        own = (state[PREFIX + "start"] - x) / (round.local_steps * round.lr)
        mean = weighted_mean({j: message.parts[PREFIX + "z"] for j, message in inbox.items()}, round.weights)
        return out, {**inner, **_own(out, state[PREFIX + "correction"] - own + mean)}

    return rule._replace(init=init, send=send, mix=mix, correct=lambda state: state[PREFIX + "correction"])


def _own(x: Tensor, correction: Tensor) -> State:
    return {PREFIX + "start": x.clone(), PREFIX + "correction": correction}


def _without(message: Message) -> Message:
    return message._replace(parts={name: part for name, part in message.parts.items() if not name.startswith(PREFIX)})
