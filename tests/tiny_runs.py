"""Whole runs on a tiny random model and a few words: recipes and their pieces, for tests of what a run leaves behind."""

import hashlib
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path

import tiny_models
import torch
import yaml

import dfl
from dfl import config as configuration
from dfl.engine.gossip import Gossip
from dfl.run import build
from dfl.run.checkpoint import read_state
from dfl.run.runtime import start
from dfl.run.train import train
from dfl.slots import Plan
from dfl.training.phase import ModelTrainer

SENTENCES = [("good film", "yes"), ("bad film how what", "no"), ("not good", "no"), ("not bad the film", "yes"),
             ("the graph of peer is good", "yes"), ("a bad node and a bad array", "no")]


def write_data(folder: Path, copies: int = 8) -> Path:
    """A table of `copies` times six labelled sentences, no two alike in length and order."""
    lines = [f"{text} {tiny_models.WORDS[k % len(tiny_models.WORDS)]},{label}" for k in range(copies) for text, label in SENTENCES]
    path = folder / "data.csv"
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return path


def make_folder(folder: Path, layers: int = 1) -> Path:
    """The folder, with a tiny `bert` and `data.csv` in it."""
    tiny_models.save(folder / "bert", "bert", layers)
    write_data(folder)
    return folder


def arguments(model: Path, data: Path, output: Path, **fields) -> list[str]:
    """The overrides of a run of a second: four peers on a ring, two steps a round. `train__lr=0.1` sets train.lr.

    One process, which a test may look into; tests/launch/test_own_workers.py is about several, which are the default.
    """
    tree = {"peers": 4, "model.name": model, "data.source": "file", "data.train": data, "data.max_length": 16,
            "data.valid_fraction": 0.25, "lora.rank": 2, "method": "lora", "topology": "ring", "train.rounds": 4,
            "train.local_steps": 2, "train.batch_size": 4, "eval.every": 2, "output": output, "device": "cpu", "processes": 1}
    tree |= {key.replace("__", "."): value for key, value in fields.items()}
    return [word for key, value in tree.items() for word in _words(key, value)]


def _words(key: str, value) -> list[str]:
    """`{name: tad, T: 5}` as --method=tad --method.T=5."""
    fields = yaml.safe_load(value) if isinstance(value, str) and value.startswith("{") else {}
    if "name" in fields:
        return [f"--{key}={fields.pop('name')}", *(f"--{key}.{name}={inner}" for name, inner in fields.items())]
    return [f"--{key}={'null' if value is None else value}"]


def make_config(model: Path, data: Path, output: Path, **fields) -> configuration.Config:
    return configuration.load(None, arguments(model, data, output, **fields))


def make_run(config: configuration.Config):
    """The assembled run of a configuration in this process, and what was loaded for it."""
    topology = build.check(config)
    runtime = start(config)
    loaded = build.load(config, runtime.device)
    return build.assemble(config, runtime, loaded, topology), loaded


def rows_of(folder: Path, num_peers: int) -> torch.Tensor:
    """X_ND of a checkpoint."""
    state = read_state(folder, range(num_peers))
    return torch.stack([state[f"x.{peer}"] for peer in range(num_peers)])


def put_in(run, **slots) -> None:
    """Give a run another method: other contents of some slots."""
    old = run.gossip
    run.gossip = Gossip(old.method._replace(**slots), old.layout, old.topology, old.transport, old.peers, run.peers.x, seed=old.seed,
                        scale=old.scale)
    run.gossip.restore(old.state)


def local_phase(run, t=0, plans=None, executor=None, peers=None):
    """The local phase of round t, without what a rule adds to it: the losses (P,)."""
    peers = peers or run.peers
    trainer = ModelTrainer(peers, run.task, run.split, executor or run.executor)
    return trainer.run(peers.x, plans or run.gossip.plans(t), [None] * len(peers.ids), t)


def plans(peers, trains: frozenset[str]) -> list[Plan]:
    """The same for all hosted peers: train these groups."""
    return [Plan(trains, frozenset())] * len(peers.ids)


class StopsItself(dfl.Callback):
    """Gets SIGSTOP when two rounds are recorded. Who looks at the records from outside and sends it would now and then find the run
    at its end."""

    def on_round_end(self, run, control, record):
        if run.round == 2:
            os.kill(os.getpid(), signal.SIGSTOP)


class StopAfter:
    """A signal in round `rounds` (counted from the call's first), in place of StopSignal and, by `halt`, of the clock that decides
    whether the round is finished: it is, unless `steps` says after how many steps of this process it stops."""

    def __init__(self, rounds, steps=None):
        self.left, self.steps, self.received = rounds, steps, 0

    def halt(self, asked):
        return self

    def begin(self):
        self.left, self.step = self.left - 1, 0

    def __call__(self, steps_left):
        if self.left <= 0 and (self.steps is None or self.step >= self.steps):
            self.received = 1
        self.step += 1
        return self.received > 0 and self.steps is not None

    def at_once(self):
        return nullcontext()

    def restore(self):
        pass


def stop_after(running, rounds, steps=None, patch=setattr) -> None:
    stop = StopAfter(rounds, steps)
    patch(running, "StopSignal", lambda: stop)
    patch(running, "Halt", stop.halt)


class Near(dict):
    """Measures: sums of products of matrices, whose last digits depend on which peers are hosted together."""

    def __eq__(self, other) -> bool:
        return self.keys() == other.keys() and all(math.isclose(self[key], other[key], rel_tol=1e-6, abs_tol=1e-9) for key in self)


def lasting(line: dict) -> dict:
    """What of a record is the same however a run is hosted and interrupted: the rest is clock and traffic."""
    kept = {key: line.get(key) for key in ("round", "train_loss_peers", "edges", "message_bytes", "eval")}
    return kept | {"measures": Near(line.get("measures", {}))}


def adapter_digests(run: Path) -> dict[str, str]:
    """SHA-256 of every adapter of the last checkpoint, by folder."""
    last = max((run / "checkpoints").glob("round-*"))
    return {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(last.glob("*/adapter_model.safetensors"))}


def train_worker(rank: int, tree: dict, resume: bool = False) -> int:
    """`dfl train` in one of several processes: the exit status."""
    return train(configuration.from_dict(tree), resume=resume)


def assert_goes_on(make, tmp_path, monkeypatch, steps: int, **fields) -> None:
    """A run of `make(tmp_path, name, **fields)` that is stopped within its third round, after `steps` steps, and resumed ends in the
    bits of one that was not."""
    from dfl.run import train as running
    running.train(make(tmp_path, "whole", **fields))
    with monkeypatch.context() as patch:
        stop_after(running, 2, steps=steps, patch=patch.setattr)
        assert running.train(make(tmp_path, "halves", **fields)) == running.STOPPED
    running.train(make(tmp_path, "halves", **fields), resume=True)
    assert adapter_digests(tmp_path / "halves") == adapter_digests(tmp_path / "whole")
