"""What a topology is: num_peers, and for every round t a graph and a mixing matrix W(t)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import networkx as nx
import numpy as np

from topologies.links import Links
from topologies.weights import Entries, Rule


def alive_mask(alive, num_peers: int) -> np.ndarray | None:
    """``alive`` as a mask (n,) or None for everybody: accepts a boolean mask of n entries or a collection of ids."""
    if alive is None:
        return None
    given = np.asarray(list(alive) if not isinstance(alive, np.ndarray) else alive)
    if given.dtype == bool:
        if given.shape != (num_peers,):
            raise ValueError(f"alive as a mask needs {num_peers} entries, got shape {given.shape}")
        return None if given.all() else given
    mask = np.zeros(num_peers, dtype=bool)
    if given.size:
        if given.min() < 0 or given.max() >= num_peers:
            raise ValueError(f"alive names peers outside 0..{num_peers - 1}: {sorted(given.tolist())}")
        mask[given.astype(np.int64)] = True
    return None if mask.all() else mask


class Topology(ABC):
    """A sequence of graphs with weights. Every method is a pure function of (seed, t) and its arguments."""

    period: int | None = None  # W(t + period) = W(t) for all t; 1 for a static topology, None if there is no period

    def __init__(self, name: str, num_peers: int):
        self.name, self.num_peers = name, num_peers

    @abstractmethod
    def entries(self, t: int, alive=None) -> Entries:
        """Sparse W(t)."""

    def matrix(self, t: int, alive=None) -> np.ndarray:
        """W(t), float64 of shape (n, n); W[i, j] is what i gives to j's message. Who is not alive keeps w_ii = 1."""
        return self.entries(t, alive).dense()

    def neighbors(self, t: int, i: int, alive=None) -> dict[int, float]:
        """Row i of W(t): ascending ids (i itself among them) to non-zero weights."""
        return self.entries(t, alive).row(self.check_peer(i))

    def receivers(self, t: int, j: int, alive=None) -> list[int]:
        """Ascending ids of the other peers whose row of W(t) gives weight to j: to whom j has to send."""
        entries = self.entries(t, alive)
        mask = (entries.links.sender == self.check_peer(j)) & (entries.weight != 0.0)
        return entries.links.receiver[mask].tolist()

    def graph(self, t: int) -> nx.Graph | nx.DiGraph:
        """The links of round t; an arc (u, v) of a directed graph means that u sends to v."""
        return self.entries(t).links.to_networkx()

    def check_peer(self, i: int) -> int:
        if not 0 <= i < self.num_peers:
            raise ValueError(f"peer {i} is not one of 0..{self.num_peers - 1}")
        return int(i)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, num_peers={self.num_peers})"


class GraphTopology(Topology):
    """Links from ``links(t)``, weights from a rule that is applied afresh to the links that are there."""

    def __init__(self, name: str, num_peers: int, rule: Rule):
        super().__init__(name, num_peers)
        self.rule = rule

    @abstractmethod
    def links(self, t: int) -> Links: ...

    def entries(self, t: int, alive=None) -> Entries:
        return self.rule(self.links(t).among(alive_mask(alive, self.num_peers)))


class StaticTopology(GraphTopology):
    """The same links in every round."""

    period = 1

    def __init__(self, name: str, links: Links, rule: Rule):
        super().__init__(name, links.num_peers, rule)
        self._links = links
        self._entries: Entries | None = None

    def links(self, t: int) -> Links:
        return self._links

    def entries(self, t: int, alive=None) -> Entries:
        if alive is not None:
            return super().entries(t, alive)
        if self._entries is None:
            self._entries = self.rule(self._links)
        return self._entries
