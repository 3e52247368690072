"""Plans and comparisons as text: for a terminal, and as Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dfl.report.markdown import row

_COLUMNS = ("", "topology", "method", "codec", "trigger", "local steps", "rounds", "seconds", "MB", "said", "rho", "")
_FIELDS = ("topology", "method", "codec", "trigger", "train.local_steps")
SHOWN = 20
_NONE = "none of them is expected to reach it: more rounds of --probe say more, or a target nearer to what was measured is one"


def text(value: Any) -> str:
    """A value of a field in one line, as a recipe has it."""
    if isinstance(value, Mapping) and set(value) == {"name"}:
        value = value["name"]
    if not isinstance(value, (Mapping, list)):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def cells(line: Mapping[str, Any]) -> list[str]:
    """A combination as a row of the table."""
    rounds = number(line["rounds"])
    if rounds != "-":
        rounds += f" ({number(line['rounds_low'])} to {number(line['rounds_high'])})"
    size = None if line["bytes"] is None else line["bytes"] / 1e6
    return [str(line["rank"]), *(text(line["fields"][field]) for field in _FIELDS), rounds, number(line["seconds"]), number(size),
            f"{line['share']:.0%}", f"{line['rho']:.2f}", "; ".join(line["notes"])]


def heading(plan: Mapping[str, Any]) -> str:
    return (f"{plan['metric']} {plan['target']} as the mean over peers, {number(plan['bandwidth_mbit'])} Mbit/s and "
            f"{number(plan['latency_ms'])} ms a link, ranked by {plan['by']}")


def remarks(plan: Mapping[str, Any]) -> list[str]:
    """What a plan rests on, and what was left out."""
    found = ["Rounds: the median, and the middle 80 %, of the curves that fit what was measured. Seconds are those of the "
             "simulated clock, MB those of all messages of all peers; said: messages sent of those due; rho: what a round "
             "leaves of |x - mean|^2."]
    found += [_measured(one, plan["metric"]) for one in plan["probes"]]
    return found + [f"Left out, {one['combinations']}: {one['reason']}" for one in plan["left_out"]]


def _measured(one: Mapping[str, Any], metric: str) -> str:
    ways = [f"of {who} {number(values[0])} to {number(values[-1])}" for who, values in (("the consensus", one["consensus"]),
                                                                                      ("peers", one["peers"]))]
    return (f"Measured in {one['rounds']} rounds of {text(one['method'])} at {one['local_steps']} local steps on "
            f"{text(one['topology'])}: {metric} {', '.join(ways)}; phi {one['phi']:.2f}, beta {one['beta']:.2f}, kappa "
            f"{one['kappa']:.3g}; {number(one['step_seconds'])} s a step; a phase moves a number by {number(one['move_rms'])} "
            "(rms), which thresholds of `event` compare with.")


def lines(plan: Mapping[str, Any], shown: int = SHOWN) -> list[str]:
    """For a terminal: the first `shown` combinations, and the command that runs the best."""
    found = plan["combinations"]
    rest = [f"... and {len(found) - shown} more in plan.json"] if len(found) > shown else []
    return [heading(plan), "", *aligned([_COLUMNS, *(cells(one) for one in found[:shown])]), *rest, "", *remarks(plan), "",
            f"the first of them: {found[0]['command']}" if _reached(found[0]) else _NONE]


def _reached(line: Mapping[str, Any]) -> bool:
    """Whether a combination is expected to come to the target; in a plan that was read, None stands for infinity."""
    return line["rounds"] is not None and math.isfinite(line["rounds"])


def markdown(plan: Mapping[str, Any]) -> str:
    found = plan["combinations"]
    body = [row(_COLUMNS), row(["---"] * len(_COLUMNS)).replace("\\", ""), *(row(cells(one)) for one in found)]
    parts = ["# Plan", heading(plan), "\n".join(body), "\n".join(f"- {one}" for one in remarks(plan)),
             f"```bash\n{found[0]['command']}\n```" if _reached(found[0]) else _NONE]
    return "\n\n".join(parts) + "\n"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
