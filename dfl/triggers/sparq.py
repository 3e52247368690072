"""SPARQ-SGD: a threshold on what has changed, at every H-th round."""

from collections.abc import Mapping

from torch import Tensor

from dfl.plugins import check_count, check_number
from dfl.slots import Trigger
from dfl.triggers.distance import distance
from dfl.triggers.event import held_until


def sparq(*, c: float = 1.0, growth: float = 0.0, every: int = 1, max_silence: int | None = None) -> Trigger:
    """Speak, at every H-th round, when the message has moved by more than the learning rate is worth (SPARQ-SGD).

    In rounds with (t + 1) % every = 0, i sends where ||m_i - m^_i||² >= c_t lr_t², c_t = c (t + 1)^growth with growth
    below one, lr_t the learning rate; else its neighbours go on with m^_i. Between those rounds nobody sends and nobody
    mixes. Its second half, compressed differences m^_i <- m^_i + C(m_i - m^_i) and a step gamma of the mix, is a
    codec's (top_k, sign, ...), whose copy m^_i is then: what it has left out counts as not said yet. Singh, Data,
    George, Diggavi 2019, arXiv 1910.14280; the largest silence is ours.
    """
    check_number("trigger.c", c)
    if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not 0 <= growth < 1:
        raise ValueError(f"trigger.growth = {growth!r} is not allowed; allowed: a number from 0, below 1")
    check_count("trigger.every", every)
    if max_silence is not None:
        check_count("trigger.max_silence", max_silence)

    def moved(parts: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
        return float(distance(parts, before)) * sum(part.numel() for part in parts.values()) ** 0.5

    return held_until(moved, lambda round: (c * (round.t + 1) ** growth) ** 0.5 * round.lr, max_silence,
                      due=None if every == 1 else lambda t: (t + 1) % every == 0, facts={"c": c, "growth": growth, "every": every})
