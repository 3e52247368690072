"""The folder of a run: who may write into it, and what process 0 leaves there and prints."""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import yaml

from dfl import partition, tasks
from dfl.config import Config, from_dict
from dfl.config.compare import described, differences
from dfl.config.recipes import read_yaml
from dfl.methods import phases_field
from dfl.report import evaluation_line, training_line
from dfl.run.advice import advice
from dfl.run.build import Loaded, chosen_slots
from dfl.run.checkpoint import choose
from dfl.run.console import Console
from dfl.run.description import describe_run
from dfl.run.loop import Run
from dfl.run.runtime import Runtime
from dfl.run.trackers import Trackers
from dfl.store.checkpoints import complete
from dfl.store.directory import OF_TRACKERS, all_records, clear, files, in_the_way, mark, marked, records_of, written
from dfl.store.jsonlines import rewind
from dfl.store.lease import SHARED_SECONDS, Lease, LeaseLostError, hold, owners
from dfl.store.records import JsonLines, of_peers
from dfl.store.runs import mapping, read_description
from dfl.training.privacy import spent
from dfl.transport.agreement import together

# so many of the files that --overwrite leaves are named
MAX_NAMED = 10
# more classes than this are not counted peer by peer
MAX_CLASSES = 100
# what may differ between a run and its continuation without changing the result
_FREE = {"device", "backend", "processes", "processes_per_peer", "threads", "timeout", "membership", "report_to", "callbacks",
         "output", "eval", "measure", "checkpoint", "baseline"}
# and what a run that is made longer changes
_OF_LENGTH = ("train.rounds", "method.ends", "schedule.ends")


def enter(config: Config, output: Path, runtime: Runtime, resume: bool, overwrite: bool) -> tuple[Lease, Path | None]:
    """The lease on the run's folder, which the caller gives back, and the checkpoint to go on from.

    ValueError on all processes for a folder that holds another run, is in use, or holds files that are not a run's. Nothing in it
    is changed yet.
    """
    first = runtime.place.rank == 0
    together(runtime.transport, lambda: refuse(config, output, resume, overwrite) if first and not owners(output) else None)
    with naming(output):
        lease = hold(output, runtime.transport)
    try:
        together(runtime.transport, lambda: refuse(config, output, resume, overwrite) if first else None)
        found = choose(output, runtime.transport) if resume else None
        if found is not None:
            together(runtime.transport, lambda: check_continuation(config, output) if first else None)
    except BaseException:
        lease.release()
        raise
    return lease, found


def look(config: Config, resume: bool, overwrite: bool) -> None:
    """ValueError as of `enter`, but for a folder that is in use. Only looks."""
    output = Path(config.output)
    refuse(config, output, resume, overwrite)
    if resume and complete(output):
        check_continuation(config, output)


def refuse(config: Config, output: Path, resume: bool, overwrite: bool) -> None:
    """ValueError unless a run may be put here. Only looks."""
    ours, going = marked(output), ()
    if output.exists() and not output.is_dir():
        raise ValueError(f"output = {config.output!r} is a file; a run needs a folder")
    if output.name.startswith("baseline-") and marked(output.parent):
        raise ValueError(f"output = {config.output!r} belongs to the run in {str(output.parent)!r}; give another --output")
    if resume and (ours or complete(output)):
        _refuse_baseline(config, output)
        return
    if overwrite and output.is_symlink():
        raise ValueError(f"output = {config.output!r} is a symbolic link, and nothing is removed through one; give the folder itself, "
                         f"{os.path.realpath(output)!r}")
    if ours and not overwrite and in_the_way(output, files(output), ()):
        raise ValueError(f"output = {config.output!r} already holds a run; pass --resume to go on, --overwrite to replace it, "
                         "or another --output")
    if ours and overwrite:
        going = written(output)
    _refuse_others(config, output, going)
    _refuse_baseline(config, output, going)


def _refuse_baseline(config: Config, output: Path, going: Iterable[Path] = ()) -> None:
    folder = output / f"baseline-{config.baseline}"
    if config.baseline and (going or not marked(folder) and not complete(folder)):
        _refuse_others(config, folder, going)


