"""One factor at a time: RoLoRA, ADF-LoRA, TAD-LoRA.

The phase is a function of the global round, the same at every peer, and B comes first: while B = 0 the gradient of A is
exactly zero.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from dfl.plugins import check_choice, check_count
from dfl.schedules.groups import Groups
from dfl.schedules.phases import Phases
from dfl.slots import Mixing, Plan, Schedule
from topologies import spectrum

# a frozen factor's disagreement falls to a tenth; chosen on the toy, `benchmarks/intervals.py`
THETA = 0.01
EXCHANGES = ("both", "active")
Interval = int | Sequence[int]


def phase(t: int, interval: Interval = 1, pattern: str | None = None) -> str:
    """The factor trained in round t: B for the first `interval` rounds, then A, and so on; two intervals are B's and
    A's.

    A `pattern` such as BBA says it letter by letter instead, and repeats.
    """
    if pattern is not None:
        return pattern[t % len(pattern)]
    of_b, of_a = (interval, interval) if isinstance(interval, int) else interval
    return "B" if t % (of_b + of_a) < of_b else "A"


def alternate(groups: Groups, *, T: Interval = 5, pattern: str | None = None, exchange: str = "both") -> Schedule:
    """Train B and A in turn, T rounds each, and exchange both in every round, or only the active one.

    Both: while a factor is frozen its disagreement contracts with W(t), and with it the cross term (ADF-LoRA). Active:
    half the bytes, and the frozen factor keeps its bits and its disagreement (RoLoRA, with T = 1). T = [5, 2]: five
    rounds of B, two of A; pattern = BBA instead of T names the rounds one by one. Wang, Li, Zhou, Li, Liu 2025, arXiv
    2511.18291; Chen et al. 2025, arXiv 2502.01755.
    """
    check_choice("schedule.exchange", exchange, EXCHANGES)
    facts = chosen_phases(T, pattern, default=5)
    plans = _plans(groups, exchange)
    return Schedule(lambda t, peer: plans[phase(t, T, pattern)], _sends(exchange), facts=facts)


def _plans(groups: Groups, exchange: str) -> dict[str, Plan]:
    return {name: groups.plan(frozenset(name), groups.factors if exchange == "both" else frozenset(name)) for name in "AB"}


def _sends(exchange: str) -> str:
    return "pairs" if exchange == "both" else "active"


def automatic(groups: Groups, *, T: int | str | Sequence[int] = "auto", pattern: str | None = None, exchange: str = "both",
              theta: float = THETA, cap: int | None = None, ends: Sequence[int] = (), topology: Mixing | None = None,
              rounds: int | None = None) -> Schedule:
    """Train B and A in turn, with phases that the topology decides: sparser graphs get longer ones (TAD-LoRA).

    T = auto: a phase ends as soon as the factor that it freezes has come together, by what the run's own W(t) do to a
    disagreement, ||(I - J) W(t) ... W(s)||_F^2 / (n - 1) <= theta, at the latest after `cap` rounds (a quarter of the
    run if not given); the run ends in a phase of A (`dfl.schedules.phases`). The paper has one interval instead,
    Theta(1 / sqrt(1 - rho)) with a constant that it leaves open. A T or a pattern as `alternate` takes them is taken as
    it is. theta: above 0 and below 1. ends: after how many rounds shorter runs had ended that this one goes on from;
    `--resume` writes it. Wang, Li, Zhou, Li, Liu 2026, arXiv 2602.00451; the criterion is ours.
    """
    if T == "auto" and pattern is None:
        check_choice("schedule.exchange", exchange, EXCHANGES)
        phases, facts = _by_topology(topology, rounds, theta, cap, ends)
        plans = _plans(groups, exchange)
        return Schedule(lambda t, peer: plans[phases(t)], _sends(exchange), facts=facts)
    facts = chosen_phases(T, None, also="'auto', ") if pattern is None else chosen_phases(T, pattern, default="auto")
    schedule = alternate(groups, exchange=exchange, **({"T": T} if pattern is None else {"pattern": pattern}))
    return schedule._replace(facts={**facts, "reason": "given in the recipe"})


def _by_topology(topology: Mixing | None, rounds: int | None, theta: float, cap: int | None,
                 ends: Sequence[int]) -> tuple[Phases, dict[str, object]]:
    """The phases, and what the log says of them. ValueError where a parameter is none, or the topology does not mix."""
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < 1:
        raise ValueError(f"schedule.theta = {theta!r} is not allowed; allowed: a number above 0 and below 1")
    if cap is not None:
        check_count("schedule.cap", cap)
    if topology is None or rounds is None:
        raise ValueError("schedule.T = 'auto' needs the topology and the number of rounds; give a whole number from 1 instead")
    bounds = [0, *ends, rounds] if isinstance(ends, list | tuple) else None
    if bounds is None or any(not isinstance(e, int) or e <= before for before, e in pairwise(bounds)):
        raise ValueError(f"schedule.ends = {ends!r} is not allowed; allowed: rising whole numbers from 1, below the run's "
                         f"{rounds} rounds")
    gap = 1.0 - _contraction(topology)
    if gap < 1e-9:
        raise ValueError(f"schedule.T = 'auto' needs a topology that mixes, but its spectral gap is {gap:.1e}; "
                         "give a whole number from 1, or another topology")
    facts = {"T": "auto", "theta": theta, "cap": "a quarter of the run" if cap is None else cap,
             "reason": f"phases end when the frozen factor keeps {theta:g} of its squared disagreement on the run's own graphs"}
    return Phases(topology, bounds[1:], theta, cap), facts


@lru_cache(maxsize=8)
def _contraction(topology: Any) -> float:
    return spectrum.contraction(topology)


def chosen_phases(T: Any, pattern: object, *, default: object = None, also: str = "") -> dict[str, object]:
    """What was chosen, for the log. ValueError for intervals or patterns that are none, and for both at once."""
    if pattern is None:
        check_interval("schedule.T", T, also)
        return {"T": T if isinstance(T, int) else list(T)}
    if T != default:
        raise ValueError(f"schedule.T = {T!r} and schedule.pattern = {pattern!r} exclude each other; give one of them")
    if not isinstance(pattern, str) or set(pattern) != {"A", "B"}:
        raise ValueError(f"schedule.pattern = {pattern!r} is not allowed; allowed: a word of the letters A and B, both in it, "
                         "such as BBA")
    return {"pattern": pattern}


def check_interval(field: str, value: object, also: str = "") -> None:
    intervals = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    if any(isinstance(one, bool) or not isinstance(one, int) or one < 1 for one in intervals):
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: {also}a whole number from 1, or two: [rounds of B, of A]")
