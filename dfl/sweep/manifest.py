"""What a sweep's folder knows: which runs there are, where each lies, and how far it has come."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dfl.callbacks import ENDED
from dfl.checkpoint import complete
from dfl.config import Config, Plugin
from dfl.config.aliases import ALIASES
from dfl.config.compare import described, differences
from dfl.config.recipes import number
from dfl.config.schema import plain
from dfl.run_directory import is_plain_name, mark
from dfl.sweep import clearing
from dfl.sweep.grid import Sweep, with_output
from dfl.sweep.names import names

MANIFEST = "sweep.json"
# how a run is carried out, which changes neither its numbers nor what it leaves behind
_EXECUTION = {"device", "backend", "processes", "threads", "timeout", "report_to", "output"}


class SweepRun(NamedTuple):
    """A run of a sweep. `state`: finished, failed, begun (at work, or interrupted) or waiting; `done` of `rounds` are saved."""

    index: int
    name: str
    fields: dict[str, Any]
    output: Path
    state: str
    done: int = 0
    rounds: int | None = None
    error: str | None = None
    config: Config | None = None

    @property
    def log(self) -> Path:
        return self.output.parent / "logs" / f"{self.name}.log"

    @property
    def recipe(self) -> Path:
        return self.output.parent / "recipes" / f"{self.name}.yaml"


def read(folder: Path) -> list[SweepRun]:
    """The runs of the sweep in `folder`, in its order. ValueError for a folder that holds no readable sweep.json."""
    manifest = _manifest(Path(folder))
    if manifest is None:
        raise ValueError(f"{str(folder)!r} holds no sweep (no {MANIFEST} in it)")
    # by their names, so that a sweep's folder may be moved
    return [_with_state(SweepRun(run["index"], run["name"], run["fields"], Path(folder) / run["name"], "waiting"))
            for run in manifest["runs"]]


def _manifest(folder: Path) -> dict | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if all({"index", "name", "fields"} <= set(run) and is_plain_name(run["name"]) for run in manifest["runs"]):
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{str(path)!r} is not the manifest of a sweep")


def _with_state(run: SweepRun) -> SweepRun:
    done, rounds, baseline = 0, None, None
    recipe = _read_recipe(run.output)
    if recipe is not None:
        done, rounds, baseline = _saved(run.output), recipe["train"]["rounds"], recipe.get("baseline")
    folders = [run.output] + ([run.output / f"baseline-{baseline}"] if baseline else [])
    error = _failure(run)
    if recipe is not None and all(_saved(folder) >= rounds or (folder / ENDED).is_file() for folder in folders):
        return run._replace(state="finished", done=done, rounds=rounds)
    state = "failed" if error is not None else "waiting" if recipe is None else "begun"
    return run._replace(state=state, done=done, rounds=rounds, error=error)


def _read_recipe(folder: Path) -> dict | None:
    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        return recipe if isinstance(recipe["train"]["rounds"], int) else None
    except (OSError, yaml.YAMLError, TypeError, KeyError):
        return None


def _saved(folder: Path) -> int:
    """The rounds in the last complete checkpoint."""
    found = complete(folder)
    return int(found[-1].name.removeprefix("round-")) if found else 0


def _failure_file(run: SweepRun) -> Path:
    return run.log.with_suffix(".failed.json")


def _failure(run: SweepRun) -> str | None:
    try:
        return str(json.loads(_failure_file(run).read_text())["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note_failure(run: SweepRun, error: str | None) -> None:
    """Remember why a run failed, for whoever looks at the sweep; None: it did not, or is at work again."""
    if error is None:
        _failure_file(run).unlink(missing_ok=True)
        return
    run.log.parent.mkdir(parents=True, exist_ok=True)
    _failure_file(run).write_text(json.dumps({"error": error}))


def plan(sweep: Sweep, *, overwrite: bool = False) -> list[SweepRun]:
    """The sweep's runs in its folder. Runs of an earlier grid that have the same configuration keep their folders.

    ValueError when the folder holds something else, or a sweep of another recipe (which `overwrite` replaces). Nothing is written.
    """
    folder = sweep.output
    fresh = names([{key: cell.given[key] for key in sweep.axes if key in cell.given} for cell in sweep.cells], sweep.axes)
    earlier = _manifest(folder)
    if earlier is not None and overwrite:
        clearing.check(folder, [run["name"] for run in earlier["runs"]])
        earlier = None
    if (folder / "recipe.yaml").exists():
        raise ValueError(f"output = {str(folder)!r} already holds a run; give the sweep a folder of its own")
    kept: dict[str, str] = {}
    if earlier is not None:
        _check_same_recipe(earlier, sweep)
        # by fields, and by configuration where the grid has other fields now
        kept = {_key(run["fields"]): run["name"] for run in earlier["runs"]}
        recipes = {run["name"]: _read_recipe(folder / run["name"]) for run in earlier["runs"]}
        kept |= {_key(_of_result(recipe)): name for name, recipe in recipes.items() if recipe is not None}
    runs = []
    for index, (cell, name) in enumerate(zip(sweep.cells, fresh, strict=True)):
        name = kept.get(_key(_of_result(cell.config.to_dict())), kept.get(_key(cell.fields), name))
        run = SweepRun(index, name, plain(cell.fields), folder / name, "waiting", config=with_output(cell.config, folder / name))
        runs.append(run if overwrite else _with_state(run))
    for run in runs:
        _check_same_run(run, overwrite)
    assert len({run.name for run in runs}) == len(runs)
    return runs


def listing(runs: list[SweepRun]) -> str:
    """A table of all runs: number, how far each has come, folder, fields."""
    rows = [(str(run.index), _progress(run), run.name, ", ".join(f"{key}: {_short(value)}" for key, value in run.fields.items()))
            for run in runs]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2]), row[3]]) for row in rows)


def _progress(run: SweepRun) -> str:
    return run.state if run.state == "finished" or run.rounds is None else f"{run.state} ({run.done} of {run.rounds} rounds)"


def _short(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()


def _key(value: Any) -> str:
    return json.dumps(plain(value), sort_keys=True, default=str)


def _of_result(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in _EXECUTION}


def _check_same_run(run: SweepRun, overwrite: bool) -> None:
    before = None if overwrite else _read_recipe(run.output)
    if before is not None:
        _refuse_difference(before, run.config.to_dict(), [], run.output)


def _check_same_recipe(earlier: dict, sweep: Sweep) -> None:
    axes = [ALIASES[axis].own if axis in ALIASES else axis for axis in [*earlier.get("axes", []), *sweep.axes]]
    _refuse_difference(_filled(earlier.get("recipe", {})), _filled(sweep.base), axes, sweep.output)


def _refuse_difference(before: dict, now: dict, axes: list[str], folder: Path) -> None:
    found = [one for one in differences(before, now) if one.field.partition(".")[0] not in _EXECUTION and not any(
        f"{one.field}.".startswith(f"{axis}.") or f"{axis}.".startswith(f"{one.field}.") for axis in axes)]
    if found:
        raise ValueError(f"{described(found)}, with which {str(folder)!r} was begun; give another output, or pass --overwrite to "
                         "begin again")


def _filled(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's tree with the defaults it leaves out, whether or not it could run by itself."""
    filled = Config().to_dict()
    for key, value in number(dict(tree)).items():
        if isinstance(getattr(Config(), key, None), Plugin):
            filled[key] = {"name": value} if isinstance(value, str) else value
        elif isinstance(value, Mapping) and isinstance(filled.get(key), dict):
            filled[key] = filled[key] | dict(value)
        else:
            filled[key] = value
    return filled


def write(sweep: Sweep, runs: list[SweepRun], *, overwrite: bool = False) -> None:
    """Put the manifest into the sweep's folder. `overwrite` removes the runs of an earlier one."""
    folder, earlier = sweep.output, _manifest(sweep.output)
    if earlier is None:
        mark(folder, "sweep")
    elif overwrite:
        left = clearing.begin_again(folder, [run["name"] for run in earlier["runs"]])
        if left:
            print(f"dfl: left in {str(folder)!r}, as no run is known to have written it: {', '.join(left)}", file=sys.stderr)
    listed = [{"index": run.index, "name": run.name, "fields": run.fields, "output": str(run.output)} for run in runs]
    _write(folder / MANIFEST, json.dumps({"axes": sweep.axes, "runs": listed, "recipe": plain(sweep.base)}, indent=1, default=str))


def write_recipe(run: SweepRun) -> None:
    """The resolved recipe of a run, for the process that carries it out."""
    _write(run.recipe, yaml.safe_dump(run.config.to_dict(), sort_keys=False))


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and not again when it stands there already: many tasks of a cluster do this at once."""
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
