"""A method on rows of its own kind of adapter, with the graph and the parameters that it needs: four peers, two small layers."""

import torch
from one_round import build

import topologies
from dfl.adapters.cores import expand, make_cores
from dfl.adapters.frames import make_frames
from dfl.adapters.kinds import KINDS
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.config import LoraConfig
from dfl.engine.gossip import Gossip
from dfl.methods import METHODS, Choice
from dfl.transport import InProcess

NUM, ROUNDS = 4, 60
SIZES = [("q", 7, 5, 1.0), ("o", 4, 9, 2.0)]
# what a method needs beside its name, as (graph, parameters)
WANTS = {"tad": ("ring", {"T": 1}), "flora": ("complete", {}), "fedask": ("ring", {"memory": True}),
         "flora_na": ("ring", {"steps": 5})}


# a setting of every codec with every memory that it has
CODEC_SETTINGS = {
    "bfloat16": Choice("bfloat16"), "float16": Choice("float16"),
    "int8": Choice("int8", {"block": 8}), "int8 random": Choice("int8", {"rounding": "random", "memory": "none"}),
    "int4": Choice("int4", {"block": 8}), "int4 differences": Choice("int4", {"rounding": "random", "memory": "differences"}),
    "qsgd": Choice("qsgd", {"block": 8}), "qsgd feedback": Choice("qsgd", {"memory": "feedback", "block": 8}),
    "qsgd none": Choice("qsgd", {"memory": "none", "block": 8}),
    "sign": Choice("sign"), "sign feedback": Choice("sign", {"memory": "feedback"}),
    "top_k": Choice("top_k", {"share": 0.3}), "top_k feedback": Choice("top_k", {"share": 0.3, "memory": "feedback"}),
    "random_k": Choice("random_k", {"share": 0.3}),
    "random_k differences": Choice("random_k", {"share": 0.3, "memory": "differences"}),
    "low_rank": Choice("low_rank"), "low_rank feedback": Choice("low_rank", {"memory": "feedback"}),
}
DIFFERENCES = {"int4 differences", "qsgd", "sign", "top_k", "random_k differences", "low_rank"}
PARTS = {"qsgd feedback", "qsgd none", "sign feedback", "top_k feedback", "random_k", "low_rank feedback"}
# what averages numbers as they are, and what a codec of differences cannot go with, by words of the refusal
LINEAR = {"lora", "ffa", "share_a", "rolora", "adf", "tad", "replicate", "fed_sb", "local"}
FRAME, DATED = "turns the frame of its factors", "mean something in their own round alone"
NO_DIFFERENCES = {**dict.fromkeys(("decaf", "florist", "fedask", "fedhl", "carry", "dora", "hira"), FRAME),
                  **dict.fromkeys(("lora_a2", "plora", "salf", "fed_svd", "flora"), DATED),
                  "task_bank": "its message is not its row", "fedex_choco": "sends compressed differences itself"}


def codec_refusal(name: str, setting: str) -> str | None:
    """The words with which a method must refuse a setting of a codec; None where it must not."""
    if setting in DIFFERENCES:
        return NO_DIFFERENCES.get(name)
    return "does not average numbers as they are" if setting in PARTS and name not in LINEAR else None


def lora(rank: int, **others):
    return make_layout([(name, rank, d_in, d_out, scaling) for name, d_in, d_out, scaling in SIZES], **others)


class Case:
    """slots: choices for some slots; delay: 1 may stand among them."""

    def __init__(self, name: str, rank: int = 2, seed: int = 0, slots=None, topology=None):
        graph, params = WANTS.get(name, ("ring", {}))
        slots = dict(slots or {})
        delay = slots.pop("delay", 0)
        if "wrapper" in slots and slots["wrapper"].name == "relay":
            graph = "path"
        self.lora = self.layout = lora(rank)
        self.cores = self.frames = None
        adapter = METHODS[name].adapter
        kind = KINDS[adapter or "lora"]
        if kind.own_a:
            self.frames = make_frames(self.lora, 0, NUM)
        if kind.core:
            self.cores = make_cores(self.lora, [], kind.core(LoraConfig(heads=2)), seed=0)
            self.layout = self.cores.layout
        elif adapter:
            self.layout = lora(rank, magnitudes=[("q", (5,)), ("o", (9,))] if kind.beside else ())
            generator = torch.Generator().manual_seed(5)
            params = {"weights": {key: 1 + 0.1 * torch.rand(d_out, d_in, generator=generator) for key, d_in, d_out, _ in SIZES}}
        self.topology, self.seed = topologies.build(graph, NUM) if topology is None else topology, seed
        own = {"frames": self.frames, "peers": NUM} if self.frames else {}
        self.rule = build(name, self.layout, slots=slots, topology=self.topology, rounds=ROUNDS, delay=delay,
                          **params, **own)

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
    for peer, row in enumerate(x if case.frames else ()):
        row[case.layout.groups["A"]] = case.frames(peer)[case.layout.groups["A"]]
    return x
