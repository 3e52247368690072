"""From a configuration to a run that has not begun: what is refused, what is loaded, what is built from it."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from dfl import extensions, methods, partition, tasks
from dfl.adapters import kinds, ranks
from dfl.adapters.attach import Adapted, FrozenWeights, attach
from dfl.adapters.layout import Layout, make_layout
from dfl.adapters.residuals import with_residual, with_start
from dfl.config import Config, RatioConfig
from dfl.config.topology import build_topology
from dfl.config.trackers import check_trackers
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, Context, Method
from dfl.metrics.choice import choose as choose_metrics
from dfl.metrics.evaluator import Evaluator
from dfl.metrics.own import Own, own_distributions
from dfl.partition.poison import FlippedLabels
from dfl.plugins import check_parameters, lookup, parameters
from dfl.rules import RULES
from dfl.run import memory
from dfl.run.answers import make_answers
from dfl.run.checkpoint import read_state
from dfl.run.loop import Run
from dfl.run.runtime import Runtime
from dfl.seeds import derive
from dfl.store.manifest import UnreadableError
from dfl.training import executors
from dfl.training.hosted import HostedPeers
from dfl.training.packing import check_packing
from dfl.training.recomputing import recompute_activations
from dfl.training.sharding import shard
from dfl.training.spectrum import participation
from dfl.training.starts import at_first_gradient
from dfl.training.stream import DataStream, make_stream
from dfl.training.together import Together
from dfl.transport import Transport
from dfl.transport.agreement import together
from dfl.transport.zenoh_session import require

# what a factory gets from the run, and no recipe gives it a second time
_SET_BY = {"head": "lora.head", "layout": "lora.targets", "ranks": "lora.rank", "weights": "model.name", "peers": "peers",
           "rank": "lora.rank", "topology": "topology", "rounds": "train.rounds", "frames": "lora.adapter", "spectra": "data"}


class Loaded(NamedTuple):
    """The data and the model, once per process.

    own: the peers' own distributions, or why there are none. contents: digests of data and model by name, where they were asked for.
    """

    bundle: tasks.Bundle
    parts: list
    adapted: Adapted
    own: Own | str = "no shards"
    contents: Mapping[str, Any] = MappingProxyType({})


def check(config: Config):
    """Everything that can be refused before anything is loaded; the topology, which is cheap."""
    extensions.load(config.plugins)
    memory.check_peers(config)
    task = lookup("model.task", tasks.TASKS, config.model.task.name)
    check_parameters("model.task", config.model.task.name, task.build, config.model.task.params)
    if config.data.packing and not hasattr(task, "pack"):
        able = [name for name, one in tasks.TASKS.items() if hasattr(one, "pack")]
        raise ValueError(f"data.packing = True: rows of model.task = {config.model.task.name!r} are not packed; allowed: false, "
                         f"or {', '.join(able)}")
    choose_metrics(config.eval, task, 2)
    if config.eval.generate.examples and task.auto_class != "AutoModelForCausalLM":
        raise ValueError(f"eval.generate.examples = {config.eval.generate.examples}: model.task = {config.model.task.name!r} "
                         "writes no answers; allowed with it: 0")
    lookup("data.source", tasks.SOURCES, config.data.source)
    slots = chosen_slots(config)
    for field, choice in {"method": config.method, **slots}.items():
        for key, instead in _SET_BY.items():
            if key in choice.params:
                raise ValueError(f"{field}.{key} is set by {instead}")
    rule = methods.fill(config.method.name, config.method.params, slots)["rule"].name
    who = methods.whose_rule(config.method.name, slots)
    kinds.check_method(config.lora, config.method.name, rule, who, {name: row.rule for name, row in methods.METHODS.items()})
    check_parameters("partition", config.partition.name, lookup("partition.name", partition.PARTITIONS, config.partition.name),
                     config.partition.params)
    check_trackers(config.report_to)
    topology = build_topology(config)
    # its parameters' values, and an interval that has to be chosen
    known = ranks.resolve(config.lora, config.peers, config.seed)
    method = build_method(config, _layout_before_loading(config), topology, known)
    methods.check_topology(method, topology, slots)
    check_adapter(config, method, known)
    check_membership(config, method)
    check_parts(config)
    return topology


def _layout_before_loading(config: Config) -> Layout:
    """No layers yet, but the groups that the adapter trains."""
    trains, one = kinds.kind_of(config.lora).trains, [("", (1,))]
    return make_layout((), magnitudes=one if "M" in trains else (), cores=one if "core" in trains else ())


def check_membership(config: Config, method: Method) -> None:
    """ValueError for what cannot go on without a part of its peers."""
    if config.membership.mode == "fixed":
        if config.membership.transport != "tcp":
            raise ValueError(f"membership.transport = {config.membership.transport!r} needs membership.mode = 'survive', "
                             "got 'fixed'; allowed there: tcp")
        return
    if config.membership.transport == "zenoh":
        require()
    for refused, what in (
            (bool(config.callbacks or config.eval.patience or config.checkpoint.best),
             "callbacks, eval.patience and checkpoint.best are asked by all processes together"),
            (config.baseline is not None, "a baseline begins when the run has ended for all"),
            (config.delay > 0, "delay: 1 leaves a round's exchange under way"),
            (config.lora.start == "gradient", "who comes later cannot compute lora.start = 'gradient'"),
            (config.device == "cuda" or config.backend == "nccl", "its messages go between CPUs (device: cpu, backend: auto)"),
            (method.rule.conserves, "the rule keeps a sum over all peers, of which a part goes with a peer"),
            (method.rule.lossless, "the rule keeps equal copies at both ends of a link"),
            (method.rule.needs != "any", "the rule needs a W that never changes"),
            (method.codec.update is not None, "codec.memory = 'differences' needs every message from the first on"),
            (method.channel.static, "the channel needs a W that never changes"),
            (method.trigger.merges is not None, "the trigger takes means over all peers"),
            (method.trigger.common_start, "trigger.start = 'common': who comes back begins elsewhere")):
        if refused:
            raise ValueError(f"membership.mode = 'survive': {what}; allowed: a recipe without that, or membership: fixed")


def check_parts(config: Config) -> None:
    """ValueError for what reads whole weights of a base model that lies on several processes in parts."""
    if config.processes_per_peer == 1:
        return
    filled = methods.fill(config.method.name, config.method.params, chosen_slots(config))
    rule, adapter = filled["rule"], config.lora.adapter
    for refused, what in (
            (kinds.kind_of(config.lora).multiplies, f"lora.adapter = {adapter!r} multiplies the weights themselves"),
            ("weights" in parameters(RULES[rule.name]), f"rule.name = {rule.name!r} reads the weights themselves"),
            (rule.name == "task_bank" and rule.params.get("layers") != "even",
             f"{config.method.name}.layers = 'spectrum' passes through the whole model before training")):
        if refused:
            raise ValueError(f"processes_per_peer = {config.processes_per_peer} with a base model in parts: {what}; allowed: a recipe "
                             "without that, or processes_per_peer: 1")


def chosen_slots(config: Config) -> dict[str, Choice]:
    """The slots that the recipe fills beside the method's own choice."""
    given = {slot: getattr(config, slot) for slot in methods.SLOTS}
    return {slot: Choice(choice.name, choice.params) for slot, choice in given.items() if choice is not None}


