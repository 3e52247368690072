"""The same in every round: both factors, B over a frozen A, A alone, nothing at all."""

from typing import Any

from dfl.schedules.groups import NOTHING, Groups
from dfl.slots import OWN, Plan, Schedule


def _always(plan: Plan, sends: str, **facts: Any) -> Schedule:
    return Schedule(lambda t, peer: plan, sends, **facts)


def both(groups: Groups) -> Schedule:
    """Train A and B (or cores), exchange both in every round."""
    return _always(groups.plan(groups.factors, groups.factors), groups.kind)


def frozen_a(groups: Groups) -> Schedule:
    """Freeze the common A, train and exchange B.

    A is the same everywhere for ever, so the cross term is zero for any W and half the bytes travel. B wants a larger
    rate than with a trained A. Sun, Li, Li, Ding 2024, arXiv 2403.12313 (FFA-LoRA).
    """
    b = frozenset({"B"})
    return _always(groups.plan(b, b), "B", common=frozenset({"A"}))


def own_a(groups: Groups) -> Schedule:
    """Freeze an A of every peer's own, train B and exchange it for others to keep.

    B of one peer means something beside its own A alone, so that no rule may average it. Yang et al. 2026, arXiv
    2602.20492 (sparse-and-orthogonal LoRA).
    """
    b = frozenset({"B"})
    return _always(groups.plan(b, b), OWN)


def share_a(groups: Groups) -> Schedule:
    """Train A and B, exchange A alone.

    Half the bytes. The models are personal: judge each peer's own, not a consensus, and keep a trained head local as
    the paper does (lora.head: local). Guo et al. 2025, arXiv 2410.01463 (FedSA-LoRA).
    """
    return _always(groups.plan(groups.factors, frozenset({"A"})), "A")


def alone(groups: Groups) -> Schedule:
    """Train A and B (or cores), exchange nothing: the baseline that gossip has to beat."""
    return _always(groups.plan(groups.factors, NOTHING), "nothing")
