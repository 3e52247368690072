"""Run folders as they lie on disk, finished or not: what is readable is read, what is not is named."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dfl.callbacks import ENDED
from dfl.jsonlines import scan

# metrics that fall as a model gets better, for runs that do not say it themselves
FALLING = {"loss", "perplexity"}


@dataclass(frozen=True)
class RunData:
    """A run as its folder tells it. `records` are the lines of metrics.jsonl, `problems` what could not be read."""

    folder: Path
    name: str
    config: dict
    about: dict
    records: list[dict]
    problems: list[str] = field(default_factory=list)
    baseline: "RunData | None" = None

    @property
    def facts(self) -> dict:
        return _mapping(self.about.get("facts"))

    @property
    def total(self) -> int | None:
        """The rounds it was started for."""
        rounds = _mapping(self.config.get("train")).get("rounds")
        return rounds if isinstance(rounds, int) else None

    @property
    def done(self) -> int:
        return max((record["round"] for record in self.records), default=0)

    @property
    def finished(self) -> bool:
        """At its last round, or ended by a callback."""
        return bool(self.records) and ((self.total is not None and self.done >= self.total) or (self.folder / ENDED).is_file())

    @property
    def state(self) -> str:
        if not self.records:
            return "no round recorded"
        return "finished" if self.finished else f"unfinished, {self.done} of {self.total or '?'} rounds"

    @property
    def num_peers(self) -> int:
        return max((len(values) for r in self.records for values in _mapping(_mapping(r.get("eval")).get("peers")).values()),
                   default=self.config.get("peers", 0) if isinstance(self.config.get("peers"), int) else 0)


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "run.json").is_file()


def read_description(run: Path) -> dict:
    """run.json; empty when it is not there or not whole."""
    try:
        return _mapping(json.loads((run / "run.json").read_text()))
    except (OSError, ValueError):
        return {}


def read_run(folder: Path, name: str | None = None) -> RunData:
    """ValueError for a folder that is no run; everything else that is missing or torn becomes a problem of the run."""
    folder = Path(folder)
    if not is_run(folder):
        raise ValueError(f"{str(folder)!r} holds no run (no recipe.yaml in it) and no sweep (no sweep.json in it)")
    problems, about = [], read_description(folder)
    if not about:
        problems.append("run.json is missing or damaged: no facts of the run")
    config = _recipe(folder) or _mapping(about.get("config"))
    if not config:
        problems.append("recipe.yaml is missing or damaged: no configuration")
    records = read_records(folder / "metrics.jsonl", problems)
    alone = folder / "baseline-local"
    return RunData(folder, name or folder.resolve().name, config, about, records, problems,
                   read_run(alone, f"{name or folder.resolve().name}, local") if is_run(alone) else None)


def _recipe(folder: Path) -> dict:
    try:
        return _mapping(yaml.safe_load((folder / "recipe.yaml").read_text()))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def read_records(path: Path, problems: list[str] | None = None) -> list[dict]:
    """The rounds of a metrics file; what is damaged is left out and named in `problems`, also a last line that a kill has torn."""
    problems = [] if problems is None else problems
    try:
        found = scan(path.read_bytes())
    except OSError:
        problems.append("metrics.jsonl is not there: no round was recorded")
        return []
    problems += [found.problem] if found.problem else []
    problems += ["the last line of metrics.jsonl is torn, as by a kill, and is left out"] if found.torn else []
    return found.records


def read_all(folders: list[Path]) -> tuple[list[RunData], list[str]]:
    """The runs of run folders and sweep folders, each once; and of a sweep, which runs failed or have not begun, and why.

    ValueError names a folder that is neither.
    """
    runs, notes, seen = [], [], set()
    for folder in map(Path, folders):
        listed = list(_sweep(folder, notes)) if is_sweep(folder) else [(folder, None)]
        for path, name in listed:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                runs.append(read_run(path, name))
    return runs, notes


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def _sweep(folder: Path, notes: list[str]) -> Iterator[tuple[Path, str]]:
    from dfl.sweep import read
    for entry in read(folder):
        if entry.state == "failed":
            notes.append(f"{entry.name}: failed: {entry.error}")
        if is_run(entry.output):
            yield entry.output, entry.name
        elif entry.state != "failed":
            notes.append(f"{entry.name}: has not begun")


def number(record: dict, *keys: str) -> float | None:
    """A number inside nested mappings; None where there is none, or where it was not finite."""
    value = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def primary_of(facts: dict, evaluation: dict) -> tuple[str, bool]:
    """The task's primary metric, and whether more of it is better; for older runs, guessed from what was evaluated."""
    if isinstance(facts.get("primary"), str) and isinstance(facts.get("higher_is_better"), bool):
        return facts["primary"], facts["higher_is_better"]
    known = [name for name in ("accuracy", "perplexity") if name in evaluation]
    others = (name for name in evaluation if name not in ("peers", "consensus", "own"))
    primary = known[0] if known else next(others, "accuracy")
    return primary, primary not in FALLING


