"""Every rule's send and mix on rows of a few layers, without a model: one peer of a ring of three."""

import torch

from dfl import methods
from dfl.adapters.cores import core_layout
from dfl.adapters.frames import make_frames
from dfl.adapters.kinds import KINDS
from dfl.adapters.layout import Layout, a_view, b_view, empty_rows, head_view, make_layout, stack_a, stack_b
from dfl.config import LoraConfig
from dfl.methods import Context
from dfl.slots import Message, Round

SIZES = ((20, 20), (20, 12))  # (d_in, d_out) of the two kinds of layers
MORE = {"flora_na": ("flora_na", {"steps": 14}), "hetlora pruning": ("hetlora", {"gamma": 0.5}),
        "flora_na adamw": ("flora_na", {"solver": "adamw", "steps": 3}), "fedrot in part": ("fedrot", {"strength": 0.5}),
        "decaf own": ("decaf", {"gauge": "own"}), "tad": ("tad", {"T": 1})}
METHODS = sorted({*methods.METHODS, *MORE} - {"local"})


def context(name: str, layers: int, rank: int = 4) -> Context:
    """What a method's rule wants to know, for `layers` layers of each size."""
    pairs = [(f"{k}.{m}", rank, i, o, 2.0) for k in range(layers) for m, (i, o) in enumerate(SIZES)]
    adapter = methods.METHODS[name].adapter or "lora"
    kind, generator = KINDS[adapter], torch.Generator().manual_seed(1)
    layout = make_layout(pairs, magnitudes=[(p[0], kind.beside.shape(*p[2:4])) for p in pairs] if kind.beside else ())
    if kind.core:
        return Context(core_layout(layout, (), kind.core(LoraConfig(heads=2))))
    frames = make_frames(layout, 0, 3) if kind.own_a else None
    return Context(layout, frames=frames, peers=3, weights={p[0]: torch.randn(p[3], p[2], generator=generator) for p in pairs})


def rows(of: Context) -> torch.Tensor:
    """Three peers that began together and drifted; A is the same for all, or each peer's own."""
    generator, layout = torch.Generator().manual_seed(0), of.layout
    x = empty_rows(3, layout.size)
    for pair in layout.pairs:
        a_view(x, pair).copy_(torch.randn(pair.rank, pair.d_in, generator=generator).expand(3, -1, -1))
        b_view(x, pair).copy_(0.1 * torch.randn(3, pair.d_out, pair.rank, generator=generator))
    for tensor in (*layout.magnitudes, *layout.cores):
        head_view(x, tensor).copy_(1 + 0.1 * torch.randn(3, *tensor.shape, generator=generator))
    if of.frames is not None:
        for peer, row in enumerate(x):
            row[layout.groups["A"]] = of.frames(peer)[layout.groups["A"]]
    return x


class Peer0:
    """Peer 0 of the ring: what it received, and its own round."""

    def __init__(self, name: str, layers: int, device: torch.device | str = "cpu"):
        name, params = MORE.get(name, (name, {}))
        of, weights = context(name, layers), {0: 0.5, 1: 0.25, 2: 0.25}
        if of.weights is not None:
            of = of._replace(weights={layer: weight.to(device) for layer, weight in of.weights.items()})
        method = methods.build(name, of, params)
        self.layout, self.rule, self.inbox = of.layout, method.rule, dict[int, Message]()
        for peer, row in reversed(list(enumerate(rows(of).to(device)))):
            self.x, self.state, self.round = row, self.rule.init(row), Round(0, peer, weights, method.schedule.plan(0, peer))
            self.inbox[peer], self.state = self.rule.send(row, self.state, self.round)

    def mix(self) -> list[torch.Tensor]:
        """Its model after the mix: products where it has factors, and a residual where its rule keeps one."""
        new, state = self.rule.mix(self.x, self.inbox, self.state, self.round)
        kept = self.rule.residual
        return products(new, self.layout) + ([] if kept is None else products(state["residual"], kept))


def products(row: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """B A of all layers by shape, and what lies behind the factors."""
    behind = row[layout.groups["B"].stop:]
    return [*(stack_b(row, pairs) @ stack_a(row, pairs) for pairs in layout.shapes()), *([behind] if len(behind) else [])]
