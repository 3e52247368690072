"""`dfl train`: from a configuration to a run folder with adapters."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

import topologies
from dfl import codecs, executors, partition, rules, tasks
from dfl.adapters import Adapted, attach
from dfl.checkpoint import Checkpointer, complete, folder_of, latest, read_state, verify
from dfl.config import Config, Plugin, from_dict
from dfl.config import load as load_recipe
from dfl.evaluate import Evaluator, consensus
from dfl.peers import DataStream, HostedPeers
from dfl.plugins import check_parameters, lookup
from dfl.record import Console, JsonLines, Trackers, check_trackers, describe_run, read_lines
from dfl.report import closing_table, round_line
from dfl.rounds import Hooks, Run, evaluate, run_rounds
from dfl.rules.base import Rule
from dfl.runtime import Runtime, StopSignal, start
from dfl.seeds import derive
from dfl.simulate import with_contraction

# what may differ between a run and its continuation without changing the result
_FREE = {"device", "backend", "threads", "timeout", "report_to", "output", "eval", "measure", "checkpoint", "baseline"}
# a stop asked for by a signal: "try again later", as in sysexits.h
STOPPED = 75


class Loaded(NamedTuple):
    """The data and the model, once per process."""

    bundle: tasks.Bundle
    parts: list
    adapted: Adapted


def check(config: Config):
    """Everything that can be refused before anything is loaded; the topology, which is cheap."""
    rules.check(config.rule.name, config.rule.params)
    for key, instead in (("head", "lora.head"), ("contraction", "topology")):
        if key in config.rule.params:
            raise ValueError(f"rule.{key} is set by {instead}")
    codecs.check(config.codec.name, config.codec.params)
    check_parameters("partition", config.partition.name, lookup("partition", partition.PARTITIONS, config.partition.name),
                     config.partition.params)
    check_trackers(config.report_to)
    return build_topology(config)


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
    adapted = attach(bundle.model.to(device), config.lora, config.model.task, bundle.head_modules, derive(config.seed, "lora"))
    return Loaded(bundle, parts, adapted)


def build_rule(config: Config, adapted: Adapted, topology) -> Rule:
    params = with_contraction(config.rule.name, config.rule.params, topology)
    return rules.build(config.rule.name, adapted.layout, head=config.lora.head, **params)


def assemble(config: Config, runtime: Runtime, loaded: Loaded, topology) -> Run:
    """Peers, rule, executor and evaluator of a run that has not begun."""
    bundle, parts, adapted = loaded
    streams = [DataStream(parts[p], config.train.batch_size, data_seed(config), p) for p in runtime.hosted]
    peers = HostedPeers(runtime.hosted, adapted, streams, config.train, seed=config.seed, device=runtime.device)
    check_same_start(peers, bundle, runtime.transport)
    autocast = config.train.autocast == "bfloat16" or (config.train.autocast == "auto" and runtime.device.type == "cuda")
    evaluator = Evaluator(adapted, bundle.task, bundle.valid, config.eval.batch_size, runtime.device, autocast)
    codec = codecs.build(config.codec.name, **config.codec.params)
    executor = executors.choose(config.train.executor, runtime.device)
    return Run(config, peers, build_rule(config, adapted, topology), topology, codec, runtime.transport, executor,
               bundle.task, bundle.train, evaluator)


def check_same_start(peers: HostedPeers, bundle, transport) -> None:
    """Every peer must start from the same A and the same head. ValueError names the first that differs from peer 0."""
    # a trained head is part of the row
    frozen = () if peers.adapted.head else bundle.head_modules
    head = [p.detach().float().cpu().numpy().tobytes() for name in frozen for p in bundle.model.get_submodule(name).parameters()]
    digests = [hashlib.sha256(b"".join([row.cpu().numpy().tobytes(), *head])).digest() for row in peers.x]
    rows = torch.tensor([int.from_bytes(d[:8], "big", signed=True) for d in digests])[:, None]
    rows = transport.gather(rows)
    differing = [] if rows is None else (rows[:, 0] != rows[0, 0]).nonzero().flatten().tolist()
    peer = transport.agree(differing[0] if differing else -1)
    if peer >= 0:
        raise ValueError(f"peer {peer} starts from another A or head than peer 0; all must share seed, model and lora settings")


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> int:
    """Run a configuration to its end (or to a signal); the exit status. Process 0 writes the run folder and prints the table."""
    topology = check(config)
    runtime = start(config)
    output = Path(config.output)
    resumed_from = _prepare_output(config, output, runtime, resume, overwrite)
    loaded = load(config, runtime.device)
    finished = _train_one(config, runtime, loaded, topology, output, resumed_from)
    if finished and config.baseline:
        alone = _baseline(config)
        folder = Path(alone.output)
        finished = _train_one(alone, runtime, loaded, topology, folder, latest(folder) if resume else None)
    if runtime.place.rank == 0 and finished:
        print(closing_table(output), flush=True)
    runtime.transport.close()
    return 0 if finished else STOPPED


def _baseline(config: Config) -> Config:
    """The same run without mixing, in a folder inside the run's."""
    tree = config.to_dict() | {"rule": config.baseline, "baseline": None, "output": f"{config.output}/baseline-{config.baseline}"}
    return from_dict(tree)


