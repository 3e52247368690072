"""What a sweep's folder knows: which runs there are, where each lies, and how far it has come."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dfl.config import Config, Plugin
from dfl.config.aliases import ALIASES
from dfl.config.compare import described, differences
from dfl.config.recipes import number
from dfl.config.schema import plain
from dfl.store.directory import mark
from dfl.store.sweeps import MANIFEST, VERSION, SweepRun, failure_file, read_manifest, read_recipe, with_state
from dfl.sweep import clearing
from dfl.sweep.grid import Sweep, with_output
from dfl.sweep.names import names

# how a run is carried out, which changes neither its numbers nor what it leaves behind
_EXECUTION = {"device", "backend", "processes", "threads", "timeout", "report_to", "output"}


def note_failure(run: SweepRun, error: str | None) -> None:
    """Remember why a run failed, for whoever looks at the sweep; None: it did not, or is at work again."""
    if error is None:
        failure_file(run).unlink(missing_ok=True)
        return
    run.log.parent.mkdir(parents=True, exist_ok=True)
    failure_file(run).write_text(json.dumps({"error": error}))


def plan(sweep: Sweep, *, overwrite: bool = False) -> list[SweepRun]:
    """The sweep's runs in its folder. Runs of an earlier grid that have the same configuration keep their folders.

    ValueError when the folder holds something else, or a sweep of another recipe (which `overwrite` replaces). Nothing is written.
    """
    folder = sweep.output
    fresh = names([{key: cell.given[key] for key in sweep.axes if key in cell.given} for cell in sweep.cells], sweep.axes)
    earlier = read_manifest(folder)
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
        recipes = {run["name"]: read_recipe(folder / run["name"]) for run in earlier["runs"]}
        kept |= {_key(_of_result(_filled(recipe))): name for name, recipe in recipes.items() if recipe is not None}
    runs = []
    for index, (cell, name) in enumerate(zip(sweep.cells, fresh, strict=True)):
        name = kept.get(_key(_of_result(cell.config.to_dict())), kept.get(_key(cell.fields), name))
        run = SweepRun(index, name, plain(cell.fields), folder / name, "waiting", config=with_output(cell.config, folder / name))
        runs.append(run if overwrite else with_state(run))
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
    before = None if overwrite else read_recipe(run.output)
    if before is not None:
        _refuse_difference(_filled(before), run.config.to_dict(), [], run.output)


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
    folder, earlier = sweep.output, read_manifest(sweep.output)
    if earlier is None:
        mark(folder, "sweep")
    elif overwrite:
        left = clearing.begin_again(folder, [run["name"] for run in earlier["runs"]])
        if left:
            print(f"dfl: left in {str(folder)!r}, as no run is known to have written it: {', '.join(left)}", file=sys.stderr)
    listed = [{"index": run.index, "name": run.name, "fields": run.fields, "output": str(run.output)} for run in runs]
    tree = {"version": VERSION, "axes": sweep.axes, "runs": listed, "recipe": plain(sweep.base)}
    _write(folder / MANIFEST, json.dumps(tree, indent=1, default=str))


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
