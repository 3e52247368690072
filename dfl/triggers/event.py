"""Speak when there is something to say: event-triggered gossip."""

import math

import torch
from torch import Tensor

from dfl.plugins import check_choice, check_count
from dfl.slots import Message, Round, State, Trigger

DECAYS = ("sqrt", "inverse", "constant")


def event(*, threshold: float = 1.0, decay: str = "sqrt", max_silence: int | None = None) -> Trigger:
    """Speak when the message has moved far enough from the one last sent (event-triggered gossip).

    Peer i sends its whole message m_i where ||m_i - m^_i|| >= tau_t, and then m^_i <- m_i; else its neighbours go on
    with m^_i. The norm is the Euclidean one over all parts, divided by the root of their number of elements, so that
    one threshold serves layers and ranks of any size. tau_t = threshold / sqrt(t + 1); with decay inverse, threshold /
    (t + 1); constant, which leaves a consensus error for ever. max_silence: a peer that was silent for so many rounds
    speaks whatever it has to say. What the peer itself holds is mixed with differences of what was last sent, m_i +
    sum_j w_ij (m^_j - m^_i), so that a doubly stochastic W keeps the network mean. Zhai, Yuan, Ni, Wang, Zhang, Li
    2026, arXiv 2602.19116; the largest silence and the norm are ours.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
        raise ValueError(f"trigger.threshold = {threshold!r} is not allowed; allowed: a number from 0")
    check_choice("trigger.decay", decay, DECAYS)
    if max_silence is not None:
        check_count("trigger.max_silence", max_silence)

    def limit(t: int) -> float:
        return threshold / {"sqrt": math.sqrt(t + 1), "inverse": t + 1, "constant": 1}[decay]

    def init(message: Message) -> State:
        return {"silence": torch.zeros((), dtype=torch.int64)}

    def decide(message: Message, state: State, round: Round) -> tuple[bool, State]:
        before = {name[5:]: value for name, value in state.items() if name.startswith("sent.")}
        speaks = before.keys() != message.parts.keys() or any(before[name].shape != part.shape for name, part in message.parts.items())
        speaks = speaks or bool(distance(message.parts, before) >= limit(round.t))
        speaks = speaks or (max_silence is not None and int(state["silence"]) >= max_silence)
        if not speaks:
            return False, state | {"silence": state["silence"] + 1}
        sent = {f"sent.{name}": part.clone() for name, part in message.parts.items()}
        return True, {"silence": torch.zeros_like(state["silence"]), **sent}

    return Trigger(init, decide, facts={"threshold": threshold, "decay": decay, "max_silence": max_silence})


def distance(parts, before) -> Tensor:
    """||m - m^|| over all parts by the root of their number of elements, float64."""
    squares = sum((part.double() - before[name].double()).square().sum() for name, part in parts.items())
    return (squares / max(1, sum(part.numel() for part in parts.values()))).sqrt()
