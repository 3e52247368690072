"""Lines and tables that people read on a terminal."""

import math
from pathlib import Path

from dfl.report.runs import comparable, evaluated, metrics_of, number, primary_of, short_of_end
from dfl.store.runs import RunData, read_run


def training_line(record: dict) -> str:
    """What a round trained and sent, in short."""
    parts = [f"loss {record['train_loss']['mean']:.3f}", f"trains {record['trains']}", f"edges {record['edges']}"]
    if "measures" in record:
        parts.append(f"distance {record['measures']['consensus_distance']:.3g}")
    return "  ".join(parts)


def evaluation_line(record: dict, primary: str) -> str:
    """The evaluation of a round; empty where there was none."""
    evaluation = record.get("eval", {})
    if primary not in evaluation:
        return ""
    values = evaluation[primary]
    text = f"{primary} {_cell(values['mean'])} ({_cell(values['min'])} to {_cell(values['max'])})"
    return text + (f", consensus {_cell(evaluation['consensus'][primary])}" if "consensus" in evaluation else "")


def round_line(record: dict, primary: str) -> str:
    """One round in a line."""
    return "  ".join(part for part in (training_line(record), evaluation_line(record, primary)) if part)


def best(records: list[dict], primary: str, higher_is_better: bool) -> dict:
    """The evaluation with the best mean over peers; one that was not finite is the worst."""
    sign = 1 if higher_is_better else -1

    def goodness(record: dict) -> float:
        mean = record["eval"][primary]["mean"]
        return -math.inf if mean is None else sign * mean  # null: it was not finite

    return max(records, key=goodness)


def closing_table(run: Path) -> str:
    """Before, after and best of every peer and of the consensus; against local training alone where that was run too.

    A column from before the end of its run says so. ValueError for a folder without an evaluation.
    """
    found = read_run(run)
    first = next((record["eval"] for record in found.records if "eval" in record), {})
    primary, higher_is_better = primary_of(found.facts, first)
    records = evaluated(found, primary)
    if not records:
        raise ValueError(f"{str(run)!r} holds no evaluation yet")
    last, top = records[-1], best(records, primary, higher_is_better)
    name = found.config["method"]["name"]
    columns = [("before", records[0]["eval"]), (f"after {name}{short_of_end(found, last)}", last["eval"])]
    alone = found.baseline and evaluated(found.baseline, primary)
    if alone:
        beside = comparable(alone, last["round"])
        columns.append((f"local alone{short_of_end(found.baseline, beside)}", beside["eval"]))
    columns += [("on own data", own)] if (own := on_own_data(last["eval"], primary)) else []
    lines = [f"{primary} on the evaluation examples", align(_rows(columns, last["eval"], primary)),
             f"best mean over peers {_cell(top['eval'][primary]['mean'])}, after round {top['round']}",
             *_others(found, last["eval"], primary)]
    if own:
        by = found.facts.get("own", {}).get("by", "label")
        lines.insert(1, f"own data: the same examples, each {by} weighing what it weighs in the peer's shard")
    if found.baseline and not found.baseline.finished:
        lines.append(f"local training alone is not finished ({found.baseline.state}): --resume goes on with it")
    return "\n".join(["", *lines, *how_to_load(run)])


def on_own_data(evaluation: dict, metric: str) -> dict | None:
    """Of an evaluation, the peers' models on their own distributions, in the same form; None where it has none.

    The consensus model has one value a peer, of which this is the mean.
    """
    own = evaluation.get("own")
    if not isinstance(own, dict) or metric not in own.get("peers", {}):
        return None
    consensus = own.get("consensus", {}).get(metric, {}).get("mean")
    found = {metric: own[metric], "peers": own["peers"]}
    return found if consensus is None else found | {"consensus": {metric: consensus}}


def _others(run: RunData, evaluation: dict, primary: str) -> list[str]:
    """The means over peers of the other metrics of an evaluation."""
    means = {name: number(evaluation, name, "mean") for name in metrics_of(run) if name != primary and name in evaluation}
    return [f"mean over peers of {', '.join(f'{name} {_cell(mean)}' for name, mean in means.items())}"] if means else []


def _rows(columns: list[tuple[str, dict]], last: dict, primary: str) -> list[list[str]]:
    """A head, and a row for each peer, their mean and the consensus; `columns`: (name, evaluation)."""
    rows = [["peer"] + [name for name, _ in columns]]
    for peer in range(len(last["peers"][primary])):
        rows.append([str(peer)] + [_cell(e["peers"][primary][peer]) for _, e in columns])
    rows.append(["mean"] + [_cell(e[primary]["mean"]) for _, e in columns])
    if "consensus" in last:
        # a continued run may have switched this evaluation on or off
        rows.append(["consensus"] + [_cell(e.get("consensus", {}).get(primary)) for _, e in columns])
    return rows


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def how_to_load(run: Path) -> list[str]:
    from dfl.store.checkpoints import latest
    folder = latest(run)
    if folder is None:
        return ["adapters: none, the run has no complete checkpoint"]
    return [f"adapters: {folder}/peer-*, consensus in {folder}/consensus", "load one with stock PEFT:",
            f"  PeftModel.from_pretrained(base_model, {str(folder / 'consensus')!r})   # base_model: see run.json, facts.base",
            f"evaluate again: python -m dfl eval {run}"]


def align(rows: list[list[str]]) -> str:
    """Columns to the right, the first to the left, a rule under the heading."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def clock(seconds: float) -> str:
    """3725 as `1:02:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