def check_adapter(config: Config, method: Method, known: ranks.Ranks | None) -> None:
    """ValueError for an adapter, a start or ranks that the rule, or each other, do not fit."""
    lora, slots = config.lora, chosen_slots(config)
    rule = methods.fill(config.method.name, config.method.params, slots)["rule"].name
    who = methods.whose_rule(config.method.name, slots)
    of_rules = {row.rule: row.adapter for row in methods.METHODS.values() if row.rule != "average"}
    kinds.check_wanted(lora, f"method.name = {config.method.name!r}", methods.METHODS[config.method.name].adapter)
    kinds.check_wanted(lora, who, of_rules.get(rule))
    if method.rule.residual is not None:
        kinds.check_residual(lora, who)
    private = config.train.privacy.noise is not None
    if private and rule == "task_bank" and method.rule.facts["layers"] == "spectrum":
        raise ValueError("method.layers = 'spectrum' looks at examples before training, which train.privacy does not count; allowed: "
                         "even")
    if private and "stacked" not in kinds.kind_of(lora).executors or private and kinds.kind_of(lora).core:
        raise ValueError(f"train.privacy needs a gradient for every example, which lora.adapter = {lora.adapter!r} does not give; "
                         "allowed: lora, orthogonal")
    if kinds.kind_of(lora).multiplies and config.model.quantization:
        raise ValueError(f"lora.adapter = {lora.adapter!r} multiplies the weights themselves, which model.quantization = "
                         f"{config.model.quantization!r} has rounded; allowed with it: lora, dora, sb, ravan")
    kinds.check_start(lora, known is None or known.unequal is not None or len(set(known.scalings)) > 1)
    trained = [*kinds.kind_of(lora).trains, *([] if lora.head == "frozen" else ["head"])]
    for group, ratio in config.train.lr_ratio:
        if ratio != RatioConfig.model_fields[group].default and group not in trained:
            raise ValueError(f"train.lr_ratio.{group} = {ratio} changes nothing: lora.adapter = {lora.adapter!r} "
                             f"with lora.head = {lora.head!r} trains {', '.join(trained)}")


