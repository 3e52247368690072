"""From a configuration to a run that has not begun: what is refused, what is loaded, what is built from it."""

import hashlib
from functools import partial
from typing import NamedTuple

import torch

import topologies
from dfl import codecs, executors, partition, ranks, rules, tasks
from dfl.adapters import Adapted, attach
from dfl.beside import with_residual, with_start
from dfl.config import Config
from dfl.evaluate import Evaluator
from dfl.factors import Layout, make_layout
from dfl.peers import DataStream, HostedPeers
from dfl.plugins import check_parameters, lookup
from dfl.record import check_trackers
from dfl.rounds import Run
from dfl.rules.base import Rule
from dfl.runtime import Runtime
from dfl.seeds import derive
from dfl.simulate import with_contraction


class Loaded(NamedTuple):
    """The data and the model, once per process."""

    bundle: tasks.Bundle
    parts: list
    adapted: Adapted


def check(config: Config):
    """Everything that can be refused before anything is loaded; the topology, which is cheap."""
    rules.check(config.rule.name, config.rule.params)
    for key, instead in (("head", "lora.head"), ("contraction", "topology"), ("ranks", "lora.rank"), ("weights", "model.name"),
                         ("peers", "peers"), ("rank", "lora.rank")):
        if key in config.rule.params:
            raise ValueError(f"rule.{key} is set by {instead}")
    codecs.build(config.codec.name, **config.codec.params)
    check_parameters("partition", config.partition.name, lookup("partition.name", partition.PARTITIONS, config.partition.name),
                     config.partition.params)
    check_trackers(config.report_to)
    topology = build_topology(config)
    # its parameters' values, and an interval that has to be chosen
    known = ranks.resolve(config.lora, config.peers, config.seed)
    if known is None:  # they follow from the model, and may differ
        rules.check(config.rule.name, config.rule.params, (1, config.lora.rank.largest))
    rule = build_rule(config, make_layout(()), topology, known)
    rules.check_topology(config.rule.name, rule, topology)
    check_adapter(config, rule, known)
    return topology


def check_adapter(config: Config, rule: Rule, known: ranks.Ranks | None) -> None:
    """ValueError for an adapter, a start or ranks that the rule, or each other, do not fit."""
    lora, name = config.lora, config.rule.name
    wanted = {"sb": "fed_sb", "ravan": "ravan"}.get(lora.adapter)
    if wanted and name not in (wanted, "local"):
        raise ValueError(f"lora.adapter = {lora.adapter!r} trains cores between frozen bases, which rule.name = {name!r} does not "
                         f"mix; allowed: {wanted}, local")
    needed = {"fed_sb": "sb", "ravan": "ravan", "dora": "dora", "hira": "hira"}.get(name)
    if needed and lora.adapter != needed:
        raise ValueError(f"rule.name = {name!r} needs lora.adapter = {needed!r}, got {lora.adapter!r}")
    if lora.adapter in ("dora", "hira") and rule.residual is not None:
        raise ValueError(f"rule.name = {name!r} keeps a residual beside B A, which lora.adapter = {lora.adapter!r} has no place for; "
                         "allowed: lora")
    if lora.start != "kaiming" and lora.adapter != "lora":
        raise ValueError(f"lora.start = {lora.start!r} is for lora.adapter = 'lora', got {lora.adapter!r}")
    differ = known is None or known.unequal or len(set(known.scalings)) > 1
    if differ and (lora.start != "kaiming" or lora.adapter != "lora"):
        what = f"lora.start = {lora.start!r}" if lora.start != "kaiming" else f"lora.adapter = {lora.adapter!r}"
        raise ValueError(f"{what} needs one lora.rank and one lora.alpha for all peers")


def build_topology(config: Config):
    seed = config.seed if config.topology_seed is None else config.topology_seed
    topology = topologies.build(config.topology.name, config.peers, seed=derive(seed, "topology"), **config.topology.params)
    if topology.sums == "column":
        raise ValueError(f"topology.name = {config.topology.name!r} has columns that sum to one, but not rows: receivers would not "
                         "average; allowed: weights that are doubly or row stochastic")
    return topology


