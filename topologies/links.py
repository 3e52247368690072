"""Who hears whom in one round, as arrays: the sparse form of a graph that everything else is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np


@dataclass(frozen=True)
class Links:
    """Arcs ``sender -> receiver`` without self loops, sorted by (receiver, sender), each once.

    An undirected graph holds both arcs of every edge. Shapes: ``sender`` and ``receiver`` are int64 of shape (arcs,).
    """

    num_peers: int
    sender: np.ndarray
    receiver: np.ndarray
    directed: bool = False

    @classmethod
    def from_arcs(cls, num_peers: int, sender, receiver, directed: bool = False) -> Links:
        """Drops self loops and repetitions, sorts, and adds the way back when undirected."""
        sender, receiver = np.asarray(sender, dtype=np.int64).ravel(), np.asarray(receiver, dtype=np.int64).ravel()
        if not directed:
            sender, receiver = np.concatenate([sender, receiver]), np.concatenate([receiver, sender])
        code = np.unique((receiver * num_peers + sender)[sender != receiver])
        return cls(num_peers, code % num_peers, code // num_peers, directed)

    @classmethod
    def from_networkx(cls, graph: nx.Graph) -> Links:
        """Nodes must be 0..n-1; an arc (u, v) of a directed graph means that u sends to v."""
        arcs = np.array(list(graph.edges()), dtype=np.int64).reshape(-1, 2)
        return cls.from_arcs(graph.number_of_nodes(), arcs[:, 0], arcs[:, 1], graph.is_directed())

    @cached_property
    def start(self) -> np.ndarray:
        """(n + 1,) where the arcs into each peer begin."""
        return np.searchsorted(self.receiver, np.arange(self.num_peers + 1))

    @cached_property
    def in_degree(self) -> np.ndarray:
        return np.diff(self.start)

    @cached_property
    def out_degree(self) -> np.ndarray:
        return np.bincount(self.sender, minlength=self.num_peers)

    def senders(self, i: int) -> np.ndarray:
        """Ascending ids of the peers that ``i`` hears, itself excluded."""
        return self.sender[self.start[i] : self.start[i + 1]]

    def receivers(self, i: int) -> np.ndarray:
        """Ascending ids of the peers that hear ``i``, itself excluded."""
        return self.receiver[self.sender == i] if self.directed else self.senders(i)

    def keep(self, mask: np.ndarray) -> Links:
        """The links whose entry of ``mask`` (arcs,) is True."""
        return Links(self.num_peers, self.sender[mask], self.receiver[mask], self.directed)

    def among(self, alive: np.ndarray | None) -> Links:
        """The links between peers that are there; ``alive`` is a mask (n,) or None for everybody."""
        return self if alive is None else self.keep(alive[self.sender] & alive[self.receiver])

    def to_networkx(self) -> nx.Graph | nx.DiGraph:
        graph = nx.DiGraph() if self.directed else nx.Graph()
        graph.add_nodes_from(range(self.num_peers))
        graph.add_edges_from(zip(self.sender.tolist(), self.receiver.tolist(), strict=True))
        return graph
