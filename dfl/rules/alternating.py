"""Rules that train one factor at a time: RoLoRA, ADF-LoRA, TAD-LoRA.

The phase is a function of the global round, the same at every peer, and B comes first: while B = 0 the gradient of A
is exactly zero.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from dfl.factors import Layout
from dfl.rules.base import BOTH, Rule, check_count, factor_gossip
from dfl.rules.phases import Phases

# a frozen factor's disagreement falls to a tenth; chosen on the toy, `benchmarks/intervals.py`
THETA = 0.01


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


def tad(layout: Layout, *, T: int | str | Sequence[int] = "auto", pattern: str | None = None, theta: float = THETA,
        cap: int | None = None, ends: Sequence[int] = (), mixing=None, rounds: int | None = None, head: str = "frozen") -> Rule:
    """ADF with phases that the topology decides: sparser graphs get longer ones (TAD-LoRA).

    T = auto: a phase ends as soon as the factor that it freezes has come together, by what the run's own W(t) do to a disagreement,
    ||(I - J) W(t) ... W(s)||_F^2 / (n - 1) <= theta, at the latest after `cap` rounds (a quarter of the run if not given); the run
    ends in a phase of A (`dfl.rules.phases`). The paper has one interval instead, Theta(1 / sqrt(1 - rho)) with a constant that it
    leaves open. A T or a pattern as `adf` takes them is taken as it is.
    theta: above 0 and below 1. ends: after how many rounds shorter runs had ended that this one goes on from; `--resume` writes it.
    Wang, Li, Zhou, Li, Liu 2026, arXiv 2602.00451; the criterion is ours.
    """
    if T == "auto" and pattern is None:
        phases, facts = automatic(mixing, rounds, theta, cap, ends)
        rule = factor_gossip(layout, lambda t: frozenset(phases(t)), lambda t: BOTH, head=head)
        return rule._replace(facts=facts)
    facts = schedule(T, None, also="'auto', ") if pattern is None else schedule(T, pattern, default="auto")
    rule = adf(layout, head=head, **({"T": T} if pattern is None else {"pattern": pattern}))
    return rule._replace(facts={**facts, "reason": "given in the recipe"})


def automatic_phases(rule: str, params: Mapping[str, object]) -> bool:
    """Whether the rule of this name and parameters decides by the topology when to switch."""
    return rule == "tad" and params.get("T", "auto") == "auto" and params.get("pattern") is None


def automatic(mixing, rounds: int | None, theta: float, cap: int | None, ends: Sequence[int]) -> tuple[Phases, dict[str, object]]:
    """The phases, and what the log says of them. ValueError where a parameter is none, or the topology is not known."""
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1:
        raise ValueError(f"rule.theta = {theta!r} is not allowed; allowed: a number above 0 and below 1")
    if cap is not None:
        check_count("rule.cap", cap)
    if mixing is None or rounds is None:
        raise ValueError("rule.T = 'auto' needs the topology and the number of rounds; give a whole number from 1 instead")
    bounds = [0, *ends, rounds] if isinstance(ends, list | tuple) else None
    if bounds is None or any(not isinstance(e, int) or e <= before for before, e in pairwise(bounds)):
        raise ValueError(f"rule.ends = {ends!r} is not allowed; allowed: rising whole numbers from 1, below the run's {rounds} rounds")
    facts = {"T": "auto", "theta": theta, "cap": "a quarter of the run" if cap is None else cap,
             "reason": f"phases end when the frozen factor keeps {theta:g} of its squared disagreement on the run's own graphs"}
    return Phases(mixing, bounds[1:], theta, cap), facts


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
