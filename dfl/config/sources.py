"""What a caller in Python may give as a configuration, as the tree that a recipe would be."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dfl.config.recipes import read_yaml
from dfl.config.schema import Config, Plugin, plain

Source = Config | Mapping[str, Any] | str | os.PathLike | None


def tree_of(config: Source) -> dict[str, Any]:
    """The tree of a recipe's path, a mapping of its fields or a `Config`; None: an empty one. ValueError for anything else."""
    if config is None:
        return {}
    if isinstance(config, Config):
        return config.to_dict()
    if isinstance(config, Mapping):
        return plain_value(config)
    if isinstance(config, (str, os.PathLike)):
        return read_yaml(Path(config).expanduser())
    raise ValueError(f"config = {config!r} is not allowed; allowed: the path of a recipe, a mapping of fields, or a "
                     "dfl.config.Config")


def plain_value(value: Any) -> Any:
    """Values as a recipe has them: paths as texts, tuples as lists."""
    if isinstance(value, Plugin):
        return plain(value)
    if isinstance(value, Mapping):
        return {key: plain_value(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def overrides_of(words: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Keyword arguments as overrides of a recipe: `train__rounds=5` is train.rounds."""
    return [(key.replace("__", "."), plain_value(value)) for key, value in words.items()]
