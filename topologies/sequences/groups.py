"""Averages in groups: all-reduce along the axes of a grid, and the two levels of a GPU cluster."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from topologies.links import Links
from topologies.mixing import Entries
from topologies.registry import Entry, refuse
from topologies.topology import Topology


def average_groups(label: np.ndarray, alive: np.ndarray | None) -> Entries:
    """W that averages those with equal ``label`` (n,) who are there; everybody else keeps its value."""
    n = len(label)
    label = label if alive is None else np.where(alive, label, label.max() + 1 + np.arange(n))
    _, label, size = np.unique(label, return_inverse=True, return_counts=True)
    order = np.argsort(label, kind="stable")
    first = np.concatenate([[0], np.cumsum(size)])[:-1]
    # each peer repeated once for every member of its group, next to those members
    receiver = np.repeat(np.arange(n), size[label])
    rank = np.arange(len(receiver)) - np.repeat(np.cumsum(size[label]) - size[label], size[label])
    sender = order[first[label[receiver]] + rank]
    other = sender != receiver
    links = Links(n, sender[other], receiver[other])
    return Entries(links, 1.0 / size[label[links.receiver]], 1.0 / size[label])


class Groups(Topology):
    """In each round the peers are divided into groups, and each group averages exactly."""

    @abstractmethod
    def labels(self, t: int) -> np.ndarray:
        """(n,) which group each peer is in."""

    @abstractmethod
    def members(self, t: int, i: int) -> np.ndarray:
        """Ascending ids of the group of i."""

    def _entries(self, t, alive):
        return average_groups(self.labels(t), alive)

    def _row(self, t, i, alive):
        members = self.members(t, i)
        members = members if alive is None else members[alive[members]]
        return dict.fromkeys(members.tolist(), 1.0 / len(members))


class GridAllReduce(Groups):
    """Ids are d digits in base M; in round t those that differ only in digit t mod d average; exact after d rounds.

    The mixing of Moshpit SGD (Ryabinin et al. 2021, arXiv 2103.03239) without its random regrouping.
    """

    def __init__(self, num_peers: int, group_size: int):
        super().__init__("grid_all_reduce", num_peers)
        d, got = 0, f"num_peers={num_peers}, group_size={group_size}"
        if group_size < 2:
            raise refuse("grid_all_reduce", "num_peers = group_size^d with group_size of at least 2", got)
        while group_size**d < num_peers:
            d += 1
        if group_size**d != num_peers:
            hint = f"try {group_size ** max(d - 1, 0)} or {group_size**d} peers"
            raise refuse("grid_all_reduce", "num_peers = group_size^d with group_size of at least 2", got, hint)
        self.group_size, self.period = group_size, max(1, d)

    def labels(self, t):
        stride, ids = self.group_size ** (t % self.period), np.arange(self.num_peers)
        return ids - ids // stride % self.group_size * stride

    def members(self, t, i):
        stride = self.group_size ** (t % self.period)
        first = i - i // stride % self.group_size * stride
        return first + stride * np.arange(min(self.group_size, self.num_peers))


class Hierarchical(Topology):
    """Peers in nodes of ``node_size``. Most rounds average inside each node; every ``every``-th round the peers of
    equal local rank mix between nodes by another topology, whose own rounds are counted by these.

    The shape of a GPU cluster: dense where links are fast, one sparse exchange per peer where they are slow.
    """

    def __init__(self, num_peers: int, node_size: int, between: Topology, every: int):
        super().__init__("hierarchical", num_peers)
        self.node_size, self.between, self.every = node_size, between, every
        self.period = every * between.period if between.period else None
        self.sums, self.symmetric, self.nonnegative = between.sums, between.symmetric, between.nonnegative

    def is_between(self, t: int) -> bool:
        return t % self.every == self.every - 1

    def _entries(self, t, alive):
        if not self.is_between(t):
            return average_groups(np.arange(self.num_peers) // self.node_size, alive)
        rails = [self._rail(t, rank, alive) for rank in range(self.node_size)]
        sender = np.concatenate([r.links.sender * self.node_size + rank for rank, r in enumerate(rails)])
        receiver = np.concatenate([r.links.receiver * self.node_size + rank for rank, r in enumerate(rails)])
        weight, order = np.concatenate([r.weight for r in rails]), np.lexsort((sender, receiver))
        links = Links(self.num_peers, sender[order], receiver[order], rails[0].links.directed)
        return Entries(links, weight[order], np.stack([r.diagonal for r in rails], axis=1).ravel())

    def _rail(self, t: int, rank: int, alive) -> Entries:
        return self.between.entries(t // self.every, None if alive is None else alive[rank :: self.node_size])

    def _row(self, t, i, alive):
        node, rank = divmod(i, self.node_size)
        if self.is_between(t):
            row = self.between.neighbors(t // self.every, node, None if alive is None else alive[rank :: self.node_size])
            return {j * self.node_size + rank: weight for j, weight in row.items()}
        members = np.arange(node * self.node_size, (node + 1) * self.node_size)
        members = members if alive is None else members[alive[members]]
        return dict.fromkeys(members.tolist(), 1.0 / len(members))

    def _column(self, t, j, alive):
        if self.symmetric or not self.is_between(t):
            return [i for i in self._row(t, j, alive) if i != j]
        node, rank = divmod(j, self.node_size)
        there = None if alive is None else alive[rank :: self.node_size]
        return [i * self.node_size + rank for i in self.between.receivers(t // self.every, node, there)]


def grid_all_reduce(num_peers: int, *, group_size: int = 2) -> Topology:
    """Ids are d digits in base ``group_size``; in round t those that differ in digit t mod d average; exact after d rounds
    (the mixing of Moshpit SGD, Ryabinin et al. 2021, arXiv 2103.03239)."""
    return GridAllReduce(num_peers, group_size)


def hierarchical(num_peers: int, *, node_size: int, between="one_peer_exponential", every: int = 2, build) -> Topology:
    """Averages inside nodes of ``node_size`` peers; every ``every``-th round peers of equal local rank mix between nodes by
    the topology ``between`` (a name, or a mapping with name and parameters)."""
    if node_size < 1 or num_peers % node_size:
        fits = [m for m in range(1, num_peers + 1) if num_peers % m == 0]
        raise refuse("hierarchical", "node_size that divides num_peers", f"{node_size} for {num_peers}", f"try {fits}")
    if every < 1:
        raise refuse("hierarchical", "every of at least 1", every)
    return Hierarchical(num_peers, node_size, build(between, num_peers // node_size), every)


SEQUENCES: dict[str, Entry] = {
    "grid_all_reduce": Entry(
        grid_all_reduce, "Moshpit-style: groups along the axes of an M^d grid average in turn; exact (group_size)"
    ),
    "hierarchical": Entry(
        hierarchical, "dense inside a node, sparse between nodes (node_size, between, every)", {"node_size": 4}
    ),
}
