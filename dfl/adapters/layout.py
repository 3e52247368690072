"""The layout of LoRA factors (and a trained head) in a flat vector: one peer is one row of X_PD.

A row holds all A, then all B, then what some adapters train beside or instead (magnitudes, cores), then the head. Shape
suffixes: P peers, D row length, L layers of one shape, R rank, I and O layer input and output.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.batched import uploaded

GROUPS = ("A", "B", "M", "core", "head")  # M: magnitudes of DoRA; core: what is trained between frozen bases
# rows start at multiples of 64 bytes: CPU kernels may round differently on other alignments, and a peer's row must not
# depend on how many peers are hosted beside it
_ALIGN = 16


class Pair(NamedTuple):
    """One adapted layer: ΔW = scaling · B A with A (rank, d_in) at offset `a`, B (d_out, rank) at offset `b`."""

    name: str
    rank: int
    d_in: int
    d_out: int
    scaling: float
    a: int
    b: int


class HeadTensor(NamedTuple):
    """A tensor of the head, a magnitude or a core: its shape, and where it lies in a row."""

    name: str
    shape: tuple[int, ...]
    offset: int


class Layout(NamedTuple):
    """Where everything lies in a row of length `size`; `groups` maps A, B, M, core, head to their columns."""

    pairs: tuple[Pair, ...]
    head: tuple[HeadTensor, ...]
    groups: dict[str, slice]
    size: int
    magnitudes: tuple[HeadTensor, ...] = ()
    cores: tuple[HeadTensor, ...] = ()

    def has(self, group: str) -> bool:
        cut = self.groups.get(group)
        return cut is not None and cut.stop > cut.start

    def present(self, groups) -> list[str]:
        """Those of `groups` that the row has, in row order."""
        return [group for group in GROUPS if group in groups and self.has(group)]

    def columns(self, groups) -> list[slice]:
        """The columns of `groups` as few slices as possible, in row order."""
        merged: list[slice] = []
        for cut in (self.groups[group] for group in self.present(groups)):
            if merged and merged[-1].stop == cut.start:
                merged[-1] = slice(merged[-1].start, cut.stop)
            else:
                merged.append(cut)
        return merged

    def length(self, groups) -> int:
        return sum(cut.stop - cut.start for cut in self.columns(groups))

    def like(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The same layers as those of another layout, by name."""
        places = {pair.name: pair for pair in self.pairs}
        return [places[pair.name] for pair in pairs]

    def shapes(self) -> list[list[Pair]]:
        """The pairs in lists of equal (rank, d_in, d_out): the kernel handles each list as one batch."""
        table: dict[tuple, list[Pair]] = {}
        for pair in self.pairs:
            table.setdefault((pair.rank, pair.d_in, pair.d_out), []).append(pair)
        return list(table.values())


Shapes = Sequence[tuple[str, Sequence[int]]]


def make_layout(pairs: Sequence[tuple[str, int, int, int, float]], head: Shapes = (), magnitudes: Shapes = (),
                cores: Shapes = ()) -> Layout:
    """The layout of layers (name, rank, d_in, d_out, scaling), and of tensors (name, shape) of the other groups."""
    num_a = sum(r * i for _, r, i, _, _ in pairs)
    num_b = sum(o * r for _, r, _, o, _ in pairs)
    a, b, placed = 0, num_a, []
    for name, rank, d_in, d_out, scaling in pairs:
        placed.append(Pair(name, rank, d_in, d_out, scaling, a, b))
        a, b = a + rank * d_in, b + d_out * rank
    groups = {"A": slice(0, num_a), "B": slice(num_a, num_a + num_b)}
    offset, others = num_a + num_b, {}
    for group, shapes in (("M", magnitudes), ("core", cores), ("head", head)):
        start, tensors = offset, []
        for name, shape in shapes:
            tensors.append(HeadTensor(name, tuple(shape), offset))
            offset += math.prod(shape)
        groups[group], others[group] = slice(start, offset), tuple(tensors)
    return Layout(tuple(placed), others["head"], groups, offset, others["M"], others["core"])


def scalings(pairs: Sequence[Pair], like: Tensor) -> Tensor:
    """(L,) float64: what turns B A into the change of the weight."""
    return uploaded([pair.scaling for pair in pairs], like, torch.float64)