def data_seed(config: Config) -> int:
    return config.seed if config.data_seed is None else config.data_seed


class Examples(NamedTuple):
    """The data of a run, encoded, and which of its training examples each peer has."""

    prepared: tasks.Prepared
    parts: list


def read_examples(config: Config) -> Examples:
    """Read and divide the data; no weights."""
    prepared = tasks.prepare(config.model, config.data, data_seed=data_seed(config))
    train = prepared.train
    return Examples(prepared, divide(config, train.labels, train.columns, train.label_names))


def divide(config: Config, labels: np.ndarray, columns, label_names) -> list:
    """The training examples of each peer."""
    return partition.build(config.partition.name, labels, config.peers, seed=derive(data_seed(config), "partition"),
                           columns=columns, label_names=label_names, **config.partition.params)


def load(config: Config, device: torch.device, examples: Examples | None = None) -> Loaded:
    """Read data (unless they are given) and model, split the data, attach LoRA."""
    prepared, parts = examples or read_examples(config)
    bundle = tasks.with_weights(prepared, config.model, seed=derive(config.seed, "head"), device=device)
    bundle = _poisoned(config, bundle, parts)
    by = config.partition.params.get("column") if config.partition.name == "column" else None
    return adapt(config, bundle, parts, device)._replace(own=own_distributions(bundle.train, bundle.valid, parts, by))


def _poisoned(config: Config, bundle: tasks.Bundle, parts: list) -> tasks.Bundle:
    """With the labels of data.flipped's peers flipped, in training alone. ValueError for a task without classes."""
    if not config.data.flipped:
        return bundle
    num = len(bundle.train.label_names)
    if num < 2:
        raise ValueError(f"data.flipped = {list(config.data.flipped)} needs classes to flip, which the task "
                         f"{config.model.task.name!r} has not; allowed: null, or a classification")
    at = {int(i) for peer in config.data.flipped for i in parts[peer]}
    return replace(bundle, train=replace(bundle.train, features=FlippedLabels(bundle.train.features, at, num)))


def adapt(config: Config, bundle: tasks.Bundle, parts: list, device: torch.device) -> Loaded:
    """Attach LoRA to the model of a bundle whose training examples are already divided."""
    chosen = config.model.quantization
    if kinds.kind_of(config.lora).beside and chosen in ("nf4", "fp4", "int8") and device.type == "cpu":
        raise ValueError(f"model.quantization = {chosen!r} with lora.adapter = {config.lora.adapter!r}: on a CPU bitsandbytes packs "
                         "weights as the magnitudes cannot read them; allowed with it: torchao_int8, or a GPU")
    # one that is to lie in parts goes to the device part by part
    net = bundle.model if config.model.quantization or config.processes_per_peer > 1 else bundle.model.to(device)
    if config.train.gradient_checkpointing:
        recompute_activations(net)
    adapted = attach(net, config.lora, config.model.task.name, bundle.head_modules, derive(config.seed, "lora"),
                     partial(ranks.resolve, config.lora, config.peers, config.seed))
    if config.lora.start != "gradient":  # which needs the processes together: `assemble`
        adapted = with_start(adapted, config.lora.start)
    return Loaded(bundle, parts, adapted)


