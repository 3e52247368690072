"""Values and combinations that cannot work are refused before anything is loaded."""

import math
from typing import Any

from dfl.config.build import wrong
from dfl.config.schema import Config

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
            raise wrong(key, value, "a positive number")
    for key in _NOT_NEGATIVE:
        value = _get(config, key)
        if value is not None and not 0 <= value < math.inf:
            raise wrong(key, value, "zero or a positive number")
    for key in _FRACTION:
        value = _get(config, key)
        if value is not None and not 0 <= value < 1:
            raise wrong(key, value, "a number from 0 up to, not including, 1")
    train = config.train
    if (train.local_steps is None) == (train.local_epochs is None):
        raise ValueError(f"train.local_steps = {train.local_steps} and train.local_epochs = {train.local_epochs}: "
                         "give exactly one of them, null for the other")
    if train.state == "fresh" and train.at_switch == "carried":
        raise ValueError("train.at_switch = 'carried' needs train.state = 'carried': fresh moments carry nothing")
    if not all(0 <= b < 1 for b in train.betas):
        raise wrong("train.betas", list(train.betas), "two numbers from 0 up to, not including, 1")
