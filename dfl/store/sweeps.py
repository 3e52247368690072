"""The folder of a sweep as it lies on disk: which runs there are, where each lies, and how far it has come."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from dfl.config.recipes import upgraded
from dfl.store.checkpoints import complete
from dfl.store.directory import ENDED, is_plain_name

if TYPE_CHECKING:
    from dfl.config import Config

MANIFEST, VERSION = "sweep.json", 2


class SweepRun(NamedTuple):
    """A run of a sweep. `state`: finished, failed, begun (at work, or interrupted) or waiting; `done` of `rounds` are saved."""

    index: int  # type: ignore[assignment]  # the method of tuples of that name is not used
    name: str
    fields: dict[str, Any]
    output: Path
    state: str
    done: int = 0
    rounds: int | None = None
    error: str | None = None
    config: "Config | None" = None

    @property
    def log(self) -> Path:
        return self.output.parent / "logs" / f"{self.name}.log"

    @property
    def recipe(self) -> Path:
        return self.output.parent / "recipes" / f"{self.name}.yaml"


def read(folder: Path) -> list[SweepRun]:
    """The runs of the sweep in `folder`, in its order. ValueError for a folder that holds no readable sweep.json."""
    manifest = read_manifest(Path(folder))
    if manifest is None:
        raise ValueError(f"{str(folder)!r} holds no sweep (no {MANIFEST} in it)")
    # by their names, so that a sweep's folder may be moved
    return [with_state(SweepRun(run["index"], run["name"], run["fields"], Path(folder) / run["name"], "waiting"))
            for run in manifest["runs"]]


def read_manifest(folder: Path) -> dict | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if all({"index", "name", "fields"} <= set(run) and is_plain_name(run["name"]) for run in manifest["runs"]):
            return manifest if "version" in manifest else _from_1(manifest)
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{str(path)!r} is not the manifest of a sweep")


def _from_1(manifest: dict) -> dict:
    """The first version named no version, and a method stood under `rule`."""
    def named(key: str) -> str:
        return "method" + key.removeprefix("rule") if key.partition(".")[0] == "rule" else key

    runs = [run | {"fields": {named(key): value for key, value in run["fields"].items()}} for run in manifest["runs"]]
    return {"version": VERSION, "axes": [named(axis) for axis in manifest.get("axes", [])], "runs": runs,
            "recipe": {named(key): value for key, value in manifest.get("recipe", {}).items()}}


def with_state(run: SweepRun) -> SweepRun:
    done: int = 0
    rounds: Any = None
    baseline = None
    recipe = read_recipe(run.output)
    if recipe is not None:
        done, rounds, baseline = _saved(run.output), recipe["train"]["rounds"], recipe.get("baseline")
    folders = [run.output] + ([run.output / f"baseline-{baseline}"] if baseline else [])
    error = _failure(run)
    if recipe is not None and all(_saved(folder) >= rounds or (folder / ENDED).is_file() for folder in folders):
        return run._replace(state="finished", done=done, rounds=rounds)
    state = "failed" if error is not None else "waiting" if recipe is None else "begun"
    return run._replace(state=state, done=done, rounds=rounds, error=error)


def read_recipe(folder: Path) -> dict | None:
    try:
        recipe = upgraded(yaml.safe_load((folder / "recipe.yaml").read_text()))
        return recipe if isinstance(recipe["train"]["rounds"], int) else None
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return None


def _saved(folder: Path) -> int:
    """The rounds in the last complete checkpoint."""
    found = complete(folder)
    return int(found[-1].name.removeprefix("round-")) if found else 0


def failure_file(run: SweepRun) -> Path:
    return run.log.with_suffix(".failed.json")


def _failure(run: SweepRun) -> str | None:
    try:
        return str(json.loads(failure_file(run).read_text())["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
