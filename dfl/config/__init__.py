"""A run is one file: frozen dataclasses, read from YAML with dotted overrides, validated before anything is loaded."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dfl.config.aliases import apply, own_names, settle
from dfl.config.build import build
from dfl.config.checks import validate
from dfl.config.recipes import parse_overrides, read_yaml
from dfl.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeasureConfig,
    ModelConfig,
    Plugin,
    RankConfig,
    RatioConfig,
    TrainConfig,
)

__all__ = ["CheckpointConfig", "Config", "DataConfig", "EvalConfig", "LoraConfig", "MeasureConfig", "ModelConfig", "Plugin",
           "RankConfig", "RatioConfig", "TrainConfig", "from_dict", "load", "resolve"]


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of recipe `path` with `--dotted.key value` overrides.

    ValueError names the field, the value and what is allowed. Nothing is loaded.
    """
    return resolve({} if path is None else read_yaml(Path(path)), parse_overrides(list(overrides)))


def resolve(tree: Mapping[str, Any], pairs: Iterable[tuple[str, Any]] = ()) -> Config:
    """The configuration of a recipe's tree with overrides (dotted key, value); both may use the names of `aliases`."""
    named = settle(apply(own_names(tree), pairs))
    _check_rule(named)
    config = _expand_paths(build(Config, named, ""))
    validate(config)
    return config


def _check_rule(tree: Mapping[str, Any]) -> None:
    """A rule takes the place of a method's own; without a method, most likely the method itself is meant."""
    rule = tree.get("rule")
    if rule is not None and tree.get("method") is None:
        name = rule.get("name") if isinstance(rule, Mapping) else rule
        raise ValueError(f"rule = {rule!r} takes the place of the rule of a method, and no method is given: if the whole method is "
                         f"meant, give it as method (method: {name}), else give the method as well")


def _expand_paths(config: Config) -> Config:
    """`$NAME` and `~` in the fields that may be paths. ValueError names a variable that is not set."""
    def expand(where: str, value: str | None) -> str | None:
        if value is None:
            return None
        expanded = os.path.expandvars(os.path.expanduser(value))
        left = re.search(r"\$\{?(\w+)", expanded)
        if left:
            raise ValueError(f"{where} = {value!r}: the environment variable {left[1]} is not set")
        return expanded

    data = dataclasses.replace(config.data, train=expand("data.train", config.data.train),
                               valid=expand("data.valid", config.data.valid))
    model = dataclasses.replace(config.model, name=expand("model.name", config.model.name))
    return dataclasses.replace(config, data=data, model=model, output=expand("output", config.output))


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The configuration that `Config.to_dict` gave."""
    config = build(Config, tree, "")
    validate(config)
    return config
