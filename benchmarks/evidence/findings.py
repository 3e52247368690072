"""What the cells say: the search for rates, pairs of cells, differences with intervals, and the protocol's verdicts.

Pure functions of the stored cells. Accuracy is in percent and differences in points here; cells store fractions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dfl.report.statistics import LEAST_VALUES, estimate

LR, RATIOS, WIDER = 2e-3, (1, 4, 16), 64
Point = tuple[float, float]
Found = Mapping[str, dict]


class Search(NamedTuple):
    """points: (rate of A, ratio of B's to it) to be tried, in order, as far as the scores tell; chosen: None until all
    are in.
    """

    points: list[Point]
    chosen: Point | None


def search(scores: Mapping[Point, float]) -> Search:
    """The protocol's search for the rates of one method, from validation accuracies by point."""
    points = [(LR, ratio) for ratio in RATIOS]
    for widen in (_ratio_beyond, _both_rates, _rate_beyond):
        if not all(point in scores for point in points):
            return Search(points, None)
        points += [point for point in widen(points, scores) if point not in points]
    done = all(point in scores for point in points)
    return Search(points, _best(points, scores) if done else None)


def _best(points: Sequence[Point], scores: Mapping[Point, float]) -> Point:
    """The best score; of equal ones the smallest rates."""
    return max(points, key=lambda point: (scores[point], -point[0], -point[1]))


def _ratio_beyond(points, scores) -> list[Point]:
    return [(LR, WIDER)] if _best(points, scores)[1] == max(RATIOS) else []


def _both_rates(points, scores) -> list[Point]:
    ratio = _best(points, scores)[1]
    return [(LR / 2, ratio), (LR * 2, ratio)]


def _rate_beyond(points, scores) -> list[Point]:
    lr, ratio = _best([point for point in points if point[1] == points[-1][1]], scores)
    return [] if lr == LR else [(lr * lr / LR, ratio)]


def validation(cell: dict) -> float:
    """Validation accuracy of the peers' mean after the last round; zero for a run that diverged."""
    return 0.0 if cell.get("diverged") else cell["final"]["mean"]


def test(cell: dict, what: str = "mean") -> float:
    """Test accuracy in percent: of the peers' mean, the worst peer (min), or the consensus model."""
    return 0.0 if cell.get("diverged") else 100 * cell["test"][what]


def best(cell: dict) -> float:
    """Validation accuracy in percent in the best round."""
    return 0.0 if cell.get("diverged") else 100 * max(point["mean"] for point in cell["curve"])


class Place(NamedTuple):
    """Where methods are compared: all that a pair has in common beside the seed."""

    task: str
    p: float
    setting: str = ""


def of_place(found: Found, place: Place, method: str, read: Callable[[dict], float] = test) -> dict[int, float]:
    """By seed, what `read` finds in the reported cells of a method."""
    return {cell["seed"]: read(cell) for cell in found.values() if cell["phase"] != "rates" and cell["method"] == method
            and (cell["task"], cell["p"], cell["setting"]) == place}


def differences(found: Found, place: Place, one: str, other: str, what: str = "mean") -> list[float]:
    """One - other, seed by seed, in points of test accuracy: of the peers' mean, the worst peer (min), or the consensus."""
    return list(_by_seed(found, place, one, other, what).values())


def _by_seed(found: Found, place: Place, one: str, other: str, what: str = "mean") -> dict[int, float]:
    """By seed that both have, one - other in points of test accuracy."""
    first, second = (of_place(found, place, method, lambda cell: test(cell, what)) for method in (one, other))
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


class Verdict(NamedTuple):
    """claim: a sentence; verdict: held, refuted or not decided; why: the figures that it rests on."""

    claim: str
    verdict: str
    why: str


UNDECIDED = "not decided"


def chosen_interval(found: Found, place: Place) -> str | None:
    """tad5 or tad15, by the validation mean over the seeds that both have, or the one that has been run; None where none
    has, or no seed is common.
    """
    candidates = {method: values for method in ("tad5", "tad15") if (values := of_place(found, place, method, validation))}
    seeds = set.intersection(*map(set, candidates.values())) if candidates else set()
    means = {method: sum(values[seed] for seed in seeds) for method, values in candidates.items()}
    return max(means, key=lambda method: means[method]) if seeds else None


def ordering(claim: str, points: Sequence[float], scale: float = 100.0) -> Verdict:
    """Of A > B, from the differences A - B by seed: held or refuted where their interval leaves zero out."""
    found = estimate(points, scale=scale)
    if found is None or found.half is None:
        return Verdict(claim, UNDECIDED, text(points))
    verdict = "held" if found.mean > found.half else "refuted" if found.mean < -found.half else UNDECIDED
    return Verdict(claim, verdict, text(points))


def sparse(points: Sequence[float], ahead: bool) -> str:
    """The protocol's criterion at p = 0.02, from TAD - LoRA by seed; ahead: what was expected, else behind."""
    signed = [point if ahead else -point for point in points]
    if len(signed) < LEAST_VALUES:
        return UNDECIDED
    if min(signed) <= 0:
        return "refuted"
    found = estimate(signed, scale=100.0)
    return "held" if found.half is not None and found.mean > found.half else UNDECIDED


def within_a_point(points: Sequence[float]) -> str:
    """The criterion at p = 0.1: the interval inside [-1, 1], wholly outside, or neither."""
    found = estimate(points, scale=100.0)
    if found is None or found.half is None:
        return UNDECIDED
    low, high = found.mean - found.half, found.mean + found.half
    return "held" if -1 <= low and high <= 1 else "refuted" if low > 1 or high < -1 else UNDECIDED


def not_ahead(points: Sequence[float]) -> str:
    """The criterion at p = 0.5: the interval ends at one point or below; refuted where it lies above zero."""
    found = estimate(points, scale=100.0)
    if found is None or found.half is None:
        return UNDECIDED
    low, high = found.mean - found.half, found.mean + found.half
    return "refuted" if low > 0 else "held" if high <= 1 else UNDECIDED


def expectation(found: Found, task: str, p: float) -> Verdict:
    """The expectation that was written down beforehand for TAD against LoRA at p."""
    place = Place(task, p)
    tad = chosen_interval(found, place) or "tad5 or tad15"
    points = differences(found, place, tad, "lora")
    why = f"{tad} - lora: {text(points)}"
    if p == 0.5:
        return Verdict(f"{task}, p = 0.5: a tie, or LoRA ahead of TAD", not_ahead(points), why)
    if p == 0.1:
        return Verdict(f"{task}, p = 0.1: LoRA and TAD within a point", within_a_point(points), why)
    ffa, lora = of_place(found, place, "ffa"), of_place(found, place, "lora")
    seeds = ffa.keys() & lora.keys()
    if not seeds:
        return Verdict(f"{task}, p = 0.02: TAD ahead where FFA reaches 80 % of LoRA, else behind", UNDECIDED,
                       "no pair of FFA and LoRA")
    share = sum(ffa[seed] for seed in seeds) / sum(lora[seed] for seed in seeds)
    ahead = share >= 0.8
    where = "ahead of" if ahead else "behind"
    claim = f"{task}, p = 0.02: TAD {where} LoRA, as FFA reaches {100 * share:.0f} % of LoRA"
    return Verdict(claim, sparse(points, ahead), why)


def last_phase(found: Found, place: Place, method: str, after_b: int, after_a: int) -> Verdict:
    """That a run which ends after a phase of A is ahead of one which ends with B, on validation, of the same run."""
    def gain(cell: dict) -> float | None:
        by_round = {point["round"]: 100 * point["mean"] for point in cell.get("curve", ())}
        return by_round[after_a] - by_round[after_b] if {after_a, after_b} <= by_round.keys() else None

    points = [value for value in of_place(found, place, method, gain).values() if value is not None]
    claim = f"{place.task}, p = {place.p:g}: {method} after round {after_a} (A) > after {after_b} (B), validation"
    return ordering(claim, points)


def merging(claim: str, found: Found, place: Place, method: str) -> Verdict:
    """Of a claim that one mean over all peers after the last round is ahead of the best of them, on test, of the same run
    (Zhu et al. 2026, arXiv 2507.06542).
    """
    return ordering(claim, gains_of_merging(found, place, method))


def gains_of_merging(found: Found, place: Place, method: str) -> list[float]:
    """Consensus - best peer, seed by seed, on test."""
    return list(of_place(found, place, method, lambda cell: test(cell, "consensus") - test(cell, "max")).values())


def growth(claim: str, found: Found, more: Place, less: Place, one: str, other: str) -> Verdict:
    """Of a claim that `one` gains more on `other` at one place than at another, seed by seed."""
    gains = [_by_seed(found, place, one, other) for place in (more, less)]
    points = [gains[0][seed] - gains[1][seed] for seed in sorted(gains[0].keys() & gains[1].keys())]
    return ordering(claim, points)


def frozen_share(line: dict) -> float | None:
    """Of a line of diagnostics: the gradient of the frozen factor over that of the trained one; None where both are trained."""
    trained = set(line["trained"].split("+")) & {"A", "B"}
    if len(trained) != 1:
        return None
    (active,), (frozen,) = trained, {"A", "B"} - trained
    return line[f"gradient_{frozen}"] / line[f"gradient_{active}"] if line[f"gradient_{active}"] else None


def text(points: Sequence[float]) -> str:
    """Differences seed by seed, their mean, and its interval where there is one."""
    if not points:
        return "no pair"
    found = estimate(points, scale=100.0)
    interval = "no interval"
    if found.half is not None:
        interval = f"95 % interval {found.mean - found.half:+.1f} to {found.mean + found.half:+.1f}"
    pairs = "pair" if len(points) == 1 else "pairs"
    listed = ", ".join(f"{point:+.1f}" for point in points)
    return f"{listed}: mean {found.mean:+.1f}, {interval} ({len(points)} {pairs})"
