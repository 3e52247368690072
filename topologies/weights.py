"""Weight rules: from the links of a round to the mixing matrix W, receiver-row (W[i, j] multiplies what i gets from j).

A *local* rule gives the weight of one link from what its two ends know (ids and degrees), so a peer computes its
own row alone. A *global* rule needs the whole graph. ``RULES`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from topologies.links import Links

# What a sum of a few hundred float64 can miss 1 by: a self weight below it is rounding, not a weight.
ROUNDING = 1e-14


@dataclass(frozen=True)
class Entries:
    """A sparse W: the weights of ``links`` (arcs,) and the diagonal (n,)."""

    links: Links
    weight: np.ndarray
    diagonal: np.ndarray

    def dense(self) -> np.ndarray:
        W = np.zeros((self.links.num_peers, self.links.num_peers))
        W[self.links.receiver, self.links.sender] = self.weight
        np.fill_diagonal(W, self.diagonal)
        return W

    def row(self, i: int) -> dict[int, float]:
        span = slice(self.links.start[i], self.links.start[i + 1])
        return as_row(i, self.links.sender[span], self.weight[span], self.diagonal[i])


def as_row(i: int, senders: np.ndarray, weight: np.ndarray, own: float) -> dict[int, float]:
    """Ascending ids to weights, itself included, zeros left out."""
    row = {**dict(zip(senders.tolist(), weight.tolist(), strict=True)), int(i): float(own)}
    return {j: row[j] for j in sorted(row) if row[j] != 0.0}


def complement(weight: np.ndarray, receiver: np.ndarray, num_peers: int) -> np.ndarray:
    """What is missing to a row sum of one, (n,). Adds in the order of the links, as ``local_row`` does: same bits."""
    own = 1.0 - np.bincount(receiver, weights=weight, minlength=num_peers)
    return np.where(np.abs(own) < ROUNDING, 0.0, own)


@dataclass(frozen=True)
class Rule:
    """``link(receiver, sender, d_receiver, d_sender) -> weights`` for a local rule, ``solve(links)`` for a global one."""

    name: str
    about: str
    link: Callable | None = None
    solve: Callable[[Links], Entries] | None = None

    def __call__(self, links: Links) -> Entries:
        if self.solve is not None:
            return self.solve(links)
        weight = self.link(links.receiver, links.sender, links.in_degree[links.receiver], links.out_degree[links.sender])
        return Entries(links, weight, complement(weight, links.receiver, links.num_peers))

    def local_row(self, i: int, senders: np.ndarray, degree: int, sender_degrees: np.ndarray) -> dict[int, float]:
        weight = self.link(np.full(len(senders), i), senders, np.full(len(senders), degree), sender_degrees)
        own = complement(weight, np.zeros(len(senders), dtype=np.int64), 1)[0]
        return as_row(i, senders, weight, own)


def metropolis(i, j, d_i, d_j):
    """w_ij = 1 / (1 + max(d_i, d_j)) (Metropolis et al. 1953; Xiao, Boyd 2004)."""
    return 1.0 / (1.0 + np.maximum(d_i, d_j))


RULES: dict[str, Rule] = {
    "metropolis": Rule("metropolis", "1 / (1 + max(d_i, d_j)); symmetric, doubly stochastic", link=metropolis),
}


def rule(name: str) -> Rule:
    if name not in RULES:
        raise ValueError(f"weights={name!r} is not known; known: {', '.join(sorted(RULES))}")
    return RULES[name]
