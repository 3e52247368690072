"""Mixtures of cyclic shifts: i receives from i - offset (mod n). Doubly stochastic whatever the offsets, and so among survivors."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np

from topologies.links import Links
from topologies.mixing import Entries
from topologies.topology import Topology


class Circulant:
    """A directed static graph: i sends to i + offset (mod n) for every offset."""

    directed = True

    def __init__(self, num_peers: int, offsets):
        self.num_peers = num_peers
        self.offsets = sorted({int(offset) % num_peers for offset in offsets} - {0})

    def senders(self, i: int) -> np.ndarray:
        return np.sort((i - np.array(self.offsets, dtype=np.int64)) % self.num_peers)

    @cached_property
    def links(self) -> Links:
        ids, offsets = np.arange(self.num_peers), np.array(self.offsets, dtype=np.int64)
        receivers = (ids[:, None] + offsets).ravel() % self.num_peers
        return Links.from_arcs(self.num_peers, np.repeat(ids, len(offsets)), receivers, directed=True)


class Shifts(Topology):
    """W(t) = own I + sum_k weight_k P^offset_k, with P the cyclic shift.

    A peer that is away is skipped: its receiver takes the message of the next peer behind it on the same cycle. Each shift stays a
    permutation of those who are there, so W stays doubly stochastic.
    """

    symmetric = False

    @abstractmethod
    def shifts(self, t: int) -> list[tuple[int, float]]:
        """(offset, weight) of round t; the weights sum to at most one."""

    def eigenvalues(self, t: int) -> np.ndarray:
        """(n,) eigenvalues of W(t) with everybody there, in closed form."""
        first = np.zeros(self.num_peers)
        np.add.at(first, [offset % self.num_peers for offset, _ in self.shifts(t)], [w for _, w in self.shifts(t)])
        first[0] += 1.0 - sum(w for _, w in self.shifts(t))
        return np.fft.fft(first)

    def _senders(self, offset: int, alive) -> np.ndarray:
        """(n,) whom each peer receives from through one shift; itself if away."""
        ids = np.arange(self.num_peers)
        senders = (ids - offset) % self.num_peers
        if alive is None:
            return senders
        senders = np.where(alive, senders, ids)
        while (gone := alive & ~alive[senders]).any():
            senders[gone] = (senders[gone] - offset) % self.num_peers
        return senders

    def _entries(self, t, alive):
        n, shifts, ids = self.num_peers, self.shifts(t), np.arange(self.num_peers)
        diagonal, codes, weights = np.full(n, 1.0 - sum(w for _, w in shifts)), [ids[:0]], [np.zeros(0)]
        for offset, weight in shifts:
            senders = self._senders(offset, alive)
            diagonal[senders == ids] += weight
            codes.append((ids * n + senders)[senders != ids])
            weights.append(np.full(len(codes[-1]), weight))
        code, inverse = np.unique(np.concatenate(codes), return_inverse=True)
        weight = np.bincount(inverse, weights=np.concatenate(weights), minlength=len(code))
        if alive is not None:
            diagonal[~alive] = 1.0
        return Entries(Links(n, code % n, code // n, directed=True), weight, diagonal)

    def _row(self, t, i, alive):
        shifts = self.shifts(t)
        row = {i: 1.0 - sum(w for _, w in shifts)}
        for offset, weight in shifts:
            j = self._next(i, -offset, alive)
            row[j] = row.get(j, 0.0) + weight
        return {j: row[j] for j in sorted(row) if row[j] != 0.0}

    def _column(self, t, j, alive):
        return sorted({self._next(j, offset, alive) for offset, _ in self.shifts(t)} - {j})

    def _next(self, i: int, offset: int, alive) -> int:
        j = (i + offset) % self.num_peers
        while alive is not None and not alive[j]:
            j = (j + offset) % self.num_peers
        return j


class StaticShifts(Shifts):
    """The same shifts in every round."""

    period = 1

    def __init__(self, name: str, num_peers: int, shifts: list[tuple[int, float]]):
        super().__init__(name, num_peers)
        self._shifts = shifts

    def shifts(self, t):
        return self._shifts


def equal_weights(name: str, graph: Circulant) -> StaticShifts:
    """1 / (degree + 1) to each neighbour and oneself: Metropolis weights, for all degrees are equal."""
    return StaticShifts(name, graph.num_peers, [(offset, 1.0 / (1 + len(graph.offsets))) for offset in graph.offsets])
