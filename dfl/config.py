"""A run is one file: frozen dataclasses, read from YAML with dotted overrides, validated before anything is loaded."""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dfl.plugins import did_you_mean


@dataclass(frozen=True)
class Plugin:
    """A choice from a table: its name and its parameters. In a recipe `{name: tad, T: 5}`, or only `tad`."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    name: str = "minilm"  # the embedded MiniLM, a model folder, or a hub name
    task: str = "sequence_classification"
    layers: int | None = None  # keep only the first k transformer layers
    dropout: float | None = None  # the base model's own dropout; None: what its configuration says
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base weights
    head_std: float | None = None  # of a new head's weights; None: the model's initializer_range


@dataclass(frozen=True)
class DataConfig:
    source: str = "docstrings"  # docstrings, file or hub
    train: str | None = None  # file: path; hub: split
    valid: str | None = None
    name: str | None = None  # hub: data set name, with an optional configuration after a colon
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    prompt: str | None = None
    response: str | None = None
    image: str = "image"
    max_length: int = 128  # tokens
    max_train: int | None = None  # examples
    max_valid: int | None = None
    valid_fraction: float = 0.1  # taken off train when no valid is given


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None  # None: PEFT's own choice for the architecture
    rslora: bool = False
    head: Literal["frozen", "mixed", "local"] = "frozen"


@dataclass(frozen=True)
class TrainConfig:
    rounds: int = 20
    local_steps: int | None = 10
    local_epochs: int | None = None  # instead of local_steps
    batch_size: int = 16
    accumulation: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    clip: float | None = 1.0  # per peer, on the norm of its whole gradient
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0  # fraction of the run
    state: Literal["fresh", "carried"] = "fresh"  # optimiser moments across rounds
    at_switch: Literal["fresh", "carried"] = "fresh"  # and of a factor that becomes active again
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    executor: Literal["auto", "sequential", "stacked"] = "auto"


@dataclass(frozen=True)
class EvalConfig:
    every: int = 5  # rounds; 0: only before the first and after the last
    batch_size: int = 64
    consensus: bool = True  # evaluate the consensus model as well


@dataclass(frozen=True)
class MeasureConfig:
    every: int = 1  # rounds; 0: never


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # rounds; 0: only at the end
    keep: int = 2


@dataclass(frozen=True)
class Config:
    peers: int = 8
    seed: int = 0
    topology_seed: int | None = None  # None: seed
    data_seed: int | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    rule: Plugin = field(default_factory=lambda: Plugin("tad"))
    topology: Plugin = field(default_factory=lambda: Plugin("ring"))
    codec: Plugin = field(default_factory=lambda: Plugin("none"))
    partition: Plugin = field(default_factory=lambda: Plugin("iid"))
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    baseline: Literal["local"] | None = None  # also train without mixing, for the closing table
    report_to: tuple[str, ...] = ()  # tensorboard, wandb, mlflow; one name or a list
    output: str = "runs/run"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    threads: int | None = None  # of each process; None: cores / processes
    timeout: float = 1800.0  # seconds to wait for a neighbour; the others wait while one evaluates the consensus

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)


def load(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of recipe `path` with `--dotted.key value` overrides.

    ValueError names the field, the value and what is allowed. Nothing is loaded.
    """
    tree: dict = {}
    if path is not None:
        tree = read_yaml(Path(path))
    for key, value in parse_overrides(list(overrides)):
        _set(tree, key, value)
    config = _expand_paths(_build(Config, tree, ""))
    validate(config)
    return config


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
    config = _build(Config, tree, "")
    validate(config)
    return config


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: of two `train:` sections the first would be lost silently."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count(key.value) > 1 and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"recipe {str(path)!r} is not a file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, a date that is none
        raise ValueError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {str(path)!r} must hold a mapping of fields, got {type(tree).__name__}")
    return tree


def parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    """`--a.b 1 --c=2` as [("a.b", 1), ("c", 2)]; values are read as YAML."""
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ValueError(f"argument {word!r} is not an override; write --dotted.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"override --{key} lacks a value; write --{key} value")
            text = rest.pop(0)
        try:
            pairs.append((key, yaml.safe_load(text)))
        except (yaml.YAMLError, ValueError):
            raise ValueError(f"override --{key} = {text!r} is not a valid YAML value") from None
    return pairs


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people mean a number."""
    if isinstance(value, str):
        return float(value) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value) else value
    if isinstance(value, list):
        return [_number(v) for v in value]
    if isinstance(value, dict):
        return {k: _number(v) for k, v in value.items()}
    return value


def _set(tree: dict, dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for key in path:
        child = tree.get(key)
        if isinstance(child, str):  # `rule: tad` then --rule.T 5
            child = {"name": child}
        if not isinstance(child, (dict, type(None))):
            raise ValueError(f"override --{dotted} = {value!r}: {key} = {child!r} has no fields of its own")
        tree[key] = child = dict(child or {})
        tree = child
    tree[last] = value


def _build(cls: type, tree: Any, where: str) -> Any:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} = {tree!r} must be a mapping of fields")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ValueError(f"unknown key {_join(where, key)!r} = {value!r}{did_you_mean(key, hints)}; "
                             f"allowed: {', '.join(hints)}")
        values[key] = _coerce(hints[key], value, _join(where, key))
    return cls(**values)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if hint is Plugin:
        return _plugin(value, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _coerce_union(hint, value, where)
    if typing.get_origin(hint) is Literal:
        if value is False and "off" in typing.get_args(hint):  # YAML 1.1 reads off as false
            value = "off"
        if value not in typing.get_args(hint):
            raise _wrong(where, value, ", ".join(map(str, typing.get_args(hint))))
        return value
    if typing.get_origin(hint) is tuple:
        return _coerce_tuple(hint, value, where)
    return _coerce_scalar(hint, value, where)


def _wrong(where: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{where} = {value!r} is not allowed; allowed: {allowed}")


def _plugin(value: Any, where: str) -> Plugin:
    if isinstance(value, Plugin):
        return value
    if isinstance(value, str):
        return Plugin(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise _wrong(where, value, "a name, or a mapping with name and the plug-in's parameters")
    params = {k: (_number(v)) for k, v in value.items() if k != "name"}
    return Plugin(value["name"], params)


def _coerce_union(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _coerce(option, value, where)
            except ValueError as error:
                errors.append(error)
    raise errors[-1]


def _coerce_tuple(hint: Any, value: Any, where: str) -> tuple:
    inner = typing.get_args(hint)
    if isinstance(value, str) and inner[-1] is Ellipsis:
        value = [value]  # one name is a list of one
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise _wrong(where, value, "a list")
    if inner[-1] is not Ellipsis and len(value) != len(inner):
        raise _wrong(where, value, f"a list of {len(inner)}")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
    return tuple(_coerce(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float) and isinstance(value, str) and isinstance(_number(value), float):
        return _coerce_scalar(hint, _number(value), where)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is bool and isinstance(value, bool) or hint in (int, str) and type(value) is hint:
        return value
    if hint is str and type(value) in (int, float):
        return str(value)
    raise _wrong(where, value, {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint])


def _plain(value: Any) -> Any:
    if isinstance(value, Plugin):
        return {"name": value.name, **{k: _plain(v) for k, v in value.params.items()}}
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


_POSITIVE = ("peers", "model.layers", "model.head_std", "data.max_length", "data.max_train", "data.max_valid",
             "lora.rank", "lora.alpha", "train.rounds", "train.local_steps", "train.local_epochs", "train.batch_size",
             "train.accumulation", "train.lr", "train.eps", "train.clip", "eval.batch_size", "checkpoint.keep", "threads", "timeout")
_NOT_NEGATIVE = ("seed", "topology_seed", "data_seed", "train.weight_decay", "train.momentum", "eval.every",
                 "measure.every", "checkpoint.every")
_FRACTION = ("model.dropout", "lora.dropout", "train.warmup", "data.valid_fraction")


def _get(config: Config, dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = getattr(value, key)
    return value


def validate(config: Config) -> None:
    """Refuse values and combinations that cannot work. ValueError names the field, the value and what is allowed."""
    for key in _POSITIVE:
        value = _get(config, key)
        # a learning rate of zero is the cheapest oracle of the mixing: allowed
        if value is not None and not (0 < value < math.inf or (value == 0 and key == "train.lr")):
            raise _wrong(key, value, "a positive number")
    for key in _NOT_NEGATIVE:
        value = _get(config, key)
        if value is not None and not 0 <= value < math.inf:
            raise _wrong(key, value, "zero or a positive number")
    for key in _FRACTION:
        value = _get(config, key)
        if value is not None and not 0 <= value < 1:
            raise _wrong(key, value, "a number from 0 up to, not including, 1")
    train = config.train
    if (train.local_steps is None) == (train.local_epochs is None):
        raise ValueError(f"train.local_steps = {train.local_steps} and train.local_epochs = {train.local_epochs}: "
                         "give exactly one of them, null for the other")
    if train.state == "fresh" and train.at_switch == "carried":
        raise ValueError("train.at_switch = 'carried' needs train.state = 'carried': fresh moments carry nothing")
    if not all(0 <= b < 1 for b in train.betas):
        raise _wrong("train.betas", list(train.betas), "two numbers from 0 up to, not including, 1")