def in_parts(config: Config, runtime: Runtime, loaded: Loaded) -> None:
    """Keep this process's part of the base model alone, where a team holds it."""
    if runtime.team is not None:
        shard(loaded.adapted, runtime.team, loaded.bundle.head_modules)


def together_on(config: Config, runtime: Runtime, loaded: Loaded, adapted: Adapted, asked: Callable[[], bool] = lambda: False
                ) -> Together | None:
    """The passes of a team through its model; None where a process has the model alone."""
    if runtime.team is None:
        return None
    return Together(runtime.team, adapted, loaded.bundle.task, executors.autocasts(config.train.autocast, runtime.device), asked)


def adapted_for(config: Config, runtime: Runtime, loaded: Loaded, topology) -> Adapted:
    """The model with what the method keeps beside its adapters, for a process that hosts no peer and serves its team."""
    method = build_method(config, loaded.adapted.layout, topology, loaded.adapted.ranks, loaded.adapted)
    return with_residual(loaded.adapted, method.rule.residual)


def build_method(config: Config, layout: Layout, topology, known: ranks.Ranks | None, adapted: Adapted | None = None,
                 spectra: Mapping[int, list[float]] | None = None) -> Method:
    """known: None where the ranks follow from the model, which is not loaded yet; they may differ. spectra: of the inputs of the
    adapted layers, by hosted peer."""
    unequal = (1, config.lora.rank.largest) if known is None else known.unequal
    weights = None if adapted is None else FrozenWeights({site.pair.name: site for site in adapted.sites})
    context = Context(layout, config.lora.head, unequal, config.peers, known and known.largest, weights, topology, config.train.rounds,
                      adapted and adapted.frames, spectra)
    return methods.build(config.method.name, context, config.method.params, chosen_slots(config), config.delay)


def with_first_gradient(config: Config, runtime: Runtime, loaded: Loaded, resumed_from: Path | None) -> Adapted:
    """The adapters with their bases at the first gradient, where the configuration says so.

    Peer 0 finds them on its own first examples and hands them to all: another machine may not come to the same bits, nor a GPU the
    second time. A run that goes on takes them from its checkpoint.
    """
    adapted, transport = loaded.adapted, runtime.transport
    if config.lora.start != "gradient":
        return adapted
    if resumed_from is not None:
        saved = together(transport, lambda: bases_of(resumed_from))
        return adapted._replace(cores=adapted.cores._replace(bases=saved))
    made = together(transport, lambda: _first_gradient(config, loaded, runtime.device) if transport.rank == 0 else adapted)
    flat = torch.cat([made.cores.bases, made.start])
    flat = torch.frombuffer(bytearray(transport.spread(flat.numpy().tobytes())), dtype=torch.float32)
    start = adapted.start.clone()
    start.copy_(flat[len(made.cores.bases):])
    return adapted._replace(cores=adapted.cores._replace(bases=flat[:len(made.cores.bases)].clone()), start=start)


def _first_examples(config: Config, loaded: Loaded, device: torch.device, peer: int) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Those that a peer trains on first, lora.start_samples of them or all that it has: batches, each with its share of them."""
    bundle, part_of = loaded.bundle, loaded.parts[peer]
    num = min(config.lora.start_samples, len(part_of))
    chosen = DataStream(part_of, num, data_seed(config), peer).batch(0)
    batches = []
    for part in np.split(chosen, range(config.train.batch_size, num, config.train.batch_size)):
        batch = bundle.task.collate([bundle.train.features[i] for i in part])
        batches.append((len(part) / num, {key: value.to(device) for key, value in batch.items()}))
    return batches


def _spectra(config: Config, runtime: Runtime, loaded: Loaded) -> dict[int, list[float]] | None:
    """How many directions the inputs of each layer fill on each hosted peer's first examples, where the method divides by that."""
    rule = methods.fill(config.method.name, config.method.params, chosen_slots(config))["rule"]
    if rule.name != "task_bank" or rule.params.get("layers") == "even":
        return None
    return {peer: participation(loaded.adapted, loaded.bundle.task,
                                [batch for _, batch in _first_examples(config, loaded, runtime.device, peer)])
            for peer in runtime.hosted}


