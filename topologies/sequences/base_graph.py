"""Base-(k+1) graphs: exact consensus in finite time for every number of peers, at most k neighbours a round.

Takezawa, Sato, Bao, Niwa, Yamada 2023, arXiv 2305.11420. Integer arithmetic throughout: a row of W(t) follows from the
digits of n and of the peer's position in O(k log n).

A *plan* answers two questions: ``length``, its number of rounds, and ``row(step, i)``, the other members of i's row as
{id: weight}. Plans work on positions 0..n-1.
"""

from __future__ import annotations

import itertools

import numpy as np

from topologies.links import Links
from topologies.mixing import Entries, complement
from topologies.registry import Entry, refuse
from topologies.topology import Topology


def factors(n: int, k: int) -> list[int] | None:
    """n as a product of numbers in 2..k+1, ascending; None if there is none.

    >>> factors(12, 3), factors(12, 1)
    ([3, 4], None)
    """
    found = []
    for q in range(k + 1, 1, -1):
        while n % q == 0:
            found.append(q)
            n //= q
    return sorted(found) if n == 1 else None


class Hyper:
    """One group average per factor of a smooth n: positions that differ in one mixed-radix digit average."""

    def __init__(self, radices: list[int]):
        self.radices = radices
        self.strides = list(itertools.accumulate([1, *radices], lambda stride, q: stride * q))
        self.length = len(radices)

    def row(self, step: int, i: int) -> dict[int, float]:
        stride, q = self.strides[step], self.radices[step]
        first = i - i // stride % q * stride
        return {j: 1.0 / q for j in range(first, first + q * stride, stride) if j != i}


