"""What a path given to `dfl eval` or `dfl export` names: a run, a checkpoint of it, one model of a checkpoint, an exported model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dfl.store.checkpoints import complete
from dfl.store.directory import BEST
from dfl.store.manifest import UnreadableError, verify
from dfl.store.runs import read_description

ABOUT = "dfl.json"  # what an exported folder tells about itself
ADAPTER_CONFIG = "adapter_config.json"
# how the last word of an architecture tells the task
_TASKS = {"ForSequenceClassification": "sequence_classification", "ForImageClassification": "image_classification",
          "ForCausalLM": "causal_lm", "LMHeadModel": "causal_lm"}


class Target(NamedTuple):
    """`kind` is run, checkpoint, adapter or model; `folder` the path itself. What lies in no run has neither run nor checkpoint."""

    kind: str
    folder: Path
    run: Path | None = None
    checkpoint: Path | None = None


def say(text: str) -> None:
    print(f"dfl: {text}", file=sys.stderr, flush=True)


def find(path: Path) -> Target:
    """ValueError for a path that names nothing of these."""
    if (path / "recipe.yaml").is_file():
        return Target("run", path, path)
    if (path / "manifest.json").is_file():
        return Target("checkpoint", path, _run_of(path), path)
    if (path / ADAPTER_CONFIG).is_file():
        if path.resolve().parent.name == BEST and (path / "best.json").is_file():
            return Target("adapter", path, _run_of(path))
        inside = (path.resolve().parent / "manifest.json").is_file()
        checkpoint = path.resolve().parent if inside else None
        return Target("adapter", path, checkpoint and _run_of(checkpoint), checkpoint)
    if (path / "config.json").is_file():
        return Target("model", path)
    # the first words are those of a folder that should have been a run
    raise ValueError(f"{str(path)!r} holds no run (no recipe.yaml in it), no checkpoint (manifest.json), no adapter "
                     f"({ADAPTER_CONFIG}) and no model (config.json)")


def _run_of(checkpoint: Path) -> Path | None:
    run = checkpoint.resolve().parent.parent
    return run if (run / "recipe.yaml").is_file() else None


def choose_checkpoint(run: Path, rounds: int | None = None, tell: Callable[[str], None] = say) -> Path:
    """The newest whole checkpoint of a run, or that after `rounds` rounds. `tell` hears of damaged ones that are passed over.

    ValueError where there is none, and for a damaged one that was asked for.
    """
    published = complete(run)
    numbers = [int(folder.name.removeprefix("round-")) for folder in published]
    if rounds is not None:
        if rounds not in numbers:
            there = ", ".join(map(str, numbers)) or "none"
            raise ValueError(f"--round {rounds}: {str(run)!r} has no such checkpoint; it has: {there}")
        published = [published[numbers.index(rounds)]]
        verify(published[0])
    for folder in reversed(published):
        try:
            verify(folder)
        except UnreadableError as error:
            tell(f"passed over: {error}")
            continue
        return folder
    why = f": all of its {len(published)} are damaged" if published else ""
    raise ValueError(f"{str(run)!r} holds no complete checkpoint{why}")


def adapter_of(checkpoint: Path, peer: str) -> Path:
    """The folder of `--peer 3` or `--peer consensus` in a checkpoint. ValueError names the peers there are."""
    folder = checkpoint / (peer if peer == "consensus" else f"peer-{peer}")
    if not (peer == "consensus" or peer.isdecimal()) or not (folder / ADAPTER_CONFIG).is_file():
        names = sorted(int(p.name.removeprefix("peer-")) for p in checkpoint.glob("peer-*"))
        raise ValueError(f"--peer {peer!r} is not in {str(checkpoint)!r}; allowed: {names[0]} to {names[-1]}, consensus"
                         if names else f"{str(checkpoint)!r} holds no adapter")
    return folder


def best_of(run: Path, peer: str) -> Path:
    """The folder of the best model of `--peer 3` or `--peer consensus`. ValueError names those there are."""
    folder = run / BEST / (peer if peer == "consensus" else f"peer-{peer}")
    if not (folder / "best.json").is_file():
        names = sorted(path.parent.name.removeprefix("peer-") for path in run.glob(f"{BEST}/*/best.json"))
        raise ValueError(f"--best --peer {peer!r} is not in {str(run)!r}; " + (f"allowed: {', '.join(names)}" if names else
                         "a run keeps its best models with checkpoint.best: true"))
    return folder


def check_examples(run: Path | None, data: str | None) -> None:
    """ValueError for a run whose examples are those of somebody's own script, where no others are given."""
    script = read_description(run)["facts"].get("script") if run is not None and data is None and read_description(run) else None
    if script:
        raise ValueError(f"{str(run)!r} holds no examples: they are those of the script {script}; give --data FILE")


def read_json(path: Path) -> dict:
    """ValueError for a file that is missing or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object")
    return found


def about(folder: Path) -> dict:
    """What an exported folder, or a stock model's configuration, tells: the fields `model` and `data` of a recipe, label_names.

    ValueError where the task cannot be told.
    """
    if (folder / ABOUT).is_file():
        return read_json(folder / ABOUT)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = next(iter(config.get("architectures") or []), "")
    task = next((task for ending, task in _TASKS.items() if named.endswith(ending)), None)
    if task is None:
        raise ValueError(f"{str(folder)!r} does not tell its task (no {ABOUT}, no architecture of a task); "
                         "give --run RUN, the run it comes from")
    labels = config.get("id2label", {})
    if task == "sequence_classification" and len(labels) == 1:  # how transformers writes a regression
        return {"model": {"task": "sequence_regression"}, "data": {}, "label_names": []}
    return {"model": {"task": task}, "data": {}, "label_names": [labels[key] for key in sorted(labels, key=int)]}
