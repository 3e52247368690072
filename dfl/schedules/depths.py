"""How many blocks of a model a peer's backward pass gets through before a round's deadline.

The backward pass runs from the last block to the first, so that who is stopped has the gradients of the last D blocks.
A function of (seed, peer, t) alone, which every process computes for any peer.
"""

import math
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import by_peer, check_choice, check_count, check_number, check_positive
from dfl.seeds import derive

SPEEDS = ("uniform", "poisson", "fixed")
LATE = ("blocks", "drop")


def block_names(layout: Layout) -> list[str]:
    """The blocks of the adapted layers, first to last: what stands up to the first number in a layer's name, or all of it."""
    names = {_block(pair.name): None for pair in layout.pairs}
    numbered = {name: int(found[-1]) for name in names if (found := re.findall(r"\d+", name))}
    return sorted(names, key=lambda name: numbered.get(name, -1)) if len(numbered) == len(names) else list(names)


def _block(layer: str) -> str:
    found = re.match(r"(?:[^.]*\.)*?\d+(?=\.|$)", layer)
    return found.group() if found else layer


class Depths:
    """D of every peer and round, how likely each block is reached, and which numbers of a row lie in the blocks reached.

    Blocks are counted l = 1 (first) .. L (last); a peer reaches those above L - D. A trained head belongs to the last.
    speed: uniform, on 1 .. L; poisson, min(L, Poisson(deadline / seconds)); fixed, floor(deadline / seconds); or a file
    of depths, comma-separated, a row a round and a column a peer, which begins anew at its end. seconds: of one block
    backwards, one number or one for each peer. share: of the peers, drawn once, that are slow at all; the others always
    reach every block. late: drop counts who misses a block as who reaches none.
    """

    def __init__(self, layout: Layout, *, speed: str, deadline: float | None, seconds: float | Sequence[float], share: float,
                 late: str, seed: int, peers: int | None):
        self.layout, self.seed, self.late, self.deadline, self.peers = layout, seed, late, deadline, peers
        self.names = block_names(layout)
        self.num_blocks = max(1, len(self.names))
        self.trace = _trace(speed, self.num_blocks if self.names else None, peers)
        self.speed = speed if self.trace is None else "trace"
        check_choice("schedule.late", late, LATE)
        check_number("schedule.share", share, most=1.0)
        check_count("schedule.seed", seed, least=0)
        if deadline is not None:
            check_positive("schedule.deadline", deadline)
        elif self.speed in ("poisson", "fixed"):
            raise ValueError(f"schedule.deadline is missing: schedule.speed = {speed!r} needs it, in seconds; allowed: a number "
                             "above 0")
        self.seconds, self.share = by_peer("schedule.seconds", seconds, peers, check_positive), share

    @cached_property
    def slow(self) -> frozenset[int] | None:
        """The peers that are slow at all; None: all."""
        if self.share == 1 or self.peers is None:
            return None
        order = np.random.Generator(np.random.Philox(derive(self.seed, "stragglers"))).permutation(self.peers)
        return frozenset(int(peer) for peer in order[:round(self.share * self.peers)])

    def depth(self, t: int, peer: int) -> int:
        """D of a peer in round t, from 0 to L."""
        found = self._drawn(t, peer)
        return found if found == self.num_blocks or self.late == "blocks" else 0

    def _drawn(self, t: int, peer: int) -> int:
        last = self.num_blocks
        if self.slow is not None and peer not in self.slow:
            return last
        if self.trace is not None:
            return min(last, int(self.trace[t % len(self.trace), peer]))
        if self.speed == "fixed":
            return min(last, int(self._blocks_in_time(peer)))
        draw = np.random.Generator(np.random.Philox(derive(self.seed, "depth", peer, t)))
        return int(draw.integers(1, last + 1)) if self.speed == "uniform" else min(last, int(draw.poisson(self._blocks_in_time(peer))))

    def _blocks_in_time(self, peer: int) -> float:
        assert self.deadline is not None
        return self.deadline / self.seconds(peer)

    def reach(self, peer: int) -> list[float]:
        """q_l, how likely a peer reaches block l = 1 .. L: rising in l."""
        last = self.num_blocks
        if self.slow is not None and peer not in self.slow:
            return [1.0] * last
        found = [self._at_least(last + 1 - block, peer) for block in range(1, last + 1)]
        return found if self.late == "blocks" else [found[0]] * last

    def _at_least(self, num: int, peer: int) -> float:
        """P(D >= num), before anybody is dropped."""
        if self.trace is not None:
            return float((self.trace[:, peer] >= num).mean())
        if self.speed == "uniform":
            return (self.num_blocks + 1 - num) / self.num_blocks
        rate = self._blocks_in_time(peer)
        return float(rate >= num) if self.speed == "fixed" else _poisson_tail(rate, num)

    @cached_property
    def block_of(self) -> Tensor:
        """The block l of every number of a row (D,), int64: L of what belongs to no layer."""
        found = torch.full((self.layout.size,), self.num_blocks, dtype=torch.int64)
        place = {name: index for index, name in enumerate(self.names, 1)}
        for pair in self.layout.pairs:
            found[pair.a:pair.a + pair.rank * pair.d_in] = place[_block(pair.name)]
            found[pair.b:pair.b + pair.d_out * pair.rank] = place[_block(pair.name)]
        for tensor in (*self.layout.magnitudes, *self.layout.cores):
            found[tensor.offset:tensor.offset + math.prod(tensor.shape)] = place.get(_block(tensor.name), self.num_blocks)
        return found

    def reached(self, depth: int) -> Tensor:
        """Which numbers of a row lie in the last `depth` blocks, (D,) bool."""
        return self.block_of > self.num_blocks - depth


def _poisson_tail(rate: float, num: int) -> float:
    """P(X >= num) of a Poisson variable: the regularised lower incomplete gamma function at (num, rate)."""
    return max(0.0, 1.0 - sum(math.exp(k * math.log(rate) - rate - math.lgamma(k + 1)) for k in range(num)))


def _trace(speed: Any, num_blocks: int | None, peers: int | None) -> np.ndarray | None:
    """Depths (rounds, N) of a file; None for a name. ValueError for what is neither."""
    if speed in SPEEDS:
        return None
    allowed = f"allowed: {', '.join(SPEEDS)}, or a file of depths, a row a round and a column a peer"
    try:
        table = np.loadtxt(speed, delimiter=",", ndmin=2)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"schedule.speed = {speed!r} is not allowed: {error}; {allowed}") from None
    if not len(table) or (peers is not None and table.shape[1] != peers):
        raise ValueError(f"schedule.speed = {speed!r} has the shape {table.shape}; allowed: a row a round and a column for each of "
                         f"{peers} peers")
    whole = np.isfinite(table) & (table >= 0) & (table == np.floor(table)) & (table <= (num_blocks or np.inf))
    if not whole.all():
        raise ValueError(f"schedule.speed = {speed!r} has the depth {table[~whole][0]:g}; allowed: whole numbers from 0"
                         + ("" if num_blocks is None else f" to {num_blocks} blocks"))
    return table.astype(np.int64)
