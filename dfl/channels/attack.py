"""Poisoned messages, for experiments with guards: what some peers say reaches the others as an attacker would have it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfl.plugins import check_choice, check_number
from dfl.slots import Channel, Link, Message, State

# what is made of a message alone, and what needs all that the receiver gets
ALONE, TOGETHER = ("sign_flip", "nan", "huge"), ("alie", "ipm", "dissensus")
STRENGTHS = {"sign_flip": 1.0, "nan": 1.0, "huge": 1e30, "alie": 1.5, "ipm": 0.1, "dissensus": 1.5}


def attack(*, kind: str = "sign_flip", by: Sequence[int] = (0,), strength: float | None = None, peers: int | None = None) -> Channel:
    """Poison what some peers say, who train and mix as others do: sign flip, ALIE, IPM, dissensus, NaN, huge (for experiments).

    sign_flip: -s m_b.  nan: no numbers.  huge: s in every number.  These know of all that the receiver i gets, H the honest ones:
    alie: mean_H - s std_H, number by number (a little is enough; Baruch, Baruch, Goldberg 2019, arXiv 1902.06156).  ipm: -s mean_H
    (inner product manipulation; Xie, Koyejo, Gupta 2019, arXiv 1903.03936).  dissensus: m_i - s sum_H w_ij (m_j - m_i) / sum_b w_ib,
    which drives neighbours apart (He, Karimireddy, Jaggi 2022, arXiv 2202.01545). by: the peers that are poisoned. strength: s, 1 of
    sign_flip, 1e30 of huge, 1.5 of alie and dissensus, 0.1 of ipm. Where who is silent is taken for what it said last, the last three
    have no effect.
    """
    check_choice("channel.kind", kind, (*ALONE, *TOGETHER))
    poisoned = check_peers(by, peers)
    if strength is not None:
        check_number("channel.strength", strength)
    s = STRENGTHS[kind] if strength is None else float(strength)

    def deliver(message: Message | None, state: State, link: Link) -> tuple[Message | None, State]:
        if message is None or link.sender not in poisoned:
            return message, state
        if kind in TOGETHER:  # what it says is made where all of it is known
            marks = {name: torch.ones_like(part, dtype=torch.bool) for name, part in message.parts.items()}
            return message._replace(lost=marks), state
        return message._replace(parts={name: alone(part) for name, part in message.parts.items()}), state

    def alone(part: Tensor) -> Tensor:
        return -s * part if kind == "sign_flip" else torch.full_like(part, s if kind == "huge" else float("nan"))

    def fill(inbox: Mapping[int, Message], own: Message, weights: Mapping[int, float]) -> dict[int, Message]:
        bad = [j for j in sorted(inbox) if inbox[j].lost]
        honest = [j for j in sorted(inbox) if j not in bad]
        given, share = [weights[j] for j in honest], sum(weights[j] for j in bad)
        parts = {name: together([inbox[j].parts[name] for j in honest], part, given, share) for name, part in own.parts.items()}
        return {j: message._replace(parts=parts, lost={}) if j in bad else message for j, message in inbox.items()}

    def together(honest: list[Tensor], own: Tensor, weights: list[float], share: float) -> Tensor:
        if kind == "dissensus":
            pulls = [weight * (part - own) for part, weight in zip(honest, weights, strict=True)]
            return own - s / share * sum(pulls, torch.zeros_like(own))
        known = torch.stack([*honest, own])
        return -s * known.mean(0) if kind == "ipm" else known.mean(0) - s * known.std(0, correction=0)

    return Channel(lambda: {}, deliver, fill=fill, facts={"attack": kind, "attack_by": sorted(poisoned)})


def check_peers(by: Any, peers: int | None) -> frozenset[int]:
    """ValueError for peers that are none."""
    good = isinstance(by, (list, tuple)) and len(by) > 0 and all(isinstance(j, int) and not isinstance(j, bool) and j >= 0 for j in by)
    if not good or (peers is not None and max(by) >= peers):
        last = "" if peers is None else f" to {peers - 1}"
        raise ValueError(f"channel.by = {by!r} is not allowed; allowed: a list of peers, from 0{last}")
    return frozenset(by)
