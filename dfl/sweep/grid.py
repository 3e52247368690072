"""The file of a sweep: a recipe and which of its fields take which values; every combination is a cell with a configuration."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dfl.config import Config, resolve
from dfl.config.aliases import ALIASES, apply, own_names
from dfl.config.recipes import number, parse_overrides, read_yaml
from dfl.plugins import did_you_mean
from dfl.run import build
from dfl.run.callbacks import load_callbacks, locate
from dfl.tasks import models
from dfl.transport import hosting

KEYS = ("recipe", "grid", "together", "exclude", "include", "output")
_OUTPUT = ("output", "output_dir")


class Cell(NamedTuple):
    """One combination: the values of all axes by dotted field, everything the sweep's file sets in it, and what it resolves to."""

    fields: dict[str, Any]
    given: dict[str, Any]
    config: Config


class Sweep(NamedTuple):
    """`base`: the recipe's tree before any field of the grid; `axes`: the fields that differ between cells."""

    output: Path
    base: dict[str, Any]
    axes: list[str]
    cells: list[Cell]


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in the YAML file `path`. An override holds in all runs, instead of a field of the grid too; --output is the
    sweep's folder. Nothing is loaded or written.

    ValueError names the field, or the cell that does not resolve to a configuration.
    """
    tree = read_yaml(path)
    for key, value in tree.items():
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r} = {value!r}{did_you_mean(key, KEYS)} in a sweep; allowed: {', '.join(KEYS)}")
    if not tree.get("grid") and not tree.get("together"):
        raise ValueError(f"grid is missing in {str(path)!r}: a sweep needs fields and their values")
    pairs = parse_overrides(list(overrides))
    output = next((value for key, value in reversed(pairs) if key in _OUTPUT), tree.get("output"))
    if not isinstance(output, str) or not output.strip():
        raise ValueError(f"output = {output!r} of {str(path)!r} must be a folder for all of its runs")
    pairs = [(key, value) for key, value in pairs if key not in _OUTPUT]
    include = _patterns(tree, "include")
    choices = _overridden(read_axes(tree), include, dict(pairs))
    base = apply(own_names(_recipe(tree, path)), pairs)
    base = {key: value for key, value in base.items() if key != "output"}
    varying = [key for group in choices for key in group if len(group[key]) > 1]
    axes = list(dict.fromkeys([*varying, *(key for cell in include for key in cell)]))
    output = resolve({"output": output}).output  # $NAME and ~
    given = [*expand(choices, _patterns(tree, "exclude"), partial=bool(pairs)), *include]
    return Sweep(Path(output), base, axes, _cells(base, given, axes))


def _recipe(tree: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The recipe itself, or what is in the file it names: beside the sweep's own, else from the working directory."""
    recipe = tree.get("recipe")
    if isinstance(recipe, Mapping) or recipe is None:
        return dict(recipe or {})
    if not isinstance(recipe, str):
        raise ValueError(f"recipe = {recipe!r} must be the path of a recipe, or a mapping of fields")
    beside = path.parent / recipe
    return read_yaml(beside if beside.is_file() else Path(recipe))


def read_axes(tree: Mapping[str, Any]) -> list[dict[str, list]]:
    """Groups of fields that move together, each field with its values; a field of `grid` is a group of its own."""
    grid = tree.get("grid") or {}
    if not isinstance(grid, Mapping):
        raise ValueError(f"grid = {grid!r} must be a mapping from dotted fields to lists of values")
    groups = [{key: values} for key, values in grid.items()]
    together = tree.get("together") or []
    together = [together] if isinstance(together, Mapping) else together
    for group in together if isinstance(together, list) else [None]:
        if not isinstance(group, Mapping) or not group:
            raise ValueError(f"together = {together!r} must be a mapping from fields to lists of equal length, or a list of these")
        groups.append(dict(group))
    seen: set[str] = set()
    for group in groups:
        for key, values in group.items():
            _check_axis(key, values, seen)
        if len({len(values) for values in group.values()}) > 1:
            lengths = ", ".join(f"{key}: {len(values)}" for key, values in group.items())
            raise ValueError(f"together needs lists of equal length, got {lengths}")
    return [{key: number(list(values)) for key, values in group.items()} for group in groups]


def _overridden(choices: list[dict[str, list]], include: list[dict[str, Any]], given: dict[str, Any]) -> list[dict[str, list]]:
    """The groups, with an overridden field of the grid at its one value. ValueError for an override that would be lost."""
    groups = [{key: [given[key]] for key in group} if len(group) == 1 and set(group) <= set(given) else group for group in choices]
    fixed = {key for group in groups for key in group if len(group) == 1 and key in given}
    for key, value in given.items():
        for axis in [axis for axis in itertools.chain(*groups) if axis not in fixed] + list(itertools.chain(*include)):
            if f"{key}.".startswith(f"{axis}."):
                raise ValueError(f"override --{key} = {value!r}: the sweep sets {axis} by itself")
    return groups