def _first_gradient(config: Config, loaded: Loaded, device: torch.device) -> Adapted:
    bundle, adapted, batches = loaded.bundle, loaded.adapted, _first_examples(config, loaded, device, 0)
    return at_first_gradient(adapted, bundle.task, batches, seed=derive(config.seed, "first gradient"), step=config.lora.start_step)


def bases_of(checkpoint: Path) -> torch.Tensor:
    """The bases (D_lora,) that no seed gives again. UnreadableError where the checkpoint has none."""
    found = read_state(checkpoint, [0]).get("bases.0")
    if found is None:
        raise UnreadableError(f"checkpoint {checkpoint} lacks the bases of its adapters")
    return found


def assemble(config: Config, runtime: Runtime, loaded: Loaded, topology, resumed_from: Path | None = None) -> Run:
    """Peers, rule, executor and evaluator of a run that has not begun, or whose state will come from the checkpoint `resumed_from`."""
    loaded = loaded._replace(adapted=with_first_gradient(config, runtime, loaded, resumed_from))
    bundle, parts, adapted, own = loaded.bundle, loaded.parts, loaded.adapted, loaded.own
    method = build_method(config, adapted.layout, topology, adapted.ranks, adapted, _spectra(config, runtime, loaded))
    adapted = with_residual(adapted, method.rule.residual)
    lengths = bundle.train.lengths() if config.data.packing or config.data.group_by_length else None
    streams = [make_stream(config.data, parts[p], config.train.batch_size, data_seed(config), p, lengths) for p in runtime.hosted]
    if config.data.packing:
        check_packing(adapted, bundle.task)
    peers = HostedPeers(runtime.hosted, adapted, streams, config.train, seed=config.seed, device=runtime.device)
    check_same_start(peers, bundle, runtime.transport, config.peers)
    autocast = executors.autocasts(config.train.autocast, runtime.device)
    together = together_on(config, runtime, loaded, adapted)
    evaluator = Evaluator(adapted, bundle.task, bundle.valid, config.eval.batch_size, runtime.device, autocast,
                          None if isinstance(own, str) else own,
                          metrics=choose_metrics(config.eval, bundle.task, len(bundle.train.label_names)), together=together)
    runtime.transport.lend(peers.x)
    gossip = Gossip(method, adapted.layout, topology, runtime.transport, peers.ids, peers.x, seed=config.seed, scale=peers.scale)
    one_by_one = config.train.privacy.noise is not None or together is not None
    executor = executors.choose("sequential" if one_by_one else config.train.executor, runtime.device, config.lora.adapter)
    return Run(config, peers, gossip, topology, runtime.transport, executor,
               bundle.task, bundle.train, evaluator, answers=make_answers(config, adapted, bundle, runtime.device), together=together)


def check_same_start(peers: HostedPeers, bundle, transport: Transport, num_peers: int) -> None:
    """Every peer must start from the same A (or bases and core) and head. ValueError names the first that differs from peer 0."""
    adapted = peers.adapted
    # a trained head is part of the row
    frozen = () if adapted.head else bundle.head_modules
    common = [p.detach().float().cpu().numpy().tobytes() for name in frozen for p in bundle.model.get_submodule(name).parameters()]
    if adapted.cores is not None:
        common.append(adapted.cores.bases.cpu().numpy().tobytes())
    shared = hashlib.sha256(b"".join(common)).digest()
    alike = adapted.ranks.unequal is None and adapted.frames is None
    rows = peers.x if alike else adapted.start[None].expand(len(peers.ids), -1)
    digests = [hashlib.sha256(row.cpu().numpy().tobytes() + shared).digest() for row in rows]
    first = transport.spread(digests[0])  # peer 0 is hosted by process 0
    differing = next((peer for peer, digest in zip(peers.ids, digests, strict=True) if digest != first), None)
    peer = num_peers - transport.agree(0 if differing is None else num_peers - differing)
    if peer < num_peers:
        what = "another A" if adapted.cores is None else "other bases, another core"
        raise ValueError(f"peer {peer} starts from {what} or head than peer 0; all must share seed, model and lora settings")
