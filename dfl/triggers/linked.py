"""Triggers of links: who is told something answers, both ends mix, and a link over which nobody spoke is not used."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from dfl.plugins import by_peer, check_choice, check_number, check_positive
from dfl.slots import Message, Round, State, Trigger
from dfl.triggers.distance import distance

Decide = Callable[[Message, State, Round], tuple[bool, State]]

MEASURED = "measured"


def efhc(*, r: float = 50.0, bandwidth: float | Sequence[float] | str = 5000.0, least: float = 1.0, most: float = 1e9,
         peers: int | None = None) -> Trigger:
    """Speak when the message has moved by more than one's bandwidth is worth, and answer who speaks (EF-HC).

    Four events in round k: a new link joins i and j, who then send to each other (not in round 0, in which all links
    are there);  i broadcasts where sqrt(||m_i - m^_i||² / D) >= r rho_i gamma_k, rho_i = 1 / b_i, gamma_k = 1 / sqrt(k +
    1), and m^_i <- m_i;  both ends of a link that was used mix over it, x_i <- x_i + sum over used links of w_ij (x_j -
    x_i), for which the one that was silent answers in the same round;  every peer takes its local steps. Which links
    are used is the same at both ends, so that a symmetric W keeps the network mean. With Metropolis weights this is the
    paper's; it mixes at the weights from before the local steps, and asks for a broadcast at the end of a round, where
    we train, ask, and mix; m^_i begins as what i has to say in round 0. bandwidth: b_i, a number for all or one for each
    peer; measured: the moving mean of what the simulated network gave the peer's messages in bytes a second, between
    `least` and `most`, which it has before the first; r then has to be as much larger.
    Zehtabi, Hosseinalipour, Brinton 2022, arXiv 2204.03726.
    """
    check_number("trigger.r", r)
    for field, value in (("least", least), ("most", most)):
        check_positive(f"trigger.{field}", value)
    if least > most:
        raise ValueError(f"trigger.least = {least} is more than trigger.most = {most}; allowed: least <= most")
    if isinstance(bandwidth, str):
        check_choice("trigger.bandwidth", bandwidth, (MEASURED,))
    of = None if bandwidth == MEASURED else by_peer("trigger.bandwidth", bandwidth, peers, check_positive)

    def rho(round: Round) -> float:
        if of is not None:
            return 1 / of(round.peer)
        return 1 / (most if round.bandwidth is None else min(max(round.bandwidth, least), most))

    facts = {"r": r, "bandwidth": bandwidth if isinstance(bandwidth, (int, float, str)) else list(bandwidth)}
    return _linked(_moved(lambda round: r * rho(round)), measures=of is None, facts=facts)


def zero_threshold() -> Trigger:
    """Speak in every round over every link (ZT, the baseline of EF-HC)."""
    return _linked(lambda message, state, round: (True, state))


def global_threshold(*, r: float = 50.0, bandwidth: float = 5000.0) -> Trigger:
    """Speak as EF-HC does, with one bandwidth and so one threshold for all (GT, the baseline of EF-HC).

    rho = 1 / bandwidth at every peer; the mean of what `efhc` is given makes the two comparable. arXiv 2204.03726.
    """
    check_number("trigger.r", r)
    check_positive("trigger.bandwidth", bandwidth)
    return _linked(_moved(lambda round: r / bandwidth), facts={"r": r, "bandwidth": bandwidth})


def random_gossip(*, probability: float | None = None, peers: int | None = None) -> Trigger:
    """Speak at random, whatever there is to say (RG, the baseline of EF-HC).

    Each peer broadcasts with probability 1 / N, or as given, and who is told answers. arXiv 2204.03726; Boyd, Ghosh,
    Prabhakar, Shah 2006.
    """
    number = isinstance(probability, (int, float)) and not isinstance(probability, bool)
    if probability is not None and not (number and 0 <= probability <= 1):
        raise ValueError(f"trigger.probability = {probability!r} is not allowed; allowed: a number from 0 to 1, or null for 1 / peers")
    chance = probability if probability is not None else 1 / (peers or 1)
    return _linked(lambda message, state, round: (random.Random(round.key).random() < chance, state), facts={"probability": chance})


def _linked(decide: Decide, **traits: Any) -> Trigger:
    return Trigger(lambda message: _sent(message), decide, holds=False, answers=True, greets=True, **traits)


def _moved(scale: Callable[[Round], float]) -> Decide:
    """Whether a message has moved by scale(round) / sqrt(t + 1) since it was last broadcast."""
    def decide(message: Message, state: State, round: Round) -> tuple[bool, State]:
        before = {name: part for name, part in state.items() if name in message.parts and part.shape == message.parts[name].shape}
        known = before.keys() == message.parts.keys()
        if known and float(distance(message.parts, before)) < scale(round) / math.sqrt(round.t + 1):
            return False, state
        return True, _sent(message)
    return decide


def _sent(message: Message) -> State:
    return {name: part.clone() for name, part in message.parts.items()}
