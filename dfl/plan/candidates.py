"""What is compared: every combination of topology, method, codec, trigger and interval that the framework does not refuse."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

import topologies
from dfl import extensions, methods
from dfl.config import Config, resolve
from dfl.config.recipes import number
from dfl.plugins import check_count, lookup
from dfl.run import build
from dfl.sweep.grid import expand
from dfl.sweep.grid import lookup as value_of

# option -> the field of a recipe that it varies, in the order of the table's columns
AXES = {"topologies": "topology", "methods": "method", "codecs": "codec", "triggers": "trigger", "intervals": "train.local_steps"}
FIELDS = tuple(AXES.values())
# beside what the recipe has
_USUAL = {"topologies": ("ring", "exponential", "one_peer_exponential", "complete"), "methods": (), "codecs": ("none", "int8"),
          "triggers": ("always",)}


class Combination(NamedTuple):
    """fields: the value of each of FIELDS, as a recipe has it; config: what a run of it has, with the network of the plan."""

    fields: dict[str, Any]
    config: Config

    @property
    def trained(self) -> str:
        """Combinations of the same have the same probe."""
        return json.dumps([self.fields["method"], self.fields["train.local_steps"]], sort_keys=True)


class Candidates(NamedTuple):
    """refused: how many combinations were left out, by reason."""

    combinations: list[Combination]
    refused: Counter[str]


def read_axis(option: str, text: str | None, config: Config) -> list[Any]:
    """The values of `--topologies` and the like, as a list in YAML's flow style without its brackets; None: the recipe's own beside
    a few usual ones. ValueError for a name that is not known, or an interval that is none."""
    if text is None:
        return _usual(option, config)
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        values = None
    if not isinstance(values, list) or not values:
        raise ValueError(f"--{option} {text!r} is no list; allowed: values with commas between them, as in a recipe, such as "
                         "ring,{name: random_regular, degree: 4}")
    for value in values:
        _check_value(option, value)
    return _once(number(values))


def _usual(option: str, config: Config) -> list[Any]:
    own = value_of(config, AXES[option])
    if option == "intervals":
        return [own, 2 * own]
    return _once([own, *_USUAL[option]])


def _check_value(option: str, value: Any) -> None:
    if option == "intervals":
        check_count("--intervals", value)
        return
    name = value.get("name") if isinstance(value, Mapping) else value
    if not isinstance(name, str):
        raise ValueError(f"--{option} {value!r} is not allowed; allowed: names, or mappings with a name and parameters")
    field = AXES[option]
    known = {"topology": dict.fromkeys(topologies.names()), "method": methods.METHODS}.get(field) or methods.SLOTS[field]
    lookup(f"--{option}", known, name)


def _once(values: Iterable[Any]) -> list[Any]:
    """`{name: ring}` and `ring` are the same."""
    found: dict[str, Any] = {}
    for value in values:
        plain = value["name"] if isinstance(value, Mapping) and set(value) == {"name"} else value
        found.setdefault(json.dumps(plain, sort_keys=True), plain)
    return list(found.values())


def read_axes(config: Config, given: Mapping[str, str | None]) -> dict[str, list[Any]]:
    """Field -> its values. given: the text of each option, or None. ValueError also for a recipe that counts epochs."""
    extensions.load(config.plugins)
    if config.train.local_epochs is not None or config.train.local_steps is None:
        raise ValueError(f"train.local_epochs = {config.train.local_epochs}: a plan counts local steps; allowed: train.local_steps")
    return {field: read_axis(option, given.get(option), config) for option, field in AXES.items()}


def total_steps(config: Config) -> int:
    """The local steps of a peer in a whole run of the recipe."""
    assert config.train.local_steps is not None  # `read_axes` has refused others
    return config.train.rounds * config.train.local_steps


def combine(tree: Mapping[str, Any], pairs: Sequence[tuple[str, Any]], axes: Mapping[str, list[Any]],
            always: Mapping[str, Any], steps: int, check: Callable[[Config], Any] = build.check) -> Candidates:
    """The combinations of the axes of a recipe's tree with overrides `pairs`, and with what `always` holds in all of them.

    steps: local steps of each peer in a run, whatever the interval. Those that `check` refuses are counted by its words.
    ValueError where none is left.
    """
    found, refused, rows = [], Counter[str](), expand([{field: values} for field, values in axes.items()], [])
    for fields in rows:
        rounds = max(1, math.ceil(steps / fields["train.local_steps"]))
        try:
            config = resolve(tree, [*pairs, *fields.items(), ("train.rounds", rounds), *always.items()])
            check(config)
        except ValueError as error:
            refused[str(error)] += 1
        else:
            found.append(Combination(fields, config))
    if not found:
        raise ValueError(f"none of {len(rows)} combinations is possible: {next(iter(refused))}")
    return Candidates(found, refused)
