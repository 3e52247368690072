"""Who receives from whom in one round, as arrays: the sparse form of a graph that everything else is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np


@dataclass(frozen=True, eq=False)
class Links:
    """Arcs ``sender -> receiver`` without self loops, sorted by (receiver, sender), each once.

    An undirected graph holds both arcs of every edge. Shapes: ``sender`` and ``receiver`` are int64 of shape (arcs,);
    ``affinity`` is float64 of the same shape or None: numbers that came with the links, for the rules that use them.
    ``draw``: which draw of a random family this is, for those that are redrawn until connected.

    >>> Links.from_arcs(3, [0, 1], [1, 2]).senders(1)
    array([0, 2])
    """

    num_peers: int
    sender: np.ndarray
    receiver: np.ndarray
    directed: bool = False
    affinity: np.ndarray | None = None
    draw: int = 0

    @classmethod
    def from_arcs(cls, num_peers: int, sender, receiver, directed: bool = False, affinity=None) -> Links:
        """Drops self loops and repetitions, sorts, and adds the way back when undirected."""
        sender, receiver = np.asarray(sender, dtype=np.int64).ravel(), np.asarray(receiver, dtype=np.int64).ravel()
        if not directed:
            sender, receiver = np.concatenate([sender, receiver]), np.concatenate([receiver, sender])
            affinity = None if affinity is None else np.concatenate([affinity, affinity])
        code = np.where(sender == receiver, -1, receiver * num_peers + sender)
        code, first = np.unique(code, return_index=True)
        first = first[code >= 0]
        return cls(num_peers, sender[first], receiver[first], directed, None if affinity is None else affinity[first])

    @classmethod
    def from_networkx(cls, graph: nx.Graph) -> Links:
        """Nodes must be 0..n-1; an arc (u, v) of a directed graph means that u sends to v."""
        arcs = np.array(list(graph.edges()), dtype=np.int64).reshape(-1, 2)
        return cls.from_arcs(graph.number_of_nodes(), arcs[:, 0], arcs[:, 1], graph.is_directed())

    @cached_property
    def links(self) -> Links:
        """Itself: ``Links`` and ``Lattice`` are read alike."""
        return self

    @cached_property
    def start(self) -> np.ndarray:
        """(n + 1,) where the arcs into each peer begin."""
        return np.searchsorted(self.receiver, np.arange(self.num_peers + 1))

    @cached_property
    def in_degree(self) -> np.ndarray:
        return np.diff(self.start)

    @cached_property
    def out_degree(self) -> np.ndarray:
        return np.bincount(self.sender, minlength=self.num_peers) if self.directed else self.in_degree

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """Each undirected edge once, as (smaller ids, larger ids); all arcs as (senders, receivers) when directed."""
        once = slice(None) if self.directed else self.sender < self.receiver
        return self.sender[once], self.receiver[once]

    @cached_property
    def edge_of_arc(self) -> np.ndarray:
        """(arcs,) the place in ``edges`` of the edge that an arc is a direction of."""
        if self.directed:
            return np.arange(len(self.sender))
        low, high = np.minimum(self.sender, self.receiver), np.maximum(self.sender, self.receiver)
        i, j = self.edges
        return np.searchsorted(j * self.num_peers + i, high * self.num_peers + low)

    def senders(self, i: int) -> np.ndarray:
        """Ascending ids of the peers that ``i`` receives from, itself excluded."""
        return self.sender[self.start[i] : self.start[i + 1]]

    def keep(self, mask: np.ndarray) -> Links:
        """The links whose entry of ``mask`` (arcs,) is True."""
        kept = np.flatnonzero(mask)  # gathering by places is faster than by a random mask
        affinity = None if self.affinity is None else self.affinity[kept]
        return Links(self.num_peers, self.sender[kept], self.receiver[kept], self.directed, affinity)

    def among(self, alive: np.ndarray | None) -> Links:
        """The links between peers that are there; ``alive`` is a mask (n,) or None for everybody."""
        return self if alive is None else self.keep(alive[self.sender] & alive[self.receiver])

    def components(self) -> np.ndarray:
        """(n,) the smallest id of each peer's component, directions ignored: label spreading with pointer jumping."""
        label = np.arange(self.num_peers)
        while True:
            spread = label.copy()
            np.minimum.at(spread, label[self.receiver], label[self.sender])
            np.minimum.at(spread, label[self.sender], label[self.receiver])
            spread = spread[label]
            while (spread[spread] != spread).any():
                spread = spread[spread]
            if (spread == label).all():
                return label
            label = spread

    def is_connected(self) -> bool:
        """Connected; strongly connected when directed."""
        if self.directed:
            return nx.is_strongly_connected(self.to_networkx())
        return not self.components().any()

    def adjacency(self) -> np.ndarray:
        """Dense 0/1 float64 (n, n); entry [i, j] says that i receives from j."""
        A = np.zeros((self.num_peers, self.num_peers))
        A[self.receiver, self.sender] = 1.0
        return A

    def laplacian(self) -> np.ndarray:
        """Dense L = D - A, float64 (n, n), of an undirected graph."""
        return np.diag(self.in_degree.astype(np.float64)) - self.adjacency()

    def to_networkx(self) -> nx.Graph | nx.DiGraph:
        graph = nx.DiGraph() if self.directed else nx.Graph()
        graph.add_nodes_from(range(self.num_peers))
        graph.add_edges_from(zip(self.sender.tolist(), self.receiver.tolist(), strict=True))
        return graph


class Lattice:
    """An undirected Cayley graph of Z_a x Z_b x ...: coordinates, and the steps from each peer to its neighbours.

    Ring, torus, hypercube and complete graph are lattices. A peer's neighbours follow from its id, so nothing of
    size n is built until ``links`` is asked for. The steps are closed under sign.

    >>> Lattice((4, 5), [(0, 1), (0, -1), (1, 0), (-1, 0)]).senders(0)
    array([ 1,  4,  5, 15])
    """

    directed = False

    def __init__(self, shape: tuple[int, ...], steps):
        self.shape, self.num_peers = tuple(shape), int(np.prod(shape))
        steps = np.array(steps, dtype=np.int64).reshape(-1, len(self.shape)) % np.array(self.shape)
        steps = np.unique(steps, axis=0)
        self.steps = steps[steps.any(axis=1)]

    def senders(self, i: int) -> np.ndarray:
        place = np.array(np.unravel_index(i, self.shape), dtype=np.int64)
        return np.sort(np.ravel_multi_index(((place + self.steps) % self.shape).T, self.shape))

    @cached_property
    def links(self) -> Links:
        places = np.stack(np.unravel_index(np.arange(self.num_peers), self.shape))
        shape = np.array(self.shape)[:, None]
        ids = [np.ravel_multi_index((places + step[:, None]) % shape, self.shape) for step in self.steps]
        senders = np.stack(ids, axis=1) if ids else np.empty((self.num_peers, 0), dtype=np.int64)
        receivers = np.repeat(np.arange(self.num_peers), len(self.steps))
        return Links(self.num_peers, np.sort(senders, axis=1).ravel(), receivers)

    def adjacency_eigenvalues(self) -> np.ndarray:
        """(n,) all eigenvalues of the adjacency matrix: the Fourier transform of the neighbours of peer 0."""
        first = np.zeros(self.shape)
        first[tuple(self.steps.T)] = 1.0
        return np.fft.fftn(first).real.ravel()
