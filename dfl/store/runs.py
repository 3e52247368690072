"""Run directories as they lie on disk, finished or not: what is readable is read, what is not is named."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from dfl.config import Config, load
from dfl.config.recipes import upgraded
from dfl.store.directory import ENDED, all_records
from dfl.store.jsonlines import scan
from dfl.store.records import joined
from dfl.store.sweeps import read


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
        return mapping(self.about.get("facts"))

    @property
    def total(self) -> int | None:
        """The rounds it was started for; None where nobody knew: a loop of somebody's own goes on until it ends."""
        if self.facts.get("open"):
            return None
        rounds = mapping(self.config.get("train")).get("rounds")
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
        return max((len(values) for r in self.records for values in mapping(mapping(r.get("eval")).get("peers")).values()),
                   default=self.config.get("peers", 0) if isinstance(self.config.get("peers"), int) else 0)


def mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() or (folder / "run.json").is_file()


def is_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").is_file()


def read_description(run: Path) -> dict:
    """run.json; empty when it is not there or not whole."""
    try:
        return mapping(json.loads((run / "run.json").read_text()))
    except (OSError, ValueError):
        return {}


def read_run(folder: Path, name: str | None = None) -> RunData:
    """ValueError for a folder that is no run; everything else that is missing or torn becomes a problem of the run."""
    folder = Path(folder)
    if not is_run(folder):
        raise ValueError(f"{str(folder)!r} holds no run (no recipe.yaml in it) and no sweep (no sweep.json in it)")
    problems, about = [], read_description(folder)
    if not about:
        problems.append("run.json is missing or damaged: no facts of the run; more of a metric is taken to be better")
    config = _recipe(folder) or upgraded(mapping(about.get("config")))
    if not config:
        problems.append("recipe.yaml is missing or damaged: no configuration")
    records = read_records(folder / "metrics.jsonl", problems)
    alone = folder / "baseline-local"
    return RunData(folder, name or folder.resolve().name, config, about, records, problems,
                   read_run(alone, f"{name or folder.resolve().name}, local") if is_run(alone) else None)


def _recipe(folder: Path) -> dict:
    try:
        return upgraded(mapping(yaml.safe_load((folder / "recipe.yaml").read_text())))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def read_records(path: Path, problems: list[str] | None = None) -> list[dict]:
    """The rounds of a metrics file; what is damaged is left out and named in `problems`, also a last line that a kill has torn."""
    problems = [] if problems is None else problems
    try:
        found = [scan(path.read_bytes()), *(scan(file.read_bytes(), file.name) for file in all_records(path.parent)[1:])]
    except OSError:
        problems.append("metrics.jsonl is not there: no round was recorded")
        return []
    problems += [one.problem for one in found if one.problem]
    problems += [f"the last line of {one.name} is torn, as by a kill, and is left out" for one in found if one.torn]
    return joined([one.records for one in found])


def read_all(folders: list[Path]) -> tuple[list[RunData], list[str]]:
    """The runs of run folders and sweep folders, each once; and of a sweep, which runs failed or have not begun, and why.

    ValueError names a folder that is neither.
    """
    runs: list[RunData] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for folder in map(Path, folders):
        listed = list(_sweep(folder, notes)) if is_sweep(folder) else [(folder, None)]
        for path, name in listed:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                runs.append(read_run(path, name))
    return runs, notes


def _sweep(folder: Path, notes: list[str]) -> Iterator[tuple[Path, str]]:
    for entry in read(folder):
        if entry.state == "failed":
            notes.append(f"{entry.name}: failed: {entry.error}")
        if is_run(entry.output):
            yield entry.output, entry.name
        elif entry.state != "failed":
            notes.append(f"{entry.name}: has not begun")


def read_config(output: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration a run was started with."""
    if not (output / "recipe.yaml").is_file():
        raise ValueError(f"{str(output)!r} holds no run (no recipe.yaml in it)")
    return load(output / "recipe.yaml", overrides)
