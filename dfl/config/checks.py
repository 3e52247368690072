"""What only several fields together can decide: combinations that cannot work are refused before anything is loaded."""

from importlib.util import find_spec

from dfl.config.errors import wrong
from dfl.config.optimizers import check_optimizer, schedule_factor
from dfl.config.schema import Config, RankConfig


def validate(config: Config) -> None:
    """ValueError names the fields, their values and what is allowed."""
    most = config.peers * config.processes_per_peer
    if config.processes is not None and config.processes > most:
        raise wrong("processes", config.processes, f"at most {most}, the number of peers" if most == config.peers else
                    f"at most {most}, processes_per_peer for each peer")
    train = config.train
    if (train.local_steps is None) == (train.local_epochs is None):
        raise ValueError(f"train.local_steps = {train.local_steps} and train.local_epochs = {train.local_epochs}: "
                         "give exactly one of them, null for the other")
    if train.state == "fresh" and train.at_switch == "carried":
        raise ValueError("train.at_switch = 'carried' needs train.state = 'carried': fresh moments carry nothing")
    if any(peer >= config.peers for peer in config.data.flipped or ()):
        raise wrong("data.flipped", list(config.data.flipped or ()), f"peers, from 0 to {config.peers - 1}")
    _check_privacy(config)
    _check_parts(config)
    check_optimizer(train.optimizer, train.at_refactor)
    schedule_factor(train.schedule.name, train.schedule.params, train.warmup)
    _check_lists(config)


def _check_privacy(config: Config) -> None:
    """What would look at examples outside the steps that are counted, or not go through the model one by one."""
    train = config.train
    if train.privacy.noise is None:
        return
    if train.executor == "stacked":
        raise wrong("train.executor", "stacked", "sequential or auto with train.privacy, where examples are stacked in place of peers")
    if train.accumulation != 1:
        raise wrong("train.accumulation", train.accumulation, "1 with train.privacy, whose batches are drawn anew for every step")
    for field in ("packing", "group_by_length"):
        if getattr(config.data, field):
            raise wrong(f"data.{field}", True, "false with train.privacy, where every example is drawn and counts by itself")
    if train.privacy.noise and find_spec("dp_accounting") is None:
        raise ValueError("train.privacy needs the package dp-accounting, which says what is spent; allowed: pip install "
                         "'dfl[privacy]', or train.privacy.noise: null")
    if config.lora.start == "gradient":
        raise ValueError("lora.start = 'gradient' looks at peer 0's examples before training, which train.privacy does not count; "
                         "allowed: kaiming, pissa, olora")


def _check_parts(config: Config) -> None:
    """What cannot have its base model in parts, on several processes."""
    each, train = config.processes_per_peer, config.train
    if each == 1:
        return
    for refused, what in (
            (train.executor == "stacked", "train.executor = 'stacked' takes all peers through the model at once, one in parts takes "
             "one at a time; allowed: auto, sequential"),
            (train.batch_size < each, f"train.batch_size = {train.batch_size} leaves a process without an example; allowed: at least "
             f"{each}"),
            (train.privacy.noise is not None, "train.privacy.noise needs a gradient for every example, which are stacked in one "
             "process; allowed: null"),
            (config.model.quantization is not None, f"model.quantization = {config.model.quantization!r}: packed weights are not "
             "divided; allowed: null"),
            (config.membership.mode == "survive", "membership.mode = 'survive': who has lost a process has lost a part of the base "
             "model; allowed: fixed"),
            (config.lora.start == "gradient", "lora.start = 'gradient' passes through the model before training; allowed: kaiming, "
             "pissa, olora"),
            (config.eval.generate.examples > 0, f"eval.generate.examples = {config.eval.generate.examples}: one process alone writes "
             "answers; allowed: 0, and dfl generate afterwards")):
        if refused:
            raise ValueError(f"processes_per_peer = {each} with {what}, or processes_per_peer: 1")


def _check_lists(config: Config) -> None:
    """Lists with one entry a peer, and one of the two ways to give ranks that differ."""
    lora, given = config.lora, config.lora.rank
    for key, value in (("rank", lora.rank), ("alpha", lora.alpha), ("rslora", lora.rslora),
                       ("rank.budget_mb", given.budget_mb if isinstance(given, RankConfig) else None)):
        if isinstance(value, tuple) and len(value) != config.peers and not (len(value) == 1 and key == "rank.budget_mb"):
            raise wrong(f"lora.{key}", list(value), f"one value, or a list of {config.peers}, one a peer")
    if not isinstance(given, RankConfig):
        return
    if (given.choices is None) == (given.budget_mb is None):
        raise ValueError(f"lora.rank.choices = {given.choices} and lora.rank.budget_mb = {given.budget_mb}: give exactly one of them")
    if given.choices is not None and not given.choices:
        raise wrong("lora.rank.choices", [], "whole numbers from 1")
    if given.weights is not None and (given.choices is None or len(given.weights) != len(given.choices) or not sum(given.weights) > 0):
        raise wrong("lora.rank.weights", list(given.weights), "a number from 0 for each of lora.rank.choices, not all 0")