def _prepare_output(config: Config, output: Path, runtime: Runtime, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from. Refuses a folder that holds another run before anything is touched."""
    if resume:
        found, published = latest(output), complete(output)
        if published and found is None:
            raise ValueError(f"output = {config.output!r}: all of its {len(published)} checkpoints are damaged; "
                             "pass --overwrite to begin again")
        if found is not None:
            _check_continuation(config, output)
        return found
    if (output / "recipe.yaml").exists() and not overwrite:
        raise ValueError(f"output = {config.output!r} already holds a run; pass --resume to go on, --overwrite to replace it, "
                         "or another --output")
    runtime.transport.agree(0)  # all have looked before one removes
    if overwrite and runtime.place.rank == 0 and (output / "recipe.yaml").exists():
        shutil.rmtree(output)
    runtime.transport.agree(0)
    return None


def _check_continuation(config: Config, output: Path) -> None:
    before = yaml.safe_load((output / "recipe.yaml").read_text())
    now = config.to_dict()
    for key in now:
        if key in _FREE:
            continue
        old, new = before.get(key), now[key]
        if key == "train" and new["schedule"] == "constant" and not new["warmup"]:
            old, new = old | {"rounds": 0}, new | {"rounds": 0}  # a constant run may be made longer
        if old != new:
            raise ValueError(f"{key} = {new!r} differs from {old!r}, with which {str(output)!r} was begun; "
                             "a run goes on as it began")


def _train_one(config: Config, runtime: Runtime, loaded: Loaded, topology, output: Path, resumed_from: Path | None) -> bool:
    run = assemble(config, runtime, loaded, topology)
    if resumed_from is not None:
        restore(run, resumed_from)
    first = runtime.place.rank == 0
    record = _begin_record(config, run, loaded, output, runtime, resumed_from is None) if first else None
    saver = Checkpointer(output, runtime.transport, runtime.place.rank, loaded.bundle.base_name, config.checkpoint.keep)
    stop = StopSignal()
    try:
        hooks = Hooks(record.round if first else lambda _: None, lambda: save(run, saver), lambda: stop.received > 0)
        finished = run_rounds(run, hooks)
    finally:
        stop.restore()
        if first:
            record.close()
    if first and not finished:
        record.console.say(f"stopped after round {run.completed}; the state is saved, --resume goes on")
    return finished


def _begin_record(config: Config, run: Run, loaded: Loaded, output: Path, runtime: Runtime, new: bool) -> "_Recording":
    """A start that fails (a full disk, a tracker without an account) leaves nothing that looks like a run."""
    try:
        return _Recording(config, run, loaded, output, runtime)
    except (OSError, ValueError) as error:
        if new:
            for name in ("recipe.yaml", "run.json", "metrics.jsonl"):
                (output / name).unlink(missing_ok=True)
            if output.is_dir() and not any(output.iterdir()):
                output.rmdir()
        if isinstance(error, OSError) and error.filename is None:  # a write does not say where, as an open does
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise


class _Recording:
    """What process 0 writes and prints."""

    def __init__(self, config: Config, run: Run, loaded: Loaded, output: Path, runtime: Runtime):
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
        shards = partition.table(loaded.parts, loaded.bundle.train.labels, loaded.bundle.train.label_names)
        # JSON is written last: a folder with a run.json is a run that has started
        facts = loaded.bundle.facts | {"rule": dict(run.rule.facts), "state_length": run.peers.layout.size,
                                       "processes": runtime.place.size, "device": str(runtime.device)}
        (output / "run.json").write_text(json.dumps(describe_run(config.to_dict(), facts), indent=1, default=str))
        self.lines = JsonLines(output / "metrics.jsonl", keep_before=run.completed + 1 if run.completed else 0)
        self.trackers = Trackers(config.report_to, output, config.to_dict())
        self.console = Console(config.train.rounds, run.completed)
        self.primary = run.task.primary
        if run.completed == 0:
            self.console.say(shards)
        self.console.say(_opening(config, run, runtime, loaded))

    def round(self, record: dict) -> None:
        self.lines.write(record)
        self.trackers.log(record["round"], record)
        if record["round"]:
            self.console.round(record["round"] - 1, round_line(record, self.primary), "eval" in record)

    def close(self) -> None:
        self.console.close()
        self.trackers.close()
        self.lines.close()


def _opening(config: Config, run: Run, runtime: Runtime, loaded: Loaded) -> str:
    chosen = "".join(f", {key} = {value}" for key, value in run.rule.facts.items())
    return (f"{config.peers} peers on {runtime.place.size} process(es), {runtime.device}; rule {config.rule.name}{chosen}; "
            f"topology {config.topology.name}; {run.peers.layout.size:,} numbers a peer; "
            f"{len(loaded.bundle.train):,} training and {len(loaded.bundle.valid):,} evaluation examples")


def save(run: Run, saver: Checkpointer) -> None:
    """A checkpoint of the state after `run.completed` rounds, together with the other processes."""
    rows = run.transport.gather(run.peers.x)
    product = run.rule.product
    merged = None
    if rows is not None:
        what = "best rank-r approximation of the mean product" if product else "mean of the factors"
        merged = (consensus(rows, run.peers.layout, product), what)
    tensors = {f"rule.{peer}.{key}": value for peer, state in zip(run.peers.ids, run.states, strict=True)
               for key, value in state.items()}
    tensors |= {f"moments.{name}": value for name, value in run.peers.moments().items()}
    saver.save(run.completed, run.peers.adapted, run.peers.ids, run.peers.x, tensors, merged)


def restore(run: Run, folder: Path) -> None:
    """Go on from a checkpoint, whatever number of processes wrote it."""
    run.completed = verify(folder)
    found = read_state(folder, run.peers.ids)
    for row, peer in enumerate(run.peers.ids):
        run.peers.x[row] = found[f"x.{peer}"].to(run.peers.device)
        run.states[row] = {key: found[f"rule.{peer}.{key}"].to(run.peers.device) for key in run.states[row]}
    moments = {name.removeprefix("moments."): value for name, value in found.items() if name.startswith("moments.")}
    last = run.rule.trains(run.completed - 1) if run.completed else frozenset()
    run.peers.load_moments(moments, last)


def evaluate_run(output: Path, overrides=()) -> dict | None:
    """`dfl eval`: evaluate the saved adapters of a run again, the same numbers as in its last record; None but on process 0."""
    config = read_config(output, overrides)
    topology = check(config)
    folder = latest(output)
    if folder is None:
        raise ValueError(f"{str(output)!r} holds no complete checkpoint")
    runtime = start(config)
    run = assemble(config, runtime, load(config, runtime.device), topology)
    restore(run, folder)
    result = evaluate(run, runtime.transport.gather(run.peers.x))
    runtime.transport.close()
    return result and {"checkpoint": str(folder), "round": run.completed, **result}


def read_config(output: Path, overrides=()) -> Config:
    """The configuration a run was started with."""
    if not (output / "recipe.yaml").is_file():
        raise ValueError(f"{str(output)!r} holds no run (no recipe.yaml in it)")
    return load_recipe(output / "recipe.yaml", overrides)


__all__ = ["STOPPED", "Plugin", "check", "evaluate_run", "folder_of", "read_lines", "train"]
