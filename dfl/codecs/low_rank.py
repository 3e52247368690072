"""The leading directions of each matrix."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfl.adapters.batched import eigh
from dfl.adapters.layout import Layout, make_layout
from dfl.codecs.memory import Compressor, remembering
from dfl.plugins import check_count
from dfl.slots import Codec

FACTORS = ("A", "B")


class Matrices(NamedTuple):
    """Where the matrices of one shape lie in a part: rows, columns, and the place of each."""

    rows: int
    columns: int
    offsets: tuple[int, ...]


def low_rank(*, components: int = 1, memory: str = "differences", gamma: float | None = None, layout: Layout | None = None,
             topology: Any = None) -> Codec:
    """The best rank-k part of each matrix of the difference: of every A, B, core and matrix of the head (after PowerGossip).

    C(D) = U U^T D, U (m, k) the leading left directions of D (m, n), m <= n; omega = k / m at the least. 4 k (m + n) bytes a
    matrix; what this would not make smaller, and all that is no matrix, travels as it is. memory: differences, or feedback for
    graphs that change and for lossy channels; gamma: the step of a mix, found for the topology if not given
    (`dfl/codecs/memory.py`). Keeps the network mean of a rule that averages. PowerGossip (Vogels, Karimireddy, Jaggi 2020,
    arXiv 2008.01425) takes the differences along every edge, by power iterations that need two exchanges; here a message is for
    all neighbours at once, and the difference is that to their copies (CHOCO). rank: k.
    """
    check_count("codec.components", components)
    rank = components
    layout = make_layout(()) if layout is None else layout
    places = {group: matrices(layout, group) for group in layout.groups}

    def parts_of(name: str, numel: int) -> tuple[list[Matrices], Tensor]:
        """What of a part is sent by directions, and the places of the numbers that are not."""
        known = name in places and numel == layout.length({name})
        small = [m for m in places[name] if rank * (m.rows + m.columns) < m.rows * m.columns] if known else []
        rest = torch.ones(numel, dtype=torch.bool)
        for m in small:
            rest[_inside(m)] = False
        return small, rest.nonzero()[:, 0]

    def pack(name: str, values: Tensor, seed: int | None) -> Tensor:
        small, rest = parts_of(name, values.numel())
        found = [values[rest.to(values.device)].float()]
        for m in small:
            stack = values[_inside(m).to(values.device)].view(len(m.offsets), m.rows, m.columns)
            left, right = leading(stack, rank)
            found += [left.float().flatten(), right.float().flatten()]
        return torch.cat(found).view(torch.uint8)

    def unpack(name: str, data: Tensor, numel: int) -> Tensor:
        small, rest = parts_of(name, numel)
        sent = data.view(torch.float32)
        lengths = [len(rest)] + [len(m.offsets) * rank * size for m in small for size in (m.rows, m.columns)]
        if sum(lengths) != len(sent):
            raise ValueError(f"part {name!r} has {len(sent)} numbers, expected {sum(lengths)}")
        first, *factors = sent.split(lengths)
        out = torch.zeros(numel, device=data.device)
        out[rest.to(data.device)] = first
        for m, left, right in zip(small, factors[::2], factors[1::2], strict=True):
            product = left.view(-1, m.rows, rank) @ right.view(-1, rank, m.columns)
            out[_inside(m).to(data.device)] = product.flatten()
        return out

    shapes = [min(1.0, rank / min(m.rows, m.columns)) for group in places.values() for m in group]
    codec = remembering(Compressor(pack, unpack, min(shapes, default=1.0)), memory, ("differences", "feedback"), gamma, topology)
    return codec._replace(counts=lambda name, numel, num_sent: (min(numel, num_sent // 4), 0))


def matrices(layout: Layout, group: str) -> list[Matrices]:
    """The matrices of a group of the layout, by shape."""
    start = layout.groups[group].start
    found: dict[Any, Any] = {}
    if group in FACTORS:
        for pair in layout.pairs:
            shape = (pair.rank, pair.d_in) if group == "A" else (pair.d_out, pair.rank)
            found.setdefault(shape, []).append((pair.a if group == "A" else pair.b) - start)
    for tensor in {"core": layout.cores, "head": layout.head}.get(group, ()):
        if len(tensor.shape) >= 2:
            step = math.prod(tensor.shape[-2:])
            found.setdefault(tuple(tensor.shape[-2:]), []).extend(
                tensor.offset - start + k * step for k in range(math.prod(tensor.shape[:-2])))
    return [Matrices(rows, columns, tuple(offsets)) for (rows, columns), offsets in found.items()]


def leading(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (L, m, k) and (L, k, n) of the best rank-k parts of matrices (L, m, n), by the smaller Gram matrix in float64."""
    stack = stack.double()
    if stack.shape[1] > stack.shape[2]:
        right, left = leading(stack.mT, rank)
        return left.mT, right.mT
    directions = eigh(stack @ stack.mT)[1][..., -rank:]
    return directions, directions.mT @ stack


def _inside(m: Matrices) -> Tensor:
    """The places in a part of all numbers of these matrices, one matrix after the other."""
    return (torch.tensor(m.offsets)[:, None] + torch.arange(m.rows * m.columns)).flatten()
