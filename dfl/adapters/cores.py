"""Adapters that train a small core between frozen bases: B R A (Fed-SB) and sum_h s_h B_h H_h A_h (RAVAN).

The model sees ordinary LoRA factors, A = [A_1; ...] and B = [s_1 B_1 H_1 | ...]; a peer's row holds the cores alone. `expand` makes
the factors from the cores, `pull_back` turns the gradient of B into that of the cores. Bases are orthonormal, the same at
every peer: drawn from the seed here, or found by `dfl.training.starts`.
Ponkshe et al. 2025, arXiv 2502.15436; Raje et al. 2025, arXiv 2506.05568.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.layout import HeadTensor, Layout, a_view, b_view, empty_rows, head_view, make_layout

_SCALES = "scales of "


class Cores(NamedTuple):
    """bases (D_lora): orthonormal rows of A and columns of B in the LoRA layout; `heads` blocks of rank // heads in each."""

    lora: Layout
    layout: Layout
    bases: Tensor
    heads: int
    scaled: bool  # every head has a trained scale

    def tensors(self, pair_index: int) -> tuple[HeadTensor, HeadTensor | None]:
        """Where the cores (heads, r, r) and the scales (heads,) of a layer lie."""
        step = 2 if self.scaled else 1
        found = self.layout.cores[step * pair_index:step * pair_index + step]
        return found[0], (found[1] if self.scaled else None)


def core_layout(lora: Layout, head, *, heads: int, scaled: bool) -> Layout:
    """The layout of cores for the layers of `lora`. ValueError for a rank that the heads do not divide, or a layer cannot hold."""
    shapes = []
    for pair in lora.pairs:
        if pair.rank % heads:
            raise ValueError(f"lora.rank = {pair.rank} is not a multiple of lora.heads = {heads}")
        if pair.rank > min(pair.d_in, pair.d_out):
            raise ValueError(f"lora.rank = {pair.rank} is more than layer {pair.name!r} ({pair.d_out} x {pair.d_in}) has orthonormal "
                             f"directions; allowed: up to {min(pair.d_in, pair.d_out)}")
        size = pair.rank // heads
        shapes.append((pair.name, (heads, size, size)))
        if scaled:
            shapes.append((_SCALES + pair.name, (heads,)))
    return make_layout((), head, cores=shapes)


def make_cores(lora: Layout, head, *, heads: int, scaled: bool, seed: int) -> Cores:
    """Cores for the layers of `lora`, with bases drawn from `seed`. ValueError as of `core_layout`."""
    layout = core_layout(lora, head, heads=heads, scaled=scaled)
    bases, generator = torch.zeros(lora.size), torch.Generator().manual_seed(seed)
    for pair in lora.pairs:
        a_view(bases, pair).copy_(_orthonormal(pair.d_in, pair.rank, generator).mT)
        b_view(bases, pair).copy_(_orthonormal(pair.d_out, pair.rank, generator))
    return Cores(lora, layout, bases, heads, scaled)


def _orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """(size, rank) with orthonormal columns; signs fixed, so that every machine gets the same."""
    q, r = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def start(cores: Cores) -> Tensor:
    """The row (D_core,) that every peer starts from: cores zero, scales one."""
    row = empty_rows(1, cores.layout.size)[0]
    for index in range(len(cores.lora.pairs)):
        _, scales = cores.tensors(index)
        if scales is not None:
            head_view(row, scales).fill_(1.0)
    return row


def _values(cores: Cores, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Cores (..., heads, r, r) and scales (..., heads, 1, 1) of a layer."""
    places, scales = cores.tensors(index)
    h = head_view(x, places)
    return h, (head_view(x, scales)[..., None, None] if scales is not None else h.new_ones(h.shape[:-2])[..., None, None])


def expand(cores: Cores, x: Tensor, out: Tensor) -> None:
    """Write the LoRA factors of the rows x (P, D_core) into out (P, D_lora); the head follows them."""
    for index, pair in enumerate(cores.lora.pairs):
        h, s = _values(cores, x, index)
        a_view(out, pair).copy_(a_view(cores.bases, pair))
        b_view(out, pair).copy_(_join(_heads(b_view(cores.bases, pair), cores.heads) @ (s * h)))
    out[..., cores.lora.groups["head"]] = x[..., cores.layout.groups["head"]]


def pull_back(cores: Cores, x: Tensor, gradient: Tensor, out: Tensor) -> None:
    """The gradient of the cores: out (P, D_core) from that of the factors (P, D_lora), at x (P, D_core)."""
    for index, pair in enumerate(cores.lora.pairs):
        h, s = _values(cores, x, index)
        inner = _heads(b_view(cores.bases, pair), cores.heads).mT @ _heads(b_view(gradient, pair), cores.heads)
        places, scales = cores.tensors(index)
        head_view(out, places).copy_(s * inner)
        if scales is not None:
            head_view(out, scales).copy_((h * inner).sum((-1, -2)))
    out[..., cores.layout.groups["head"]] = gradient[..., cores.lora.groups["head"]]


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
