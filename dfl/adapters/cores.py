"""Adapters whose rows hold a small core of every layer, between frozen bases, in place of A and B.

The model sees ordinary LoRA factors, which `expand` makes from a row and the bases; `pull_back` turns the gradients of
A and B into those of the core. What a core is, and how it makes factors, is a `Core`: the functions of one layer that a
kind of adapter brings (`dfl.adapters.kinds`). Bases are the same at every peer: drawn from the seed here, or found by
`dfl.training.starts`. `blocks` is the core of B R A (Fed-SB: Ponkshe et al. 2025, arXiv 2502.15436) and of
sum_h s_h B_h H_h A_h (RAVAN: Raje et al. 2025, arXiv 2506.05568).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.layout import HeadTensor, Layout, Pair, Shapes, a_view, b_view, empty_rows, head_view, make_layout

Values = Mapping[str, Tensor]  # the tensors of a layer's core, (..., *shape) each


def orthonormal(pair: Pair, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bases a (R, I) with orthonormal rows and b (O, R) with orthonormal columns, for a rank that a layer can hold."""
    return _columns(pair.d_in, pair.rank, generator).mT, _columns(pair.d_out, pair.rank, generator)


def _columns(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """(size, rank) with orthonormal columns; signs fixed, so that every machine gets the same."""
    q, r = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


class Core(NamedTuple):
    """What a row holds of a layer in place of A (R, I) and B (O, R), between frozen bases a (R, I) and b (O, R).

    shapes(pair) -> {name: shape}, the same names for every layer; ValueError for sizes that do not fit.
    factors(values, a, b) -> (A (..., R, I), B (..., O, R)).
    gradients(values, a, b, grad_a, grad_b) -> the gradient of every value; of those of A and B only the ones in `moves`
        are made, the others are zero.
    bases(pair, generator) -> (a, b).
    start: what the tensors of a name are filled with at first; zero where it is not said.
    averageable(layout, x_D) -> rows of the same adapters whose mean is to be taken.
    """

    shapes: Callable[[Pair], Mapping[str, tuple[int, ...]]]
    factors: Callable[[Values, Tensor, Tensor], tuple[Tensor, Tensor]]
    gradients: Callable[[Values, Tensor, Tensor, Tensor, Tensor], Values]
    moves: frozenset[str] = frozenset({"A", "B"})
    bases: Callable[[Pair, torch.Generator], tuple[Tensor, Tensor]] = orthonormal
    start: Mapping[str, float] = {}
    averageable: Callable[[Layout, Tensor], Tensor] = lambda layout, x: x


class Cores(NamedTuple):
    """A core for every layer.

    lora: the layout of the factors that the model reads; layout: of the rows; bases (D_lora,): a and b of every layer,
    in the places of A and B.
    """

    lora: Layout
    layout: Layout
    bases: Tensor
    core: Core

    def tensors(self, index: int) -> dict[str, HeadTensor]:
        """Where the core of a layer lies in a row, by name."""
        names = list(self.core.shapes(self.lora.pairs[index]))
        return dict(zip(names, self.layout.cores[len(names) * index:], strict=False))

    def values(self, x: Tensor, index: int) -> dict[str, Tensor]:
        """The core of a layer, as views of the rows x (..., D)."""
        return {name: head_view(x, place) for name, place in self.tensors(index).items()}


def core_layout(lora: Layout, head: Shapes, core: Core) -> Layout:
    """The layout of cores for the layers of `lora`. ValueError for a layer that they do not fit."""
    return make_layout((), head, cores=[(f"{name} of {pair.name}", shape) for pair in lora.pairs
                                        for name, shape in core.shapes(pair).items()])


def make_cores(lora: Layout, head: Shapes, core: Core, seed: int) -> Cores:
    """Cores for the layers of `lora`, with bases drawn from `seed`. ValueError as of `core_layout`."""
    layout = core_layout(lora, head, core)
    bases, generator = torch.zeros(lora.size), torch.Generator().manual_seed(seed)
    for pair in lora.pairs:
        for view, base in zip((a_view, b_view), core.bases(pair, generator), strict=True):
            view(bases, pair).copy_(base)
    return Cores(lora, layout, bases, core)


def start(cores: Cores) -> Tensor:
    """The row (D_core,) that every peer starts from."""
    row = empty_rows(1, cores.layout.size)[0]
    for index in range(len(cores.lora.pairs)):
        for name, value in cores.values(row, index).items():
            value.fill_(cores.core.start.get(name, 0.0))
    return row


def expand(cores: Cores, x: Tensor, out: Tensor) -> None:
    """Write the LoRA factors of the rows x (P, D_core) into out (P, D_lora); the head follows them."""
    for index, pair in enumerate(cores.lora.pairs):
        bases = (a_view(cores.bases, pair), b_view(cores.bases, pair))
        for view, factor in zip((a_view, b_view), cores.core.factors(cores.values(x, index), *bases), strict=True):
            view(out, pair).copy_(factor)
    out[..., cores.lora.groups["head"]] = x[..., cores.layout.groups["head"]]


def pull_back(cores: Cores, x: Tensor, gradient: Tensor, out: Tensor) -> None:
    """The gradient of the cores: out (P, D_core) from that of the factors (P, D_lora), at x (P, D_core)."""
    for index, pair in enumerate(cores.lora.pairs):
        given = (view(of, pair) for of in (cores.bases, gradient) for view in (a_view, b_view))
        found, places = cores.core.gradients(cores.values(x, index), *given), cores.values(out, index)
        for name, place in places.items():
            place.copy_(found[name])
    out[..., cores.layout.groups["head"]] = gradient[..., cores.lora.groups["head"]]


def blocks(heads: int = 1, scaled: bool = False) -> Core:
    """A core (heads, r, r), r = R / heads, H_h between the h-th blocks of the bases; scaled: scales s (heads,) too.

    A = [A_1; ...] and B = [s_1 B_1 H_1 | ...]. With all H zero at first the model is the base model. ValueError for a
    rank that the heads do not divide, or that is larger than the layer.
    """
    def shapes(pair: Pair) -> dict[str, tuple[int, ...]]:
        if pair.rank % heads:
            raise ValueError(f"lora.rank = {pair.rank} is not a multiple of lora.heads = {heads}")
        if pair.rank > min(pair.d_in, pair.d_out):
            raise ValueError(f"lora.rank = {pair.rank} is more than layer {pair.name!r} ({pair.d_out} x {pair.d_in}) "
                             f"has orthonormal directions; allowed: up to {min(pair.d_in, pair.d_out)}")
        size = pair.rank // heads
        return {"core": (heads, size, size)} | ({"scales": (heads,)} if scaled else {})

    def factors(values: Values, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a, _join(_heads(b, heads) @ _scale(values, values["core"]))

    def gradients(values: Values, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> Values:
        inner = _heads(b, heads).mT @ _heads(grad_b, heads)
        found = {"core": _scale(values, inner)}
        return found | {"scales": (values["core"] * inner).sum((-1, -2))} if scaled else found

    core = Core(shapes, factors, gradients, frozenset({"B"}), start={"scales": 1.0})
    return core._replace(averageable=fold_scales) if scaled else core


def _scale(values: Values, blocks: Tensor) -> Tensor:
    return values["scales"][..., None, None] * blocks if "scales" in values else blocks


def _heads(b: Tensor, heads: int) -> Tensor:
    """(..., O, heads r) as (..., heads, O, r)."""
    return b.unflatten(-1, (heads, -1)).movedim(-2, -3)


def _join(b: Tensor) -> Tensor:
    """(..., heads, O, r) as (..., O, heads r)."""
    return b.movedim(-3, -2).flatten(-2)


def fold_scales(layout: Layout, x: Tensor) -> Tensor:
    """The same adapters with all scales one: a copy of the rows x (..., D), in which products are linear."""
    x = x.clone()
    # cores and scales lie in turn
    for cores, scales in zip(layout.cores[::2], layout.cores[1::2], strict=True):
        head_view(x, cores).mul_(head_view(x, scales)[..., None, None])
        head_view(x, scales).fill_(1.0)
    return x
