"""Rules that train one factor at a time: RoLoRA, ADF-LoRA, TAD-LoRA.

The phase is a function of the global round, the same at every peer, and B comes first: while B = 0 the gradient of A
is exactly zero.
"""

import math

from dfl.factors import Layout
from dfl.rules.base import BOTH, Rule, factor_gossip

# ADF-LoRA's best interval is 5 on 10 peers that meet with probability 0.1, where 1 / sqrt(gap) = 1.65
CALIBRATION = 3.0


def phase(t: int, interval: int) -> str:
    """The factor trained in round t: B for the first `interval` rounds, then A, and so on."""
    return "B" if (t // interval) % 2 == 0 else "A"


def rolora(layout: Layout, *, head: str = "frozen") -> Rule:
    """Train B and A in turn, round by round, and mix only the one trained (RoLoRA as gossip).

    F_i <- sum_j w_ij F_j for F = B in even rounds, A in odd ones; the other factor keeps its bits, and its
    disagreement. Half the bytes of `lora`. Chen et al. 2025, arXiv 2502.01755.
    """
    active = lambda t: frozenset(phase(t, 1))  # noqa: E731
    return factor_gossip(layout, active, active, head=head)


def adf(layout: Layout, *, T: int = 5, head: str = "frozen") -> Rule:
    """Train B and A in turn, T rounds each, and mix both every round (ADF-LoRA).

    A_i <- sum_j w_ij A_j;  B_i <- sum_j w_ij B_j, gradients only for the active one. While a factor is frozen its
    disagreement contracts with W(t), and with it the cross term. Wang, Li, Zhou, Li, Liu 2025, arXiv 2511.18291.
    """
    check_interval("rule.T", T)
    return factor_gossip(layout, lambda t: frozenset(phase(t, T)), lambda t: BOTH, head=head, facts={"T": T})


def tad(layout: Layout, *, T: int | str = "auto", calibration: float = CALIBRATION, contraction: float | None = None,
        head: str = "frozen") -> Rule:
    """ADF with an interval T chosen from the topology: sparser graphs get longer phases (TAD-LoRA).

    T = round(calibration / sqrt(1 - rho)), rho = ||E[W^T W] - J||_2 (`contraction`, measured on the configured topology),
    after the optimum Theta(1 / sqrt(1 - rho)); a whole number for T is taken as it is.
    Wang, Li, Zhou, Li, Liu 2026, arXiv 2602.00451.
    """
    if T == "auto":
        T, reason = automatic_interval(calibration, contraction)
    else:
        check_interval("rule.T", T, "'auto' or ")
        reason = "given in the recipe"
    return adf(layout, T=T, head=head)._replace(facts={"T": T, "reason": reason})


def automatic_interval(calibration: float, contraction: float | None) -> tuple[int, str]:
    """T and the sentence that says why. ValueError where no contraction was measured."""
    if not isinstance(calibration, (int, float)) or not calibration > 0:
        raise ValueError(f"rule.calibration = {calibration!r} is not allowed; allowed: a positive number")
    if contraction is None:
        raise ValueError("rule.T = 'auto' needs the topology's contraction; give a whole number from 1 instead")
    gap = 1.0 - contraction
    if gap < 1e-9:
        raise ValueError(f"rule.T = 'auto' needs a topology that mixes, but its spectral gap is {gap:.1e}; "
                         "give a whole number from 1, or another topology")
    interval = max(1, round(calibration / math.sqrt(gap)))
    return interval, (f"spectral gap {gap:.4g} of the configured topology: "
                      f"round({calibration:g} / sqrt({gap:.4g})) = {interval}")


def check_interval(field: str, value: object, also: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: {also}a whole number from 1")
