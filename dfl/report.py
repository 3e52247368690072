"""Lines and tables that people read."""

from pathlib import Path

import yaml

from dfl.checkpoint import latest
from dfl.record import read_lines


def round_line(record: dict, primary: str) -> str:
    """One round in a line."""
    parts = [f"loss {record['train_loss']['mean']:.3f}", f"trains {record['trains']}", f"edges {record['edges']}"]
    if "measures" in record:
        parts.append(f"apart {record['measures']['consensus_distance']:.3g}")
    if "eval" in record:
        evaluation = record["eval"]
        values = evaluation[primary]
        text = f"{primary} {values['mean']:.4f} ({values['min']:.4f} to {values['max']:.4f})"
        if "consensus" in evaluation:
            text += f", consensus {evaluation['consensus'][primary]:.4f}"
        parts.append(text)
    return "  ".join(parts)


def evaluations(run: Path) -> list[dict]:
    """The records of a run that hold an evaluation, oldest first."""
    return [record for record in read_lines(run / "metrics.jsonl") if "eval" in record]


def best(records: list[dict], primary: str) -> dict:
    """The evaluation with the best mean over peers."""
    choose = max if primary == "accuracy" else min
    return choose(records, key=lambda r: r["eval"][primary]["mean"])


def closing_table(run: Path) -> str:
    """Before, after and best of every peer and of the consensus; against local training alone where that was run too."""
    records = evaluations(run)
    primary = "accuracy" if "accuracy" in records[0]["eval"] else "perplexity"
    first, last, top = records[0]["eval"], records[-1]["eval"], best(records, primary)
    rule = yaml.safe_load((run / "recipe.yaml").read_text())["rule"]["name"]
    alone = run / "baseline-local"
    baseline = evaluations(alone)[-1]["eval"] if (alone / "metrics.jsonl").exists() else None
    columns = [("before", first), (f"after {rule}", last)] + ([("local alone", baseline)] if baseline else [])
    rows = [["peer"] + [name for name, _ in columns]]
    for peer in range(len(last["peers"][primary])):
        rows.append([str(peer)] + [f"{e['peers'][primary][peer]:.4f}" for _, e in columns])
    rows.append(["mean"] + [f"{e[primary]['mean']:.4f}" for _, e in columns])
    if "consensus" in last:
        rows.append(["consensus"] + [f"{e['consensus'][primary]:.4f}" for _, e in columns])
    lines = [f"{primary} on the evaluation examples", align(rows),
             f"best mean over peers {top['eval'][primary]['mean']:.4f}, after round {top['round']}"]
    return "\n".join(["", *lines, *how_to_load(run)])


def how_to_load(run: Path) -> list[str]:
    folder = latest(run)
    return [f"adapters: {folder}/peer-*, consensus in {folder}/consensus", "load one:",
            f"  python -m dfl eval {run}",
            f"  PeftModel.from_pretrained(base_model, {str(folder / 'consensus')!r})   # base_model: see run.json, facts.base"]


def align(rows: list[list[str]]) -> str:
    """Columns to the right, the first to the left, a rule under the heading."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