def metrics_of(run: RunData) -> list[str]:
    """Everything that was evaluated, in the order of the records."""
    names: dict[str, None] = {}
    for record in run.records:
        names |= dict.fromkeys(_mapping(_mapping(record.get("eval")).get("peers")))
    return list(names)


def choose_metric(runs: list[RunData], metric: str | None) -> tuple[str, bool]:
    """The metric a report is about: `metric`, or the primary one of the runs. ValueError when the runs do not share it."""
    primaries = {primary_of(run.facts, next((r["eval"] for r in run.records if _mapping(r.get("eval"))), {})): run
                 for run in runs if run.facts.get("primary") or metrics_of(run)}
    if metric is None:
        if len(primaries) > 1:
            names = ", ".join(sorted(name for name, _ in primaries))
            raise ValueError(f"metric: the runs have several primary metrics ({names}); choose one that they share, such as "
                             "--metric loss")
        return next(iter(primaries), ("accuracy", True))
    known = sorted({name for run in runs for name in metrics_of(run)})
    if known and metric not in known:
        raise ValueError(f"metric = {metric!r} was not evaluated; allowed: {', '.join(known)}")
    return metric, dict(primaries).get(metric, metric not in FALLING)


def evaluated(run: RunData, metric: str) -> list[dict]:
    """The records with this metric of every peer, oldest first."""
    return [r for r in run.records if isinstance(_mapping(_mapping(r.get("eval")).get("peers")).get(metric), list)]


def comparable(records: list[dict], round_: int) -> dict:
    """The record of that round, or the last one where there is none: of a run beside another that stands at `round_`."""
    return next((record for record in records if record["round"] == round_), records[-1])


def short_of_end(run: RunData, record: dict) -> str:
    """`, round 2 of 6` for a record from before the run's last round; nothing for one of its end, or where nobody knows the end."""
    end = run.done if run.finished else run.total
    return "" if end is None or record["round"] >= end else f", round {record['round']} of {end}"


# phases in which the run is observed; in the others, peers work
OBSERVING = ("measure", "evaluate")


def work_seconds(record: dict) -> float:
    """The seconds of all phases but measuring and evaluating."""
    return sum(number(record, "seconds", name) or 0.0 for name in _mapping(record.get("seconds")) if name not in OBSERVING)


def spent(run: RunData) -> dict[int, tuple[float, float]]:
    """Round -> (bytes of all messages, seconds of work) from the beginning to the end of that round."""
    total_bytes, total_seconds, result = 0.0, 0.0, {}
    for record in run.records:
        total_bytes += number(record, "message_bytes") or 0
        total_seconds += work_seconds(record)
        result[record["round"]] = (total_bytes, total_seconds)
    return result


# what a record holds beside measurements of peers and rule
_BOOKKEEPING = {"round", "lr", "rates", "edges", "message_bytes", "wire_bytes", "control_bytes", "gathered_bytes", "rejected_senders",
                "train_loss", "train_loss_peers", "seconds", "trains", "eval", "measures", "layers"}


def scalars(record: dict) -> dict[str, float | None]:
    """Every measure of a round and every scalar a rule reports, by name; of {mean, min, max}, the mean. None: not finite."""
    found = {}
    own = {key: value for key, value in record.items() if key not in _BOOKKEEPING}
    for key, value in (_mapping(record.get("measures")) | own).items():
        value = value.get("mean") if isinstance(value, dict) and "mean" in value else value
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            found[key] = value
    return found


def layers(record: dict) -> dict[str, dict[str, float | None]]:
    """Diagnostics by layer: name -> layer -> value."""
    tables = _mapping(record.get("layers")) or _mapping(_mapping(record.get("measures")).get("layers"))
    return {name: table for name, table in tables.items() if isinstance(table, dict) and table}
