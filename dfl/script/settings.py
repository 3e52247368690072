"""From the words of `dfl.hf.join` and `dfl.Gossip` to a configuration: the same words as a recipe's, for a loop that is not ours."""

import logging
from collections.abc import Mapping
from typing import Any

from dfl import extensions, methods
from dfl.adapters import kinds
from dfl.adapters.layout import make_layout
from dfl.adapters.peft_layers import DORA, LORA
from dfl.config import Config, resolve
from dfl.config.aliases import own_names
from dfl.config.sources import Source, overrides_of, tree_of
from dfl.config.topology import build_topology
from dfl.methods import Context, Method
from dfl.run.build import chosen_slots

logger = logging.getLogger(__name__)
# what of a recipe counts in a script; everything else the script itself decides
USED = ("peers", "seed", "topology_seed", "method", "topology", *methods.SLOTS, "lora.head", "train.local_steps", "train.rounds",
        "train.state", "train.at_switch", "train.at_refactor", "measure", "checkpoint.keep", "plugins", "output", "timeout",
        "processes_per_peer")


def settings(source: Source, every: int | None, words: Mapping[str, Any], num_processes: int) -> Config:
    """The configuration of a script's run with one peer a process, or in so many as `processes_per_peer` says.

    source: the path of a recipe, a mapping or a `Config`; words: fields that replace those of it, `__` for a dot; every:
    optimiser steps between two mixes, train.local_steps of a recipe. Moments stay with the optimiser from round to round
    unless train.state says otherwise: they are the script's.
    ValueError names the field, the value and what is allowed.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"every = {every!r} is not allowed; allowed: a whole number from 1, the optimiser steps between two mixes")
    tree = own_names(tree_of(source))
    pairs = overrides_of(words) + ([] if every is None else [("train.local_steps", every)])
    _tell_unused(tree, [key for key, _ in pairs])
    each = dict(pairs).get("processes_per_peer", tree.get("processes_per_peer")) or 1
    if not isinstance(each, int) or each < 1 or num_processes % each:
        raise ValueError(f"processes_per_peer = {each!r}, and {num_processes} process(es) of the script were started; allowed: a "
                         "whole number that divides them")
    num_peers = num_processes // each
    given = dict(pairs).get("peers", tree.get("peers", num_peers))
    if given != num_peers:
        raise ValueError(f"peers = {given!r}, but {num_processes} process(es) of the script were started: "
                         f"{'each is' if each == 1 else f'{each} are'} one peer; leave it out")
    train = {"state": "carried"} | dict(tree.get("train") or {})
    if train.get("local_epochs") is not None or dict(pairs).get("train.local_epochs") is not None:
        raise ValueError("train.local_epochs is not known to a script, which counts steps; allowed: every, or train.local_steps")
    return resolve(tree | {"train": train, "baseline": None, "callbacks": [], "report_to": []}, [*pairs, ("peers", num_peers)])


def _tell_unused(tree: Mapping[str, Any], keys: list[str]) -> None:
    """One line that names what was given and is not used: the script decides it."""
    given = [*keys, *(f"{key}.{inner}" if isinstance(value, Mapping) and key not in (*methods.SLOTS, "method", "topology") else key
                      for key, value in tree.items() for inner in (value if isinstance(value, Mapping) else [None]))]
    unused = [key for key in dict.fromkeys(given) if not any(key == used or key.startswith(f"{used}.") for used in USED)]
    if unused:
        logger.warning("dfl: WARNING: the script itself decides %s: what was given for it is not used", ", ".join(unused))


def check(config: Config):
    """The topology. ValueError for slots that do not go together, or need a loop of ours; nothing of the model is known yet."""
    extensions.load(config.plugins)
    _check_loop(config)
    _check_adapter(config)
    topology = build_topology(config)
    context = Context(make_layout(()), config.lora.head, peers=config.peers, topology=topology, rounds=config.train.rounds)
    check_able(config, build_method(config, context), topology)
    return topology


def _check_loop(config: Config) -> None:
    """ValueError for what a loop of ours does beside the slots, and whose absence nobody would see in the result."""
    for refused, what in (
            (config.delay > 0, "delay = 1 has messages on their way while the loop of dfl train computes; allowed: 0"),
            (config.membership.mode != "fixed", f"membership.mode = {config.membership.mode!r} goes back to the start of a round when "
             "a peer is lost, which a script's loop cannot; allowed: fixed"),
            (config.train.privacy.noise is not None, f"train.privacy.noise = {config.train.privacy.noise} needs a gradient for every "
             "example, which a script's loop does not give; allowed: null")):
        if refused:
            raise ValueError(f"{what}, or dfl train")


def _check_adapter(config: Config) -> None:
    """ValueError for a method that is for an adapter other than plain layers of PEFT's LoRA, which is all that a script has."""
    wanted = methods.METHODS[config.method.name].adapter if config.method.name in methods.METHODS else None
    kind = kinds.KINDS[wanted] if wanted in kinds.KINDS else None
    if kind is not None and (kind.core is not None or kind.layers not in (LORA, DORA)):
        raise ValueError(f"method.name = {config.method.name!r} needs lora.adapter = {wanted!r}, whose layers a script's model does "
                         "not have; allowed: dfl train, or a method for LoRA or DoRA")


def build_method(config: Config, context: Context) -> Method:
    return methods.build(config.method.name, context, config.method.params, chosen_slots(config))


def check_able(config: Config, method: Method, topology) -> None:
    """ValueError for what the topology cannot have, and for what only a loop of ours can do, told by the traits that it declares."""
    methods.check_topology(method, topology, chosen_slots(config))
    if method.rule.residual is not None:
        who = methods.whose_rule(config.method.name, chosen_slots(config))
        raise ValueError(f"{who} keeps low-rank products beside the factors, which the layers of a script's model do not read; "
                         "allowed: dfl train, or a rule without a residual")