def _refuse_others(config: Config, folder: Path, going: Iterable[Path]) -> None:
    found = in_the_way(folder, files(folder), ("checkpoints", *(set(OF_TRACKERS) & set(config.report_to))), going)
    if found is None and folder.is_symlink() and folder != Path(config.output):
        found = folder
    if found is not None:
        raise ValueError(f"output = {config.output!r}: {str(found)!r} is there, and no run is known to have made it, so it is neither "
                         "replaced nor removed; give another --output, or move it away")


def make_room(output: Path, new: bool, overwrite: bool, lease: Lease) -> None:
    """The last step before a run writes: a marker, and for `overwrite` the files of the run that was there are removed."""
    lease.check()
    with naming(output):
        output.mkdir(exist_ok=True)
        _replace(output, new, overwrite)


def _replace(output: Path, new: bool, overwrite: bool) -> None:
    if overwrite and new and marked(output):
        left = clear(output)
        if left:
            named = ", ".join(left[:MAX_NAMED]) + (f" and {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else "")
            print(f"dfl: left in {str(output)!r}, as the run before is not known to have written it: {named}", file=sys.stderr,
                  flush=True)
    if new or not marked(output):
        mark(output)


def check_continuation(config: Config, output: Path) -> None:
    before, now = _begun_with(output / "recipe.yaml"), config.to_dict()
    longer = config.train.schedule.name.startswith("constant") and not config.train.warmup  # a constant run may be made longer
    found = [one for one in differences(before, now)
             if one.field.partition(".")[0] not in _FREE and not (longer and one.field in _OF_LENGTH)]
    if found:
        raise ValueError(f"{described(found)}, with which {str(output)!r} was begun; a run goes on as it began")


def continued(config: Config, output: Path) -> Config:
    """The configuration of a run that goes on: made longer, it keeps the phases that it had, which depend on where it was to end."""
    field = phases_field(config.method.name, config.method.params, chosen_slots(config))
    if field is None:
        return config
    before, tree = _begun_with(output / "recipe.yaml"), config.to_dict()
    ends = [end for end in (*before[field].get("ends", ()), before["train"]["rounds"]) if end < config.train.rounds]
    return from_dict(tree | {field: tree[field] | {"ends": ends}}) if ends else config


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


@contextlib.contextmanager
def naming(output: Path) -> Iterator[None]:
    """A failed write does not say where, as a failed open does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise


def begin(config: Config, run: Run, loaded: Loaded, output: Path, runtime: Runtime, new: bool, lease: Lease,
          quiet: bool = False) -> "Recording":
    """A start that fails (a full disk, a tracker without an account) leaves nothing that looks like a run."""
    try:
        with naming(output):
            return Recording(config, run, loaded, output, runtime, lease, new, quiet)
    except LeaseLostError:  # what is there now is another run's
        raise
    except (OSError, ValueError):
        if new:
            take_back(output, lease)
        raise


def take_back(output: Path, lease: Lease) -> None:
    """Remove what a start has written, and the folder where that was all (the lease removes what it has made itself)."""
    lease.check()
    for name in ("recipe.yaml", "run.json", "metrics.jsonl"):
        (output / name).unlink(missing_ok=True)


def check_shared(output: Path, transport, new: bool, lease: Lease) -> None:
    """ValueError on all processes unless all see what process 0 has just written: each will write its part of a checkpoint there."""
    path = output / "run.json"
    expected = transport.spread(hashlib.sha256(path.read_bytes()).digest() if transport.rank == 0 else b"")

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
            take_back(output, lease)
        raise


def write_whole(path: Path, text: str, lease: Lease) -> None:
    """All or nothing: a process that is killed here leaves the file that was there before."""
    lease.check()
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(text)
        lease.check()
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def describe_data(config: Config, loaded: Loaded, say: bool) -> None:
    """Add a summary of the data to the facts of the run, and print it."""
    bundle = loaded.bundle
    found = bundle.facts["data"] = tasks.summarise(bundle.task.name, bundle.train, bundle.valid, config.data)
    if say:
        print("\n".join(tasks.summary_lines(found)), file=sys.stderr, flush=True)


class OwnRecords:
    """What any other process writes: of each round what is of its own peers."""

    def __init__(self, output: Path, process: int, lease: Lease):
        self.lines = JsonLines(output / records_of(process), guard=lease.check)

    def round(self, record: dict) -> None:
        self.lines.write(of_peers(record))

    def close(self) -> None:
        self.lines.close()


class Recording:
    """What process 0 writes and prints."""

    def __init__(self, config: Config, run: Run, loaded: Loaded, output: Path, runtime: Runtime, lease: Lease, new: bool = True,
                 quiet: bool = False):
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "recipe.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False), lease)
        shards = partition.table(loaded.parts, loaded.bundle.train.labels, loaded.bundle.train.label_names)
        # JSON is written last: a folder with a run.json is a run that has started
        self.primary, before = run.evaluator.primary, None if new else read_description(output)
        facts = loaded.bundle.facts | {"primary": self.primary, "better": _directions(run, before),
                                       "shards": _shards(loaded), "method": run.gossip.method.facts, **_private(loaded, config),
                                       "state_length": run.peers.layout.size,
                                       "own": loaded.own if isinstance(loaded.own, str) else loaded.own.facts(),
                                       "processes": runtime.place.size, "device": str(runtime.device),
                                       "contents": dict(loaded.contents)}
        about = describe_run(config.to_dict(), facts, before)
        write_whole(output / "run.json", json.dumps(about, indent=1, default=str), lease)
        recorded = run.completed - (run.pending is not None)  # rounds
        for other in all_records(output):
            if run.resumed and other.name != records_of(0):  # before its process writes again, if there still is one
                lease.check()
                rewind(other, recorded + 1)
        self.lines = JsonLines(output / records_of(0), keep_before=recorded + 1 if run.resumed else 0, guard=lease.check)
        self.trackers = Trackers(config.report_to, output, config.to_dict())
        self.console = Console(config.train.rounds, recorded, quiet=quiet)
        if run.completed == 0:
            self.console.say(shards)
        self.console.say(_opening(config, run, runtime, loaded))
        for told in advice(config):
            self.console.say(told)

    def round(self, record: dict) -> None:
        self.lines.write(record)
        self.trackers.log(record["round"], record)
        if record["round"]:
            self.console.round(record["round"] - 1, training_line(record), "eval" in record, evaluation_line(record, self.primary))

    def close(self) -> None:
        self.console.close()
        self.trackers.close()
        self.lines.close()


def _directions(run: Run, before: dict | None) -> dict[str, str]:
    """Which way each metric gets better, also those of rounds from before the run went on with others."""
    found = mapping(mapping((before or {}).get("facts")).get("better"))
    return run.evaluator.better() | {name: way for name, way in found.items() if name not in run.evaluator.better()}


def _shards(loaded: Loaded) -> dict:
    """How many examples each peer holds, and where there are at most MAX_CLASSES classes, how many of each: (peers, classes)."""
    labels, num = loaded.bundle.train.labels, len(loaded.bundle.train.label_names)
    counted = [np.bincount(labels[part], minlength=num).tolist() for part in loaded.parts] if 0 < num <= MAX_CLASSES else None
    return {"examples": [len(part) for part in loaded.parts], "classes": counted}


def _private(loaded: Loaded, config: Config) -> dict:
    """What the whole run spends of the privacy of each peer's examples, where it says so."""
    if config.train.privacy.noise is None:
        return {}
    return {"privacy": spent(config.train, [len(part) for part in loaded.parts])}


def _opening(config: Config, run: Run, runtime: Runtime, loaded: Loaded) -> str:
    chosen = "".join(f", {key} = {value}" for key, value in run.gossip.method.facts.items())
    replaced = f" with rule {config.rule.name}" if config.rule is not None else ""
    return (f"{config.peers} peers on {runtime.place.size} process(es), {runtime.device}; "
            f"method {config.method.name}{replaced}{chosen}; topology {config.topology.name}; "
            f"{run.peers.layout.size:,} numbers a peer; "
            f"{len(loaded.bundle.train):,} training and {len(loaded.bundle.valid):,} evaluation examples")

