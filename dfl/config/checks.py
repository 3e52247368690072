"""Values and combinations that cannot work are refused before anything is loaded."""

import math
from typing import Any

from dfl.config.build import wrong
from dfl.config.schema import Config, RankConfig

_POSITIVE = ("peers", "model.layers", "model.head_std", "data.max_length", "data.max_train", "data.max_valid",
             "lora.rank", "lora.alpha", "lora.heads", "lora.start_samples", "train.rounds", "train.local_steps", "train.local_epochs",
             "train.batch_size", "train.accumulation", "train.lr", "train.eps", "train.clip", "eval.batch_size", "checkpoint.keep",
             "checkpoint.minutes", "processes", "threads", "timeout")
_NOT_NEGATIVE = ("lora.start_step", "seed", "topology_seed", "data_seed", "train.weight_decay", "train.momentum", "eval.every",
                 "measure.every", "measure.layers", "checkpoint.every")
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
        for one in value if isinstance(value, tuple) else (value,):
            # a learning rate of zero is the cheapest oracle of the mixing: allowed
            plain = one is None or isinstance(one, RankConfig)
            if not plain and not (0 < one < math.inf or (one == 0 and key == "train.lr")):
                raise wrong(key, value, "a positive number")
    _check_ranks(config)
    _check_ratios(config)
    if not config.output.strip():
        raise wrong("output", config.output, "the path of a folder")
    for key in _NOT_NEGATIVE:
        value = _get(config, key)
        if value is not None and not 0 <= value < math.inf:
            raise wrong(key, value, "zero or a positive number")
    for key in _FRACTION:
        value = _get(config, key)
        if value is not None and not 0 <= value < 1:
            raise wrong(key, value, "a number from 0 up to, not including, 1")
    if config.processes is not None and config.processes > config.peers:
        raise wrong("processes", config.processes, f"at most {config.peers}, the number of peers")
    train = config.train
    if (train.local_steps is None) == (train.local_epochs is None):
        raise ValueError(f"train.local_steps = {train.local_steps} and train.local_epochs = {train.local_epochs}: "
                         "give exactly one of them, null for the other")
    if train.state == "fresh" and train.at_switch == "carried":
        raise ValueError("train.at_switch = 'carried' needs train.state = 'carried': fresh moments carry nothing")
    if not all(0 <= b < 1 for b in train.betas):
        raise wrong("train.betas", list(train.betas), "two numbers from 0 up to, not including, 1")


def _check_ratios(config: Config) -> None:
    for group, ratio in vars(config.train.lr_ratio).items():
        if not 0 <= ratio < math.inf:
            raise wrong(f"train.lr_ratio.{group}", ratio, "zero or a positive number")


def _check_ranks(config: Config) -> None:
    """Lists with one entry a peer, and one of the two ways to give ranks that differ."""
    lora = config.lora
    for key in ("rank", "alpha", "rslora"):
        value = getattr(lora, key)
        if isinstance(value, tuple) and len(value) != config.peers:
            raise wrong(f"lora.{key}", list(value), f"one value, or a list of {config.peers}, one a peer")
    if not isinstance(lora.rank, RankConfig):
        return
    given = lora.rank
    if (given.choices is None) == (given.budget_mb is None):
        raise ValueError(f"lora.rank.choices = {given.choices} and lora.rank.budget_mb = {given.budget_mb}: give exactly one of them")
    if given.choices is not None and (not given.choices or min(given.choices) < 1):
        raise wrong("lora.rank.choices", list(given.choices), "whole numbers from 1")
    if given.weights is not None and (given.choices is None or len(given.weights) != len(given.choices) or min(given.weights) < 0
                                      or not sum(given.weights) > 0):
        raise wrong("lora.rank.weights", list(given.weights), "a number from 0 for each of lora.rank.choices, not all 0")
    budgets = given.budget_mb if isinstance(given.budget_mb, tuple) else (given.budget_mb,)
    if given.budget_mb is not None and (len(budgets) not in (1, config.peers) or min(budgets) <= 0):
        raise wrong("lora.rank.budget_mb", given.budget_mb, f"a positive number, or a list of {config.peers}, one a peer")
    if given.largest < 1:
        raise wrong("lora.rank.largest", given.largest, "a whole number from 1")
