"""Sequences in which a peer talks to at most one other: matchings, and single edges."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from topologies.graphs import dimension
from topologies.links import Lattice, Links
from topologies.mixing import Entries
from topologies.randomness import Shuffle, generator, key
from topologies.registry import Entry
from topologies.topology import Topology


class Matching(Topology):
    """Pairs; each of a pair gives the other ``weight``. Who has no partner, or one that is away, keeps its value."""

    def __init__(self, name: str, num_peers: int, weight: float = 0.5):
        super().__init__(name, num_peers)
        self.weight = weight

    @abstractmethod
    def partner(self, t: int, ids: np.ndarray) -> np.ndarray:
        """Partners in round t of the peers ``ids``, an int64 array of any shape; the peer itself if it has none."""

    def _entries(self, t, alive):
        ids = np.arange(self.num_peers)
        partner = self.partner(t, ids)
        paired = partner != ids
        if alive is not None:
            paired &= alive & alive[partner]
        links = Links(self.num_peers, partner[paired], ids[paired])
        return Entries(links, np.full(len(links.sender), self.weight), np.where(paired, 1.0 - self.weight, 1.0))

    def _row(self, t, i, alive):
        partner = int(self.partner(t, np.array(i)))
        if partner == i or (alive is not None and not alive[partner]):
            return {i: 1.0}
        row = {i: 1.0 - self.weight, partner: self.weight}
        return {j: row[j] for j in sorted(row) if row[j] != 0.0}


class HypercubeMatching(Matching):
    """In round t, ids that differ in bit t mod d meet; any d consecutive rounds average exactly. n = 2^d."""

    def __init__(self, num_peers: int):
        super().__init__("hypercube_matching", num_peers)
        self.dimension = dimension("hypercube_matching", num_peers)
        self.period = max(1, self.dimension)

    def partner(self, t, ids):
        return ids ^ (1 << t % self.dimension) if self.dimension else ids


class AlternatingRing(Matching):
    """The links of a ring in turn: (0,1)(2,3).. then (1,2)..(n-1,0). With n odd the idle peer moves round the ring."""

    def __init__(self, num_peers: int):
        super().__init__("alternating_ring", num_peers)
        self.period = 1 if num_peers <= 2 else 2 if num_peers % 2 == 0 else num_peers

    def partner(self, t, ids):
        n, start = self.num_peers, t % self.period
        place = (ids - start) % n
        other = place ^ 1
        return (np.where(other < n, other, place) + start) % n


class RandomMatching(Matching):
    """A uniform pairing each round, one peer idle if n is odd; contraction (n-2) / (2 (n-1)), or 1/2 for odd n."""

    exchangeable = True

    def __init__(self, num_peers: int, seed: int):
        super().__init__("random_matching", num_peers)
        self.seed = seed

    def partner(self, t, ids):
        shuffle = Shuffle(key(self.seed, t, "matching"), self.num_peers)
        place = shuffle(ids)
        other = place ^ 1
        return shuffle.inverse(np.where(other < self.num_peers, other, place))

    def invariant_contraction(self):
        return 1.0 - (self.num_peers // 2) / (self.num_peers - 1) if self.num_peers > 1 else 0.0


class OneEdge(Matching):
    """One edge a round."""

    @abstractmethod
    def edge(self, t: int) -> tuple[int, int]: ...

    def partner(self, t, ids):
        i, j = self.edge(t)
        return np.where(ids == i, j, np.where(ids == j, i, ids))


class PairwiseGossip(OneEdge):
    """One uniform edge of a base graph a round (Boyd et al. 2006); E[W^T W] = I - L / (2 edges)."""

    def __init__(self, base: Links | Lattice, whole: bool, seed: int):
        super().__init__("pairwise_gossip", base.num_peers)
        self.base, self.exchangeable, self.seed = base, whole, seed

    def edge(self, t):
        rng = generator(self.seed, t, "links")
        if self.num_peers == 1:
            return 0, 0
        if self.exchangeable:  # the complete graph has too many edges to list
            i, j = int(rng.integers(self.num_peers)), int(rng.integers(self.num_peers - 1))
            return i, j + (j >= i)
        senders, receivers = self.base.links.edges
        if not len(senders):
            return 0, 0
        chosen = rng.integers(len(senders))
        return int(senders[chosen]), int(receivers[chosen])

    def invariant_contraction(self):
        return 1.0 - 1.0 / (self.num_peers - 1) if self.exchangeable and self.num_peers > 1 else None

    def second_moment(self):
        edges = max(1, len(self.base.links.sender) // 2)
        return np.eye(self.num_peers) - self.base.links.laplacian() / (2 * edges)


class EdgeCycle(OneEdge):
    """The edges of a base graph one after the other, for ever: connected over every B = edges rounds."""

    def __init__(self, num_peers: int, edges: tuple[np.ndarray, np.ndarray]):
        super().__init__("edge_cycle", num_peers)
        self.edges = edges
        self.period = max(1, len(edges[0]))

    def edge(self, t):
        if not len(self.edges[0]):
            return 0, 0
        return int(self.edges[0][t % self.period]), int(self.edges[1][t % self.period])


def hypercube_matching(num_peers: int) -> Topology:
    """In round t, ids that differ in bit t mod d meet and average; exact after d rounds; n = 2^d."""
    return HypercubeMatching(num_peers)


def alternating_ring(num_peers: int) -> Topology:
    """The links of a ring in turn: (0,1)(2,3).., then (1,2)..(n-1,0); for odd n the idle peer moves round the ring."""
    return AlternatingRing(num_peers)


def random_matching(num_peers: int, *, seed: int = 0) -> Topology:
    """A uniform pairing each round; contraction (n-2) / (2 (n-1)) for even n, 1/2 for odd n."""
    return RandomMatching(num_peers, seed)


def pairwise_gossip(num_peers: int, *, base="complete", static_graph, seed: int = 0) -> Topology:
    """One uniform edge of ``base`` each round (Boyd et al. 2006); E[W^T W] = I - L / (2 edges)."""
    return PairwiseGossip(static_graph(base, num_peers), base == "complete", seed)


def edge_cycle(num_peers: int, *, base="ring", static_graph) -> Topology:
    """The edges of ``base`` one after the other: the sparsest sequence that is connected over B = edges rounds."""
    ids = np.arange(num_peers)
    if base == "ring" and num_peers > 2:  # round the ring
        return EdgeCycle(num_peers, (ids, (ids + 1) % num_peers))
    return EdgeCycle(num_peers, static_graph(base, num_peers).links.edges)


SEQUENCES: dict[str, Entry] = {
    "hypercube_matching": Entry(hypercube_matching, "round t: ids that differ in bit t mod d meet; exact; n = 2^d"),
    "alternating_ring": Entry(alternating_ring, "the even links of a ring, then the odd ones"),
    "random_matching": Entry(random_matching, "a uniform pairing each round"),
    "pairwise_gossip": Entry(pairwise_gossip, "one uniform edge of a base graph each round (base)"),
    "edge_cycle": Entry(edge_cycle, "the edges of a base graph one after the other: B-connected (base)", {}, 8),
}
