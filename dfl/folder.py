"""The folder of a run: who may write into it, and what process 0 leaves there and prints."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import yaml

from dfl import partition
from dfl.assemble import Loaded
from dfl.checkpoint import choose
from dfl.company import together
from dfl.config import Config, from_dict, load
from dfl.config.compare import described, differences
from dfl.config.recipes import read_yaml
from dfl.record import Console, JsonLines, Trackers, describe_run
from dfl.report import evaluation_line, training_line
from dfl.rounds import Run
from dfl.runtime import Runtime

# a file system on a network may show within this time only what another machine has written
SHARED_SECONDS = 30.0
# more classes than this are not counted peer by peer
MAX_CLASSES = 100
# what may differ between a run and its continuation without changing the result
_FREE = {"device", "backend", "processes", "threads", "timeout", "report_to", "callbacks", "output", "eval", "measure", "checkpoint",
         "baseline"}


def prepare(config: Config, output: Path, runtime: Runtime, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from. Refuses a folder that holds another run before anything is touched."""
    if resume:
        found = choose(output, runtime.transport)
        if found is not None:
            together(runtime.transport, lambda: _check_continuation(config, output) if runtime.place.rank == 0 else None)
        return found
    together(runtime.transport, lambda: _make_room(config, output, overwrite) if runtime.place.rank == 0 else None)
    return None


def _make_room(config: Config, output: Path, overwrite: bool) -> None:
    if (output / "recipe.yaml").exists() and not overwrite:
        raise ValueError(f"output = {config.output!r} already holds a run; pass --resume to go on, --overwrite to replace it, "
                         "or another --output")
    if overwrite and (output / "recipe.yaml").exists():
        # the recipe is last: a start that is killed here leaves no checkpoints of which nobody knows the run
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        shutil.rmtree(output)


def _check_continuation(config: Config, output: Path) -> None:
    before, now = _begun_with(output / "recipe.yaml"), config.to_dict()
    longer = config.train.schedule == "constant" and not config.train.warmup  # a constant run may be made longer
    found = [one for one in differences(before, now)
             if one.field.partition(".")[0] not in _FREE and not (longer and one.field == "train.rounds")]
    if found:
        raise ValueError(f"{described(found)}, with which {str(output)!r} was begun; a run goes on as it began")


def _begun_with(recipe: Path) -> dict:
    """What a run was begun with; fields that its recipe does not know yet have their defaults. ValueError for a damaged recipe."""
    try:
        tree = read_yaml(recipe)
        if not tree:
            raise ValueError(f"recipe {str(recipe)!r} is empty")
        return from_dict(tree).to_dict()
    except ValueError as error:
        raise ValueError(f"the run cannot go on, its recipe is damaged or of another version: {error}"
                         + (f" (in {str(recipe)!r})" if str(recipe) not in str(error) else "")) from None


def begin(config: Config, run: Run, loaded: Loaded, output: Path, runtime: Runtime, new: bool) -> "Recording":
    """A start that fails (a full disk, a tracker without an account) leaves nothing that looks like a run."""
    try:
        return Recording(config, run, loaded, output, runtime)
    except (OSError, ValueError) as error:
        if new:
            clear(output)
        if isinstance(error, OSError) and error.filename is None:  # a write does not say where, as an open does
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise


def clear(output: Path) -> None:
    """Take away what a start has written."""
    for name in ("recipe.yaml", "run.json", "metrics.jsonl"):
        (output / name).unlink(missing_ok=True)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()


def check_shared(output: Path, transport, new: bool) -> None:
    """ValueError on all processes unless all see what process 0 has just written: each will write its part of a checkpoint there."""
    path = output / "run.json"
    expected = transport.share(hashlib.sha256(path.read_bytes()).digest() if transport.rank == 0 else b"")[0]

    def see() -> None:
        until = time.monotonic() + SHARED_SECONDS
        while not path.is_file() or hashlib.sha256(path.read_bytes()).digest() != expected:
            if time.monotonic() > until:
                raise ValueError(f"output = {str(output)!r} does not show here what process 0 has written to it; it must lie on a "
                                 "file system that all processes share")
            time.sleep(0.1)

    try:
        together(transport, see)
    except ValueError:
        if new and transport.rank == 0:
            clear(output)
        raise


def write_whole(path: Path, text: str) -> None:
    """All or nothing: a process that is killed here leaves the file that was there before."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class Recording:
    """What process 0 writes and prints."""

    def __init__(self, config: Config, run: Run, loaded: Loaded, output: Path, runtime: Runtime):
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "recipe.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        shards = partition.table(loaded.parts, loaded.bundle.train.labels, loaded.bundle.train.label_names)
        # JSON is written last: a folder with a run.json is a run that has started
        self.primary = run.task.primary
        facts = loaded.bundle.facts | {"primary": self.primary, "higher_is_better": run.task.higher_is_better,
                                       "shards": _shards(loaded), "rule": dict(run.rule.facts), "state_length": run.peers.layout.size,
                                       "own": loaded.own if isinstance(loaded.own, str) else loaded.own.facts(),
                                       "processes": runtime.place.size, "device": str(runtime.device),
                                       "contents": dict(loaded.contents)}
        write_whole(output / "run.json", json.dumps(describe_run(config.to_dict(), facts), indent=1, default=str))
        self.lines = JsonLines(output / "metrics.jsonl", keep_before=run.completed + 1 if run.completed else 0)
        self.trackers = Trackers(config.report_to, output, config.to_dict())
        self.console = Console(config.train.rounds, run.completed)
        if run.completed == 0:
            self.console.say(shards)
        self.console.say(_opening(config, run, runtime, loaded))

    def round(self, record: dict) -> None:
        self.lines.write(record)
        self.trackers.log(record["round"], record)
        if record["round"]:
            self.console.round(record["round"] - 1, training_line(record), "eval" in record, evaluation_line(record, self.primary))

    def close(self) -> None:
        self.console.close()
        self.trackers.close()
        self.lines.close()


def _shards(loaded: Loaded) -> dict:
    """How many examples each peer holds, and where there are at most MAX_CLASSES classes, how many of each: (peers, classes)."""
    labels, num = loaded.bundle.train.labels, len(loaded.bundle.train.label_names)
    counted = [np.bincount(labels[part], minlength=num).tolist() for part in loaded.parts] if 0 < num <= MAX_CLASSES else None
    return {"examples": [len(part) for part in loaded.parts], "classes": counted}


def _opening(config: Config, run: Run, runtime: Runtime, loaded: Loaded) -> str:
    chosen = "".join(f", {key} = {value}" for key, value in run.rule.facts.items())
    return (f"{config.peers} peers on {runtime.place.size} process(es), {runtime.device}; rule {config.rule.name}{chosen}; "
            f"topology {config.topology.name}; {run.peers.layout.size:,} numbers a peer; "
            f"{len(loaded.bundle.train):,} training and {len(loaded.bundle.valid):,} evaluation examples")


def read_config(output: Path, overrides=()) -> Config:
    """The configuration a run was started with."""
    if not (output / "recipe.yaml").is_file():
        raise ValueError(f"{str(output)!r} holds no run (no recipe.yaml in it)")
    return load(output / "recipe.yaml", overrides)