def _check_axis(key: Any, values: Any, seen: set[str]) -> None:
    if not isinstance(key, str):
        raise ValueError(f"{key!r} is no field; allowed: dotted names such as train.lr")
    if key in _OUTPUT:
        raise ValueError(f"{key} cannot vary: every run has a folder of its own below the output of the sweep")
    if key in seen:
        raise ValueError(f"{key} stands twice among the fields of grid and together")
    seen.add(key)
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} = {values!r} must be a list of at least one value")
    texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise ValueError(f"{key} has the value {twice} twice")


def _patterns(tree: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    patterns = tree.get(name) or []
    patterns = [patterns] if isinstance(patterns, Mapping) else patterns
    good = isinstance(patterns, list) and all(isinstance(pattern, Mapping) and pattern for pattern in patterns)
    if not good or not all(isinstance(key, str) for pattern in patterns for key in pattern):
        raise ValueError(f"{name} = {patterns!r} must be a list of mappings from dotted fields to values")
    return [number(dict(pattern)) for pattern in patterns]


def expand(choices: list[dict[str, list]], exclude: list[dict[str, Any]], partial: bool = False) -> list[dict[str, Any]]:
    """Every combination, the last group fastest, without those that a pattern of `exclude` matches in all of its fields.

    ValueError for a pattern that matches none, unless the grid is only a part of what was written.
    """
    rows = [[dict(zip(group, values, strict=True)) for values in zip(*group.values(), strict=True)] for group in choices]
    combinations = [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*rows)]
    known = [key for group in choices for key in group]
    for pattern in exclude:
        for key in pattern:
            if key not in known:
                raise ValueError(f"exclude: {key!r} is no field of the grid{did_you_mean(key, known)}; allowed: {', '.join(known)}")
        if not partial and not any(_matches(cell, pattern) for cell in combinations):
            raise ValueError(f"exclude: {pattern!r} matches no run of the grid")
    return [cell for cell in combinations if not any(_matches(cell, pattern) for pattern in exclude)]


def _matches(cell: Mapping[str, Any], pattern: Mapping[str, Any]) -> bool:
    """`method: tad` matches `{name: tad, T: 5}` as well, and `{name: tad}` every one that has at least these parameters."""
    def same(value: Any, wanted: Any) -> bool:
        if isinstance(value, Mapping) and isinstance(wanted, (str, Mapping)):
            wanted = {"name": wanted} if isinstance(wanted, str) else wanted
            return all(key in value and value[key] == part for key, part in wanted.items())
        return value == wanted

    return all(same(cell[key], wanted) for key, wanted in pattern.items())


def _cells(base: dict[str, Any], combinations: Iterable[dict[str, Any]], axes: list[str]) -> list[Cell]:
    cells: list[Cell] = []
    for given in combinations:
        try:
            # a whole plug-in before its parameters: `method` before `method.T`
            config = resolve(base, sorted(given.items(), key=lambda pair: pair[0].count(".")))
        except ValueError as error:
            raise ValueError(f"run {len(cells)} ({describe(given)}): {error}") from None
        cells.append(Cell({key: given.get(key, lookup(config, key)) for key in axes}, given, config))
    if not cells:
        raise ValueError("the sweep has no run: exclude leaves none")
    seen: dict[str, int] = {}
    for index, cell in enumerate(cells):
        earlier = seen.setdefault(json.dumps(cell.config.to_dict(), sort_keys=True, default=str), index)
        if earlier != index:
            raise ValueError(f"runs {earlier} ({describe(cells[earlier].given)}) and {index} ({describe(cell.given)}) are the same "
                             "configuration")
    return cells


def lookup(config: Config, dotted: str) -> Any:
    """The value of a field in a resolved configuration; a plug-in without parameters as its name, None where there is none."""
    value: Any = config.to_dict()
    for key in (ALIASES[dotted].own if dotted in ALIASES else dotted).split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value["name"] if isinstance(value, Mapping) and set(value) == {"name"} else value


def describe(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in given.items()) or "as the recipe says"


def check(sweep: Sweep, indices: Iterable[int] | None = None, processes: int = 1, *, execute: bool = True) -> None:
    """Refuse the first cell that cannot run, in so many processes: everything that can be told before a model is loaded.

    execute: also import the callbacks that recipes name, which is to run their code. ValueError names the cell's fields.
    """
    located: set[str] = set()
    for index in range(len(sweep.cells)) if indices is None else indices:
        cell = sweep.cells[index]
        try:
            build.check(cell.config)
            for reference in cell.config.callbacks:
                locate(reference)
            if execute:
                load_callbacks(cell.config.callbacks)
            hosting(cell.config.peers, processes)
            _check_files(cell.config, located)
        except ValueError as error:
            raise ValueError(f"run {index} ({describe(cell.given)}): {error}") from None


def _check_files(config: Config, located: set[str]) -> None:
    for key in ("train", "valid") if config.data.source == "file" else ():
        value = getattr(config.data, key)
        if value is not None and not Path(value).is_file():
            raise ValueError(f"data.{key} = {value!r} is not a file")
    if config.model.name not in located:
        models.locate(config.model)
        located.add(config.model.name)


def with_output(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"output": str(folder)})
