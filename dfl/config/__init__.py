"""A run is one file: frozen sections of fields, read from YAML with dotted overrides, validated before anything is loaded."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dfl.config.aliases import apply, own_names, settle
from dfl.config.checks import validate
from dfl.config.errors import refusal
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
    PrivacyConfig,
    RankConfig,
    RatioConfig,
    TrainConfig,
)

__all__ = ["CheckpointConfig", "Config", "DataConfig", "EvalConfig", "LoraConfig", "MeasureConfig", "ModelConfig", "Plugin",
           "PrivacyConfig", "RankConfig", "RatioConfig", "TrainConfig", "from_dict", "load", "resolve"]


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of recipe `path` with `--dotted.key value` overrides.

    ValueError names the field, the value and what is allowed. Nothing is loaded.
    """
    return resolve({} if path is None else read_yaml(Path(path)), parse_overrides(list(overrides)))


def resolve(tree: Mapping[str, Any], pairs: Iterable[tuple[str, Any]] = ()) -> Config:
    """The configuration of a recipe's tree with overrides (dotted key, value); both may use the names of `aliases`."""
    named = settle(apply(own_names(tree), pairs))
    _check_rule(named)
    return from_dict(named)


def _check_rule(tree: Mapping[str, Any]) -> None:
    """A rule takes the place of a method's own; without a method, most likely the method itself is meant."""
    rule = tree.get("rule")
    if rule is not None and tree.get("method") is None:
        name = rule.get("name") if isinstance(rule, Mapping) else rule
        raise ValueError(f"rule = {rule!r} takes the place of the rule of a method, and no method is given: if the whole method is "
                         f"meant, give it as method (method: {name}), else give the method as well")


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The configuration of a tree with our names, such as `Config.to_dict` gives. ValueError as of `load`."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise refusal(error) from None
    validate(config)
    return config
