"""`dfl plan --compare`: a plan against what runs of its combinations then took."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dfl.config import resolve
from dfl.metrics.numbers import spearman
from dfl.plan import table
from dfl.plan.candidates import FIELDS
from dfl.report.runs import counted, evaluated, number, spent
from dfl.store.runs import RunData, read_all
from dfl.sweep.grid import lookup as value_of

MEASURED = ("rounds", "seconds", "bytes")


def compared(plan: Path, runs: Sequence[Path]) -> dict[str, Any]:
    """What each run took until its first evaluation at the target, beside what the plan said of its combination.

    runs: folders of runs or sweeps. ValueError for a file that holds no plan, and for a run of none of its combinations.
    """
    said = read_plan(plan)
    found = [_compare(said, run) for run in read_all(list(runs))[0]]
    return {"plan": str(plan), "metric": said["metric"], "target": said["target"], "runs": found, "in_all": _in_all(found)}


def read_plan(path: Path) -> dict[str, Any]:
    """ValueError for a file that holds no plan; a folder is that of its plan.json."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {str(path)!r} cannot be read: {error}") from None
    if not isinstance(found, dict) or not {"combinations", "target", "metric", "better"} <= found.keys():
        raise ValueError(f"--compare {str(path)!r} holds no plan; allowed: the plan.json of dfl plan")
    return found


def _compare(plan: Mapping[str, Any], run: RunData) -> dict[str, Any]:
    line = _combination(plan, run)
    took = taken(run, plan["metric"], plan["target"], plan["better"] == "higher")
    asked = {name: line[name] for name in MEASURED}
    errors = {name: None if took[name] is None or asked[name] is None else asked[name] / took[name] - 1
              for name in MEASURED if took[name] != 0}
    return {"run": run.name, "rank": line["rank"], "fields": line["fields"], "planned": asked, "range": [line["rounds_low"],
            line["rounds_high"]], "took": took, "error": errors, "best": _best(run, plan), "done": run.done}


def _combination(plan: Mapping[str, Any], run: RunData) -> Mapping[str, Any]:
    """The line of the plan that a run is of. ValueError where there is none."""
    config = resolve(run.config)
    mine = {field: value_of(config, field) for field in FIELDS}
    for line in plan["combinations"]:
        planned = resolve(run.config, list(line["fields"].items()))
        if all(value_of(planned, field) == mine[field] for field in FIELDS):
            return line
    told = ", ".join(f"{field} = {table.text(value)}" for field, value in mine.items())
    raise ValueError(f"{str(run.folder)!r} is of no combination of the plan: {told}; allowed: runs of those in it")


def taken(run: RunData, metric: str, target: float, higher: bool) -> dict[str, float | None]:
    """Rounds, simulated seconds and bytes of a run at its first evaluation at the target; None where it did not get there, or has no
    clock. ValueError for a run that did not evaluate the metric."""
    records = evaluated(run, metric)
    if not records:
        raise ValueError(f"{str(run.folder)!r} has no evaluation of {metric!r}, which the plan is about")
    values = {one["round"]: number(one, "eval", metric, "mean") for one in records}
    there = next((t for t, value in values.items() if value is not None and (value >= target if higher else value <= target)), None)
    if there is None:
        return dict.fromkeys(MEASURED)
    return {"rounds": there, "seconds": counted(run)[there][1] or None, "bytes": spent(run)[there][0]}


def _best(run: RunData, plan: Mapping[str, Any]) -> float | None:
    values = [number(one, "eval", plan["metric"], "mean") for one in evaluated(run, plan["metric"])]
    known = [value for value in values if value is not None]
    return (max if plan["better"] == "higher" else min)(known, default=None)


def _in_all(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median and the largest error of each quantity, and whether the order is right, over runs that reached the target as planned;
    how many did not, or were not to."""
    both = [one for one in found if one["took"]["rounds"] is not None and one["planned"]["rounds"] is not None]
    inside = [one for one in both if one["range"][0] <= one["took"]["rounds"] <= (one["range"][1] or math.inf)]
    result: dict[str, Any] = {"compared": len(both), "in_range": len(inside),
                              "reached_but_not_planned": sum(one["planned"]["rounds"] is None and one["took"]["rounds"] is not None
                                                             for one in found),
                              "planned_but_not_reached": sum(one["planned"]["rounds"] is not None and one["took"]["rounds"] is None
                                                             for one in found)}
    for name in MEASURED:
        pairs = [(one["planned"][name], one["took"][name]) for one in both if one["took"][name] is not None]
        off = [abs(planned / took - 1) for planned, took in pairs if took]
        result[name] = {"median_error": statistics.median(off) if off else None, "largest_error": max(off, default=None),
                        "rank_correlation": rank_correlation(*zip(*pairs, strict=True)) if pairs else None}
    return result


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's; None for fewer than three pairs, or where all of one side are equal."""
    both = torch.tensor([one, other], dtype=torch.float64).T
    found = spearman(0).value(both, torch.ones(len(both), dtype=torch.float64)) if len(both) >= 3 else math.nan
    return None if math.isnan(found) else found


def lines(found: Mapping[str, Any]) -> list[str]:
    """For a terminal."""
    head = ("run", "rank", "rounds: planned", "took", "error", "seconds: planned", "took", "error", "MB: planned", "took", "error")
    body = [[one["run"], str(one["rank"]), *(cell for name in MEASURED for cell in _three(one, name))] for one in found["runs"]]
    about = f"{found['metric']} {found['target']} as the mean over peers"
    return [about, "", *table.aligned([head, *body]), "", *_summary(found["in_all"])]


def _three(one: Mapping[str, Any], name: str) -> list[str]:
    scale, error = 1e6 if name == "bytes" else 1, one["error"].get(name)
    values = [None if value is None else value / scale for value in (one["planned"][name], one["took"][name])]
    return [*map(table.number, values), "-" if error is None else f"{error:+.0%}"]


def _summary(all_: Mapping[str, Any]) -> list[str]:
    said = [f"{all_['compared']} runs reached the target as planned, {all_['in_range']} of them within the range of their rounds; "
            f"{all_['planned_but_not_reached']} planned did not reach it, {all_['reached_but_not_planned']} reached it that were not "
            "planned to"]
    for name in MEASURED:
        one = all_[name]
        if one["median_error"] is not None:
            order = "" if one["rank_correlation"] is None else f", rank correlation {one['rank_correlation']:.2f}"
            said.append(f"{name}: error {one['median_error']:.0%} in the middle, at most {one['largest_error']:.0%}{order}")
    return said
