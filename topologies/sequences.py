"""Sequences W(t) whose links change from round to round. ``SEQUENCES`` lists them."""

from __future__ import annotations

import numpy as np

from topologies.links import Links
from topologies.randomness import key, uniform
from topologies.topology import GraphTopology
from topologies.weights import Rule


class EdgeActivation(GraphTopology):
    """Every link of a base graph is on in round t with probability p, independently of all else."""

    def __init__(self, base: Links, rule: Rule, *, p: float, seed: int):
        super().__init__("edge_activation", base.num_peers, rule)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"topology 'edge_activation' needs p in [0, 1], got {p}")
        self.base, self.p, self.seed = base, float(p), seed

    def links(self, t: int) -> Links:
        coins = uniform(key(self.seed, t, "links"), self.base.sender, self.base.receiver)
        return self.base.keep(coins < self.p)


class OnePeerExponential(GraphTopology):
    """In round t, i sends to (i + 2^(t mod tau)) mod n with weight 1/2, tau = ceil(log2 n) (Ying et al. 2021, arXiv 2110.13363)."""

    def __init__(self, num_peers: int, rule: Rule):
        super().__init__("one_peer_exponential", num_peers, rule)
        self.period = max(1, (num_peers - 1).bit_length())

    def links(self, t: int) -> Links:
        ids = np.arange(self.num_peers)
        return Links.from_arcs(self.num_peers, ids, (ids + 2 ** (t % self.period)) % self.num_peers, directed=True)
