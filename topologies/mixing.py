"""What a weight rule is, and what it makes: the sparse W of one round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from topologies.links import Links

# What a sum of a few hundred float64 can miss 1 by: a self weight below it is rounding, not a weight.
ROUNDING = 1e-14


@dataclass(frozen=True, eq=False)
class Entries:
    """A sparse W: the weights of ``links`` (arcs,) and the diagonal (n,)."""

    links: Links
    weight: np.ndarray
    diagonal: np.ndarray

    @classmethod
    def from_dense(cls, W: np.ndarray, directed: bool = True) -> Entries:
        receiver, sender = np.nonzero(W * (1 - np.eye(len(W))))
        return cls(Links(len(W), sender, receiver, directed), W[receiver, sender], np.diag(W).copy())

    def dense(self) -> np.ndarray:
        W = np.zeros((self.links.num_peers, self.links.num_peers))
        W[self.links.receiver, self.links.sender] = self.weight
        np.fill_diagonal(W, self.diagonal)
        return W

    def apply(self, x: np.ndarray) -> np.ndarray:
        """W x for x of shape (n,) or (n, d), without forming W."""
        mixed = self.diagonal.reshape((-1,) + (1,) * (x.ndim - 1)) * x
        np.add.at(mixed, self.links.receiver, self.weight.reshape((-1,) + (1,) * (x.ndim - 1)) * x[self.links.sender])
        return mixed

    def apply_transposed(self, x: np.ndarray) -> np.ndarray:
        """W^T x for x of shape (n,) or (n, d), without forming W."""
        mixed = self.diagonal.reshape((-1,) + (1,) * (x.ndim - 1)) * x
        np.add.at(mixed, self.links.sender, self.weight.reshape((-1,) + (1,) * (x.ndim - 1)) * x[self.links.receiver])
        return mixed

    def row(self, i: int) -> dict[int, float]:
        span = slice(self.links.start[i], self.links.start[i + 1])
        return as_row(i, self.links.sender[span], self.weight[span], self.diagonal[i])

    @cached_property
    def _by_sender(self) -> tuple[np.ndarray, np.ndarray]:
        """The non-zero arcs ordered by (sender, receiver): receivers, and where each sender's begin."""
        used = self.weight != 0.0
        sender, receiver = self.links.sender[used], self.links.receiver[used]
        order = np.argsort(sender, kind="stable")
        return receiver[order], np.searchsorted(sender[order], np.arange(self.links.num_peers + 1))

    def column(self, j: int) -> np.ndarray:
        """Ascending ids of the other peers that give weight to j's message."""
        receiver, start = self._by_sender
        return receiver[start[j] : start[j + 1]]


def as_row(i: int, senders: np.ndarray, weight: np.ndarray, own: float) -> dict[int, float]:
    """Ascending ids to weights, itself included, zeros left out."""
    row = {**dict(zip(senders.tolist(), weight.tolist(), strict=True)), int(i): float(own)}
    return {j: row[j] for j in sorted(row) if row[j] != 0.0}


def as_numbers(rule: str, param: str, value) -> np.ndarray:
    """A parameter of a rule as float64, or a ValueError that names it."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"weights={rule!r} needs {param} to be numbers in rows of equal length, got {value!r}") from None


def complement(weight: np.ndarray, receiver: np.ndarray, num_peers: int) -> np.ndarray:
    """What is missing to a row sum of one, (n,). Adds in the order of the links: one row alone has the same bits."""
    own = 1.0 - np.bincount(receiver, weights=weight, minlength=num_peers)
    return np.where(np.abs(own) < ROUNDING, 0.0, own)


@dataclass(frozen=True, eq=False)
class Rule:
    """A way to weigh links.

    Local: ``link(i, j, d_i, d_j)`` gives the weights of arcs j -> i from ids and degrees (in-degree of i, out-degree
    of j), and the self weight is what is missing to one, or ``own(d)`` where given. Global: ``solve(links)``.
    ``sums``: which sums of W are one ("doubly", "row", "column"). ``directed``: takes directed graphs.
    ``check(num_peers)`` refuses parameters of the wrong size.
    """

    name: str
    sums: str = "doubly"
    symmetric: bool = True
    directed: bool = False
    nonnegative: bool = True
    link: Callable | None = None
    own: Callable | None = None
    solve: Callable[[Links], Entries] | None = None
    check: Callable[[int], None] | None = None

    def __call__(self, links: Links) -> Entries:
        self.check_links(links)
        if self.solve is not None:
            return self.solve(links)
        i, j = links.receiver, links.sender
        weight = self.link(i, j, links.in_degree[i], links.out_degree[j])
        return Entries(links, weight, self._diagonal(weight, i, links.out_degree))

    def check_links(self, links: Links) -> None:
        if links.directed and not self.directed:
            fits = "uniform (row sums), push_sum (column sums) or sinkhorn (both)"
            raise ValueError(f"weights={self.name!r} needs an undirected graph; for a directed one take {fits}")

    def _diagonal(self, weight, receiver, out_degree):
        return complement(weight, receiver, len(out_degree)) if self.own is None else self.own(out_degree)

    def local_row(self, i: int, senders: np.ndarray, out_degrees: np.ndarray) -> dict[int, float]:
        """Row i of an undirected graph from the neighbours' degrees alone, (len(senders),)."""
        degree = np.full(len(senders), len(senders))
        weight = self.link(np.full(len(senders), i), senders, degree, out_degrees)
        own = self._diagonal(weight, np.zeros(len(senders), dtype=np.int64), np.array([len(senders)]))[0]
        return as_row(i, senders, weight, own)


def halve(entries: Entries) -> Entries:
    """(I + W) / 2."""
    return Entries(entries.links, entries.weight / 2, (1.0 + entries.diagonal) / 2)
