"""Triggers of time alone: every few rounds, or late."""

import math

from dfl.plugins import check_count
from dfl.slots import Message, Round, State, Trigger


def periodic(*, every: int = 2) -> Trigger:
    """Speak in every k-th round alone, all together (local SGD as gossip).

    Round t with (t + 1) % every = 0 is a round of gossip; in all others nobody sends and nobody mixes. Not to be
    confused with a method's T, which switches factors.
    """
    check_count("trigger.every", every)
    return Trigger(lambda message: {}, _speak, holds=False, due=lambda t: (t + 1) % every == 0, facts={"every": every})


def late(*, share: float = 0.2, merge: bool = True, rounds: int | None = None) -> Trigger:
    """Train alone first, gossip in the last rounds, and end with one full merge: the mean of all peers.

    Peers gossip in the last `share` of all rounds; in the very last one, with merge, every peer takes the equal-weight
    mean of all N, x_i <- (1/N) sum_j x_j, whatever the topology is: N (N - 1) messages. share 0: the merge alone. Zhu,
    Huang, Zhou, Zhang, Li, Wu, Wang 2025, arXiv 2507.06542, find that one global merge at the end gives most of what
    full communication does, and that a budget is best spent late.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"trigger.share = {share!r} is not allowed; allowed: a number from 0 to 1")
    if not isinstance(merge, bool):
        raise ValueError(f"trigger.merge = {merge!r} is not allowed; allowed: true, false")
    if rounds is None:
        raise ValueError("trigger.name = 'late' needs the number of rounds")
    first, last = rounds - math.ceil(share * rounds), rounds - 1
    return Trigger(lambda message: {}, _speak, holds=False, due=lambda t: t >= first or merge and t == last,
                   merges=(lambda t: t == last) if merge else None, facts={"gossip_from": first, "merge": merge})


def _speak(message: Message, state: State, round: Round) -> tuple[bool, State]:
    return True, state