def data_seed(config: Config) -> int:
    return config.seed if config.data_seed is None else config.data_seed


def load(config: Config, device: torch.device) -> Loaded:
    """Read data and model, split the data, attach LoRA."""
    bundle = tasks.load(config.model, config.data, seed=derive(config.seed, "head"), data_seed=data_seed(config))
    parts = partition.build(config.partition.name, bundle.train.labels, config.peers, seed=derive(data_seed(config), "partition"),
                            columns=bundle.train.columns, label_names=bundle.train.label_names, **config.partition.params)
    return adapt(config, bundle, parts, device)


def adapt(config: Config, bundle: tasks.Bundle, parts: list, device: torch.device) -> Loaded:
    """Attach LoRA to the model of a bundle whose training examples are already divided."""
    adapted = attach(bundle.model.to(device), config.lora, config.model.task, bundle.head_modules, derive(config.seed, "lora"),
                     partial(ranks.resolve, config.lora, config.peers, config.seed))
    adapted = with_start(adapted, config.lora.start)
    return Loaded(bundle, parts, adapted)


def build_rule(config: Config, layout: Layout, topology, known: ranks.Ranks | None = None, adapted: Adapted | None = None) -> Rule:
    params = with_contraction(config.rule.name, config.rule.params, topology)
    if rules.accepts(config.rule.name, "weights") and adapted is not None:
        params["weights"] = {site.pair.name: site.weight for site in adapted.sites}
    return rules.build(config.rule.name, layout, head=config.lora.head, ranks=known and known.unequal, rank=known and known.largest,
                       peers=config.peers, **params)


def assemble(config: Config, runtime: Runtime, loaded: Loaded, topology) -> Run:
    """Peers, rule, executor and evaluator of a run that has not begun."""
    bundle, parts, adapted = loaded
    rule = build_rule(config, adapted.layout, topology, adapted.ranks, adapted)
    adapted = with_residual(adapted, rule.residual)
    streams = [DataStream(parts[p], config.train.batch_size, data_seed(config), p) for p in runtime.hosted]
    peers = HostedPeers(runtime.hosted, adapted, streams, config.train, seed=config.seed, device=runtime.device)
    check_same_start(peers, bundle, runtime.transport)
    autocast = executors.autocasts(config.train.autocast, runtime.device)
    evaluator = Evaluator(adapted, bundle.task, bundle.valid, config.eval.batch_size, runtime.device, autocast)
    codec = codecs.build(config.codec.name, **config.codec.params)
    executor = executors.choose(config.train.executor, runtime.device, adapted.kind)
    return Run(config, peers, rule, topology, codec, runtime.transport, executor,
               bundle.task, bundle.train, evaluator)


def check_same_start(peers: HostedPeers, bundle, transport) -> None:
    """Every peer must start from the same A and the same head. ValueError names the first that differs from peer 0."""
    # a trained head is part of the row
    frozen = () if peers.adapted.head else bundle.head_modules
    head = [p.detach().float().cpu().numpy().tobytes() for name in frozen for p in bundle.model.get_submodule(name).parameters()]
    digests = [hashlib.sha256(b"".join([row.cpu().numpy().tobytes(), *head])).digest()
               for row in (peers.x if peers.adapted.ranks.unequal is None else peers.adapted.start[None].expand(len(peers.ids), -1))]
    rows = torch.tensor([int.from_bytes(d[:8], "big", signed=True) for d in digests])[:, None]
    rows = transport.gather(rows)
    differing = [] if rows is None else (rows[:, 0] != rows[0, 0]).nonzero().flatten().tolist()
    peer = transport.agree(differing[0] if differing else -1)
    if peer >= 0:
        raise ValueError(f"peer {peer} starts from another A or head than peer 0; all must share seed, model and lora settings")
