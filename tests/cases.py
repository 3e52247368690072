"""A method on rows of its own kind of adapter, with the graph and the parameters that it needs: four peers, two small layers."""

import torch
from one_round import build

import topologies
from dfl.adapters.cores import expand, make_cores
from dfl.adapters.kinds import KINDS
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.config import LoraConfig
from dfl.engine.gossip import Gossip
from dfl.methods import METHODS
from dfl.transport import InProcess

NUM, ROUNDS = 4, 60
SIZES = [("q", 7, 5, 1.0), ("o", 4, 9, 2.0)]
# what a method needs beside its name, as (graph, parameters)
WANTS = {"tad": ("ring", {"T": 1}), "flora": ("complete", {}), "fedask": ("ring", {"memory": True})}


def lora(rank: int, **others):
    return make_layout([(name, rank, d_in, d_out, scaling) for name, d_in, d_out, scaling in SIZES], **others)


class Case:
    """slots: choices for some slots."""

    def __init__(self, name: str, rank: int = 2, seed: int = 0, slots=None):
        graph, params = WANTS.get(name, ("ring", {}))
        if slots and "wrapper" in slots and slots["wrapper"].name == "relay":
            graph = "path"
        self.lora = self.layout = lora(rank)
        self.cores = None
        adapter = METHODS[name].adapter
        kind = KINDS[adapter or "lora"]
        if kind.core:
            self.cores = make_cores(self.lora, [], kind.core(LoraConfig(heads=2)), seed=0)
            self.layout = self.cores.layout
        elif adapter:
            self.layout = lora(rank, magnitudes=[("q", (5,)), ("o", (9,))] if kind.beside else ())
            generator = torch.Generator().manual_seed(5)
            params = {"weights": {key: 1 + 0.1 * torch.rand(d_out, d_in, generator=generator) for key, d_in, d_out, _ in SIZES}}
        self.topology, self.seed = topologies.build(graph, NUM), seed
        self.rule = build(name, self.layout, slots=slots or {}, topology=self.topology, rounds=ROUNDS, **params)

    def gossip(self, x) -> Gossip:
        return Gossip(self.rule.method, self.layout, self.topology, InProcess(), range(NUM), x, seed=self.seed)

    def mean_model(self, x, states) -> torch.Tensor:
        """The mean of the peers' products, residuals included."""
        factors = x
        if self.cores:
            expand(self.cores, x, factors := empty_rows(len(x), self.lora.size))
        parts = [(factors, self.lora)]
        if self.rule.residual:
            parts.append((torch.stack([s["residual"] for s in states]), self.rule.residual))
        return sum(torch.cat([p.scaling * (b_view(r, p) @ a_view(r, p)).flatten(1) for p in layout.pairs], 1)
                   for r, layout in parts).mean(0)


def start_rows(case: Case, apart: bool = False) -> torch.Tensor:
    """Rows (4, D) that a run may start from: one A (and all else that peers share), B of each its own; apart: nothing shared."""
    x = empty_rows(NUM, case.layout.size)
    x.copy_(0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    if case.layout.has("M"):
        x[:, case.layout.groups["M"]] = x[:, case.layout.groups["M"]].abs() + 1
    if case.layout.has("A") and not apart:
        x[:, case.layout.groups["A"]] = x[0, case.layout.groups["A"]]
    return x