class Simple:
    """The Simple Base-(k+1) graph of a number that is not smooth.

    n is cut by its digits in base k+1 into blocks; block l has ``parts[l]`` parts of (k+1)^power[l]. First each block
    averages; then block 0, 1, .. in turn hands its average to all later ones, by links between one later peer and one
    peer of each part; at last every block averages each of its parts.
    """

    def __init__(self, n: int, k: int):
        digits = self._digits(n, k + 1)
        self.k, self.parts, self.power = k, [a for a, _ in digits], [p for _, p in digits]
        self.size = [a * (k + 1) ** p for a, p in digits]
        self.begin = list(itertools.accumulate([0, *self.size]))
        self.remaining = [n - begin for begin in self.begin]
        self.whole = [Hyper(factors(size, k)) for size in self.size]
        inside = [Hyper([k + 1] * p) for p in self.power]
        # a block of single-peer parts has nothing to average inside them, and averages as a whole instead
        self.last = [w if p == 0 else c for w, c, p in zip(self.whole, inside, self.power, strict=True)]
        self.lead = self.whole[0].length
        self.length = self.lead + 1 + self.power[0]

    @staticmethod
    def _digits(n: int, base: int) -> list[tuple[int, int]]:
        """(digit, power) of the non-zero digits, highest first."""
        found, power = [], 0
        while n:
            n, digit = divmod(n, base)
            if digit:
                found.append((digit, power))
            power += 1
        return found[::-1]

    def row(self, step: int, i: int) -> dict[int, float]:
        block = next(b for b, end in enumerate(self.begin[1:]) if i < end)
        place, giver, final = i - self.begin[block], step - self.lead, len(self.size) - 1
        if giver < 0:
            return self._within(self.whole[block], step, block, place)
        if giver <= final - 1 and block > giver:
            return self._receive(giver, i - self.begin[giver + 1])
        if giver == block < final:
            return self._give(block, place)
        return self._within(self.last[block], giver - min(block + 1, final), block, place)

    def _within(self, plan: Hyper, step: int, block: int, place: int) -> dict[int, float]:
        if plan.length == 0:
            return {}
        width = self.size[block] if plan is self.whole[block] else self.size[block] // self.parts[block]
        first = self.begin[block] + place // width * width
        return {first + j: w for j, w in plan.row(step % plan.length, place % width).items()}

    def _weight(self, giver: int) -> float:
        return self.size[giver] / self.remaining[giver] / self.parts[giver]

    def _receive(self, giver: int, rank: int) -> dict[int, float]:
        """The rank-th later peer takes the rank-th last peer of each part of the giving block."""
        width, first = self.size[giver] // self.parts[giver], self.begin[giver]
        return {first + (part + 1) * width - 1 - rank: self._weight(giver) for part in range(self.parts[giver])}

    def _give(self, block: int, place: int) -> dict[int, float]:
        width, takers = self.size[block] // self.parts[block], self.remaining[block + 1]
        part, rank = place // width, width - 1 - place % width
        if rank < takers:
            return {self.begin[block + 1] + rank: self._weight(block)}
        # those whom nobody needs average in cliques of k+1: exact consensus does not depend on it, training gains
        idle = width - takers
        mine = part * idle + place % width
        first = mine - mine % (self.k + 1)
        clique = range(first, first + self.k + 1)
        if clique[-1] >= idle * self.parts[block]:
            return {}
        ids = [self.begin[block] + other // idle * width + other % idle for other in clique]
        return {j: 1.0 / (self.k + 1) for j in ids if j != self.begin[block] + place}


def simple(n: int, k: int) -> Hyper | Simple:
    radices = factors(n, k)
    return Simple(n, k) if radices is None else Hyper(radices)


class Columns:
    """Plan A for each of p groups of n / p neighbouring positions, then a Hyper average of equal positions."""

    def __init__(self, n: int, smooth: int, k: int):
        self.width, self.groups, self.across = n // smooth, simple(n // smooth, k), Hyper(factors(smooth, k))
        self.length = self.groups.length + self.across.length

    def row(self, step: int, i: int) -> dict[int, float]:
        group, place = divmod(i, self.width)
        if step < self.groups.length:
            return {group * self.width + j: w for j, w in self.groups.row(step, place).items()}
        return {g * self.width + place: w for g, w in self.across.row(step - self.groups.length, group).items()}


def shortest(n: int, k: int) -> Hyper | Simple | Columns:
    """The Base-(k+1) graph: the shorter of ``simple`` and ``Columns`` over the largest smooth divisor of n."""
    smooth = 1
    for q in range(2, k + 2):
        while n % (smooth * q) == 0:
            smooth *= q
    whole, columns = simple(n, k), Columns(n, smooth, k)
    return columns if columns.length <= whole.length else whole


class BaseGraph(Topology):
    """W(t) of step t mod length; ``period`` steps multiply to J exactly."""

    def __init__(self, num_peers: int, k: int):
        super().__init__("base_graph", num_peers)
        self.plan = shortest(num_peers, k)
        self.period = max(1, self.plan.length)

    def _others(self, t: int, i: int, alive) -> dict[int, float]:
        if self.plan.length == 0 or (alive is not None and not alive[i]):
            return {}
        row = self.plan.row(t % self.period, i)
        return {j: row[j] for j in sorted(row) if alive is None or alive[j]}

    def _entries(self, t, alive):
        rows = [self._others(t, i, alive) for i in range(self.num_peers)]
        receiver = np.repeat(np.arange(self.num_peers), [len(row) for row in rows])
        sender = np.array([j for row in rows for j in row], dtype=np.int64)
        weight = np.array([w for row in rows for w in row.values()])
        return Entries(Links(self.num_peers, sender, receiver), weight, complement(weight, receiver, self.num_peers))

    def _row(self, t, i, alive):
        others = self._others(t, i, alive)
        own = complement(np.array(list(others.values())), np.zeros(len(others), dtype=np.int64), 1)[0]
        row = {**others, i: float(own)}
        return {j: row[j] for j in sorted(row) if row[j] != 0.0}


def base_graph(num_peers: int, *, k: int = 1) -> Topology:
    """The Base-(k+1) graph of Takezawa et al. 2023 (arXiv 2305.11420): at most ``k`` neighbours a round, and exact
    consensus for every n in at most 2 log_{k+1} n + 2 rounds."""
    if k < 1:
        raise refuse("base_graph", "k (most neighbours a round) of at least 1", k)
    return BaseGraph(num_peers, min(k, max(1, num_peers - 1)))  # nobody has more neighbours than there are others


SEQUENCES: dict[str, Entry] = {
    "base_graph": Entry(base_graph, "Base-(k+1): exact consensus for every n, at most k neighbours a round (k)", {}, 12),
}