def empty_rows(num_rows: int, size: int, *, dtype=torch.float32, device="cpu", before: int = 0) -> Tensor:
    """Zeroed rows (P, D); every row begins on a 64-byte boundary. before: numbers that are left free in front of each, rounded up to
    such a boundary."""
    padded, before = (-(-length // _ALIGN) * _ALIGN for length in (size, before))
    return torch.zeros(num_rows, before + padded, dtype=dtype, device=device)[:, before:before + size]


def a_view(x: Tensor, pair: Pair) -> Tensor:
    """A of one layer: (..., R, I) for x (..., D); a view."""
    return x[..., pair.a:pair.a + pair.rank * pair.d_in].unflatten(-1, (pair.rank, pair.d_in))


def b_view(x: Tensor, pair: Pair) -> Tensor:
    """B of one layer: (..., O, R) for x (..., D); a view."""
    return x[..., pair.b:pair.b + pair.d_out * pair.rank].unflatten(-1, (pair.d_out, pair.rank))


def head_view(x: Tensor, tensor: HeadTensor) -> Tensor:
    """One tensor of the head, a magnitude or a core: (..., *shape) for x (..., D); a view."""
    return x[..., tensor.offset:tensor.offset + math.prod(tensor.shape)].unflatten(-1, tensor.shape)


def stack_a(x: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """A of layers of one shape as a batch: (..., L, R, I)."""
    return torch.stack([a_view(x, p) for p in pairs], -3)


def stack_b(x: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """B of layers of one shape as a batch: (..., L, O, R)."""
    return torch.stack([b_view(x, p) for p in pairs], -3)


def write_pairs(x: Tensor, pairs: Sequence[Pair], a: Tensor, b: Tensor) -> None:
    """Put a (..., L, R, I) and b (..., L, O, R) back into the row(s) x (..., D)."""
    for index, pair in enumerate(pairs):
        a_view(x, pair).copy_(a.select(-3, index))
        b_view(x, pair).copy_(b.select(-3, index))


def join(layouts: Sequence[Layout], slots: Sequence[int] | None = None) -> Layout:
    """The layout of the same layers with summed ranks, named and scaled as in the first of `layouts`.

    slots: how many of each part's slots a layer gets; None: all that the part has there.
    """
    pairs = zip(*(layout.pairs for layout in layouts), strict=True)
    return make_layout([(same[0].name, sum(slots or [p.rank for p in same]), same[0].d_in, same[0].d_out, same[0].scaling)
                        for same in pairs])


def join_rows(joined: Layout, layouts: Sequence[Layout], rows: Sequence[Tensor], num_rows: int,
              slots: Sequence[int] | None = None) -> Tensor:
    """Rows (P, D) in `joined = join(layouts, slots)`: each part's pairs behind those of the part before it.

    rows: of each part (P, D_k), or one (D_k,) for all; type and device are those of the last. What a part lacks is zero.
    """
    out = empty_rows(num_rows, joined.size, dtype=rows[-1].dtype, device=rows[-1].device)
    filled = [0] * len(joined.pairs)
    for part, (layout, x) in enumerate(zip(layouts, rows, strict=True)):
        for index, (pair, mine) in enumerate(zip(joined.pairs, layout.pairs, strict=True)):
            room = mine.rank if slots is None else slots[part]
            held, start = min(room, mine.rank), filled[index]
            a_view(out, pair)[:, start:start + held] = a_view(x, mine)[..., :held, :]
            b_view(out, pair)[..., start:start + held] = b_view(x, mine)[..., :held]
            filled[index] += room
    return out


def pack(factors: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Layout, Tensor]:
    """Rows X_ND from `{layer: (A (N, R, I), B (N, O, R))}`, with their layout. Type and device of the factors are kept."""
    if not factors:
        raise ValueError("factors = {} holds no layer; give {name: (A, B)}")
    first = next(iter(factors.values()))[0]
    specs = []
    for name, (a, b) in factors.items():
        good = a.dim() == b.dim() == 3 and len(a) == len(b) == len(first) and a.shape[1] == b.shape[2]
        if not good:
            raise ValueError(f"factors[{name!r}] has shapes A {tuple(a.shape)}, B {tuple(b.shape)}; "
                             "allowed: A (N, R, I), B (N, O, R) with equal N and R")
        specs.append((name, a.shape[1], a.shape[2], b.shape[1], 1.0))
    layout = make_layout(specs)
    x = empty_rows(len(first), layout.size, dtype=first.dtype, device=first.device)
    for pair in layout.pairs:
        a, b = factors[pair.name]
        a_view(x, pair).copy_(a)
        b_view(x, pair).copy_(b)
    return layout, x


def unpack(x: Tensor, layout: Layout) -> dict[str, tuple[Tensor, Tensor]]:
    """`{layer: (A, B)}` as views into x: (N, R, I) and (N, O, R) for x (N, D)."""
    return {p.name: (a_view(x, p), b_view(x, p)) for p in layout.pairs}
