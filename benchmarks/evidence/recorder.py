"""What the protocol records of a run on the way and `metrics.jsonl` does not hold: relative disagreement, gradients of
both factors.

A callback of the recipes of this study. It looks at the run and changes nothing in it; a line of `diagnostics.jsonl` is
a measurement, and after a resumption the last line of a round counts.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from dfl import Callback
from dfl.adapters.layout import empty_rows
from dfl.metrics.measures import scaled_product_gram

FILE = "diagnostics.jsonl"
EXAMPLES = 64  # of each peer's own, for its gradient
APART, WITHOUT_PHASES = 5, 15  # rounds between two measurements, at least; where nothing alternates


class Recorder(Callback):
    """Measures where a phase ends, but at most every fifth round; every 15 rounds where there are no phases."""

    def __init__(self):
        self.last = None

    def on_train_begin(self, run, control) -> None:
        written = read(run.output)
        self.last = max((line["round"] for line in written if line["round"] <= run.round), default=0)

    def on_round_end(self, run, control, record) -> None:
        inner = run._run
        if not wanted(run.round, self.last, inner.config.train.rounds, lambda t: inner.gossip.plans(t)[0].trains):
            return
        line = {"round": run.round, "trained": "+".join(sorted(inner.gossip.plans(run.round - 1)[0].trains)),
                **disagreement(inner.peers.common_scale(), inner.peers.adapted.lora), **gradient_norms(inner)}
        with (run.output / FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.last = run.round


def wanted(done: int, last: int, rounds: int, trains) -> bool:
    """Whether to measure after `done` rounds. trains(t): the groups that round t trains."""
    if done == rounds:
        return True
    alternates = any(trains(t) != trains(0) for t in range(rounds))
    if not alternates:
        return done % WITHOUT_PHASES == 0
    return done - last >= APART and trains(done) != trains(done - 1)


def read(output: Path) -> list[dict]:
    """A line a round, in order; of two lines of one round the last."""
    path = output / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    found = {}
    for text in lines:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # torn by a kill
            continue
        found[line["round"]] = line
    return [found[number] for number in sorted(found)]


def disagreement(x: Tensor, layout) -> dict[str, float]:
    """Of rows x (N, D): the root mean square of the products' norms, and how much of it is distance from their mean."""
    gram = scaled_product_gram(x, layout)
    size = float(gram.diagonal().mean())
    away = size - float(gram.mean())
    return {"product": max(size, 0.0) ** 0.5, "disagreement": (max(away, 0.0) / size) ** 0.5 if size > 0 else 0.0}


def gradient_norms(run) -> dict[str, float]:
    """By factor F: mean_i ||grad_F f_i|| at each peer's model and own examples, and ||mean_i grad_F f_i||."""
    peers, groups = run.peers, frozenset({"A", "B"})
    rows = run.rows()
    g = empty_rows(len(peers.ids), peers.adapted.lora.size, device=peers.device)
    for row in range(len(peers.ids)):
        chosen = peers.streams[row].indices[:EXAMPLES]
        batch = run.task.collate([run.split.features[i] for i in chosen])
        with run.executor.bound(peers.adapted, rows, g, [row], groups) as forward:
            run.task.losses(forward(run.task.inputs(batch), [row]), batch, 1).sum().backward()
    found = {}
    for group in sorted(groups):
        cut = g[:, peers.adapted.lora.groups[group]].double()
        found |= {f"gradient_{group}": float(torch.linalg.vector_norm(cut, dim=1).mean()),
                  f"mean_gradient_{group}": float(torch.linalg.vector_norm(cut.mean(0)))}
    return found
