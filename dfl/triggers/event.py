"""Speak when there is something to say: event-triggered gossip."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_choice, check_count, check_number
from dfl.slots import Message, Round, State, Trigger
from dfl.triggers.distance import distance, product_distance

DECAYS = ("sqrt", "inverse", "constant")
NORMS = ("factors", "product")
STARTS = ("sent", "common")


def event(*, threshold: float = 1.0, decay: str = "sqrt", norm: str = "factors", start: str = "sent", max_silence: int | None = None,
          layout: Layout | None = None) -> Trigger:
    """Speak when the message has moved far enough from the one last sent (event-triggered gossip).

    Peer i sends its whole message m_i where ||m_i - m^_i|| >= tau_t, and then m^_i <- m_i; else its neighbours go on
    with m^_i, of which each holds a copy; who becomes a neighbour is sent all of m^_i. tau_t = threshold / sqrt(t + 1);
    with decay inverse, threshold / (t + 1); constant, which leaves a consensus error for ever. norm factors: the
    Euclidean one over all parts by the root of their number of elements, so that one threshold serves layers and ranks
    of any size; product: ||scaling (B A - B^ A^)||_F over all layers together, which does not see what leaves B A as it
    is. start common: all know the values that the run starts from, and nobody sends them. max_silence: a peer that was
    silent for so many rounds speaks whatever it has to say.

    What the peer itself holds is mixed with differences of what its neighbours hold, m_i + sum_j w_ij (m^_ji - m^_ij),
    m^_ij what j holds of i: it moves only where a message has arrived, and what was lost is sent again. A symmetric W
    keeps the network mean under every loss, a doubly stochastic one without. Zhai, Yuan, Ni, Wang, Zhang, Li 2026,
    arXiv 2602.19116; the copies by link, the largest silence and the norms are ours.
    """
    check_number("trigger.threshold", threshold)
    check_choice("trigger.decay", decay, DECAYS)
    check_choice("trigger.norm", norm, NORMS)
    check_choice("trigger.start", start, STARTS)
    if max_silence is not None:
        check_count("trigger.max_silence", max_silence)

    def limit(t: int) -> float:
        return threshold / {"sqrt": math.sqrt(t + 1), "inverse": t + 1, "constant": 1}[decay]

    def moved(parts: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
        if norm != "product":
            return float(distance(parts, before))
        assert layout is not None  # the run gives it
        return product_distance(parts, before, layout)

    return held_until(moved, lambda round: limit(round.t), max_silence, common_start=start == "common", pairs=norm == "product",
                      facts={"threshold": threshold, "decay": decay, "norm": norm, "max_silence": max_silence})


def held_until(moved: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], float], limit: Callable[[Round], float],
               max_silence: int | None, **traits: Any) -> Trigger:
    """A trigger that speaks where moved(parts, parts that others know) >= limit(round), and at the latest after `max_silence` rounds.

    What others know is what was last sent; with a codec of differences their copies, so that what it left out is news still.
    """
    common = traits.get("common_start", False)

    def init(message: Message) -> State:
        return _after(message, torch.zeros((), dtype=torch.int64)) if common else {"silence": torch.zeros((), dtype=torch.int64)}

    def decide(message: Message, state: State, round: Round) -> tuple[bool, State]:
        said = {name[5:]: value for name, value in state.items() if name.startswith("sent.")}
        before = said if round.known is None else round.known
        speaks = before.keys() != message.parts.keys() or any(before[name].shape != part.shape for name, part in message.parts.items())
        speaks = speaks or moved(message.parts, before) >= limit(round)
        speaks = speaks or (max_silence is not None and int(state["silence"]) >= max_silence)
        if not speaks:
            return False, state | {"silence": state["silence"] + 1}
        return True, _after(message, torch.zeros_like(state["silence"]))

    return Trigger(init, decide, **traits)


def _after(message: Message, silence: Tensor) -> State:
    """What is remembered of a message that was sent."""
    return {"silence": silence, **{f"sent.{name}": part.clone() for name, part in message.parts.items()}}
