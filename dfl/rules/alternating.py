"""Rules that train one factor at a time: RoLoRA, ADF-LoRA, TAD-LoRA.

The phase is a function of the global round, the same at every peer, and B comes first: while B = 0 the gradient of A
is exactly zero.
"""

import math
from collections.abc import Sequence

from dfl.factors import Layout
from dfl.rules.base import BOTH, Rule, factor_gossip

# ADF-LoRA's best interval is 5 on 10 peers that meet with probability 0.1, where 1 / sqrt(gap) = 1.65
CALIBRATION = 3.0


Interval = int | Sequence[int]


def phase(t: int, interval: Interval = 1, pattern: str | None = None) -> str:
    """The factor trained in round t: B for the first `interval` rounds, then A, and so on; two intervals are B's and A's.

    A `pattern` such as BBA says it letter by letter instead, and repeats.
    """
    if pattern is not None:
        return pattern[t % len(pattern)]
    of_b, of_a = (interval, interval) if isinstance(interval, int) else interval
    return "B" if t % (of_b + of_a) < of_b else "A"


def rolora(layout: Layout, *, T: Interval = 1, pattern: str | None = None, head: str = "frozen") -> Rule:
    """Train B and A in turn, round by round, and mix only the one trained (RoLoRA as gossip).

    F_i <- sum_j w_ij F_j for F = B in even rounds, A in odd ones; the other factor keeps its bits, and its
    disagreement. Half the bytes of `lora`. T and pattern as in `adf`. Chen et al. 2025, arXiv 2502.01755.
    """
    facts = schedule(T, pattern, default=1)
    active = lambda t: frozenset(phase(t, T, pattern))  # noqa: E731
    return factor_gossip(layout, active, active, head=head, facts=facts if (T, pattern) != (1, None) else {})


def adf(layout: Layout, *, T: Interval = 5, pattern: str | None = None, head: str = "frozen") -> Rule:
    """Train B and A in turn, T rounds each, and mix both every round (ADF-LoRA).

    A_i <- sum_j w_ij A_j;  B_i <- sum_j w_ij B_j, gradients only for the active one. While a factor is frozen its
    disagreement contracts with W(t), and with it the cross term. T = [5, 2]: five rounds of B, two of A; pattern = BBA instead of T
    names the rounds one by one. Wang, Li, Zhou, Li, Liu 2025, arXiv 2511.18291.
    """
    facts = schedule(T, pattern, default=5)
    return factor_gossip(layout, lambda t: frozenset(phase(t, T, pattern)), lambda t: BOTH, head=head, facts=facts)


def tad(layout: Layout, *, T: int | str | Sequence[int] = "auto", pattern: str | None = None, calibration: float = CALIBRATION,
        contraction: float | None = None, head: str = "frozen") -> Rule:
    """ADF with an interval T chosen from the topology: sparser graphs get longer phases (TAD-LoRA).

    T = round(calibration / sqrt(1 - rho)), rho = ||E[W^T W] - J||_2 (`contraction`, measured on the configured topology),
    after the optimum Theta(1 / sqrt(1 - rho)); a T or a pattern as `adf` takes them is taken as it is.
    Wang, Li, Zhou, Li, Liu 2026, arXiv 2602.00451.
    """
    reason = "given in the recipe"
    if pattern is not None:
        facts = schedule(T, pattern, default="auto")
    elif T == "auto":
        T, reason = automatic_interval(calibration, contraction)
        facts = {"T": T}
    else:
        facts = schedule(T, None, also="'auto', ")
    rule = adf(layout, head=head, **({"T": T} if pattern is None else {"pattern": pattern}))
    return rule._replace(facts={**facts, "reason": reason})


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


def schedule(T: object, pattern: object, *, default: object = None, also: str = "") -> dict[str, object]:
    """What was chosen, for the log. ValueError for intervals or patterns that are none, and for both at once."""
    if pattern is None:
        check_interval("rule.T", T, also)
        return {"T": T if isinstance(T, int) else list(T)}
    if T != default:
        raise ValueError(f"rule.T = {T!r} and rule.pattern = {pattern!r} exclude each other; give one of them")
    if not isinstance(pattern, str) or set(pattern) != {"A", "B"}:
        raise ValueError(f"rule.pattern = {pattern!r} is not allowed; allowed: a word of the letters A and B, both in it, such as BBA")
    return {"pattern": pattern}


def check_interval(field: str, value: object, also: str = "") -> None:
    intervals = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in intervals):
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: {also}a whole number from 1, or two: [rounds of B, of A]")
