"""How often to exchange and mix in one round, as a parameter of channels.

Over a way that adds errors: often enough to agree, not so often that they pile up.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dfl.plugins import check_count
from dfl.slots import Channel, Inbox, Message

AUTO = "auto"


def how_often(aggregations: int | str, most: int) -> dict[str, Any]:
    """The traits of a channel for `aggregations`, a number or auto, and the largest number that auto may choose."""
    check_count("channel.most", most)
    if aggregations == AUTO:
        return {"aggregations": None, "most": most}
    if isinstance(aggregations, str):
        raise ValueError(f"channel.aggregations = {aggregations!r} is not allowed; allowed: auto, or a whole number from 1")
    check_count("channel.aggregations", aggregations)
    return {"aggregations": aggregations}


class Seen(NamedTuple):
    """At one peer before the first mix of a round: half the mean squared distance of its neighbours' messages from its
    own, which is the squared consensus distance where peers differ independently; the mean square of a number; how many
    numbers there are."""

    apart: float
    square: float
    numbers: int


def look(own: Message, inbox: Inbox) -> Seen:
    """inbox: messages of neighbours, as long as the peer's own."""
    numbers = sum(part.numel() for part in own.parts.values())
    square = sum(float(part.double().square().sum()) for part in own.parts.values())
    apart = [sum(float((part.double() - own.parts[name].double()).square().sum()) for name, part in message.parts.items())
             for message in inbox.values()]
    return Seen(sum(apart) / (2 * max(1, len(apart))), square / max(1, numbers), numbers)


def contraction(w: np.ndarray) -> float:
    """||W - J||_2 of W (N, N): by how much one mix takes peers together at least; for symmetric W the SLEM."""
    return float(np.linalg.norm(w - 1 / len(w), 2))


def best(seen: Seen, receiver: int, weights: Mapping[int, float], channel: Channel, rho: float) -> int:
    """J* = argmin over 1 <= J <= channel.most of rho^(2 J) D0 + J v.

    D0: the squared disagreement before the round, v: the variance that one exchange injects, over all numbers of a
    peer. Without injected errors the most that is allowed. The bound of Li, Lv, Ni, Zhao, Hossain, Poor 2024, arXiv
    2405.12894, is of this kind; its formula is not known to us, and this one is ours.
    """
    injected = 0.0 if channel.injects is None else seen.numbers * channel.injects(receiver, weights, seen.square)
    j = np.arange(1, channel.most + 1)
    bound = rho ** (2.0 * j) * seen.apart + j * injected
    return int(j[-1] if not injected else j[bound.argmin()])
