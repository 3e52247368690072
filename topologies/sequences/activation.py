"""Links that come and go at random: edge activation, and the three readings of "two peers meet with probability p"."""

from __future__ import annotations

import itertools
import math

import numpy as np

from topologies.links import Lattice, Links
from topologies.mixing import Entries, Rule
from topologies.randomness import key, uniform
from topologies.registry import Entry, refuse
from topologies.sequences.matchings import Matching
from topologies.topology import GraphTopology, Topology

# Links up to which all 2^links outcomes of a round are enumerated for exact expectations.
ENUMERATED = 12


class EdgeActivation(GraphTopology):
    """Every link of a base graph is on in round t with probability p, independently of all else.

    The coin of a link depends on (seed, t, i, j) alone: not on the base graph, and the links of p = 0.1 are among
    those of p = 0.2.
    """

    def __init__(self, base: Links | Lattice, rule: Rule, *, p: float, seed: int, whole: bool):
        super().__init__("edge_activation", base.num_peers, rule)
        if not 0.0 <= p <= 1.0:
            raise refuse("edge_activation", "p in [0, 1]", p)
        self.base, self.p, self.seed, self.exchangeable = base, float(p), seed, whole and rule.check is None

    def links(self, t):
        base = self.base.links
        on = uniform(key(self.seed, t, "links"), *base.edges) < self.p
        return base.keep(on[base.edge_of_arc])

    def senders(self, t, i):
        senders = self.base.senders(i)
        return senders[uniform(key(self.seed, t, "links"), senders, i) < self.p]

    def law(self):
        i, j = self.base.links.edges
        return None if len(i) > ENUMERATED else map(self._outcome, itertools.product((False, True), repeat=len(i)))

    def _outcome(self, on: tuple[bool, ...]) -> tuple[float, Entries]:
        i, j = self.base.links.edges
        links = Links.from_arcs(self.num_peers, i[list(on)], j[list(on)], self.base.directed)
        return self.p ** sum(on) * (1 - self.p) ** (len(on) - sum(on)), self.rule(links)

    def invariant_contraction(self):
        known = self.exchangeable and self.rule.name == "metropolis"
        return activation_contraction(self.num_peers, self.p) if known else None


def activation_contraction(n: int, p: float) -> float:
    """||E[W^T W] - J|| of Metropolis weights on G(n, p), exactly: (E||W||_F^2 - 1) / (n - 1) by permutation invariance.

    E||W||_F^2 needs E[w_ij], E[w_ij^2] and E[w_ij w_ik], and given the links in question the degrees are 1 or 2 plus
    independent binomials (one shared coin, j - k, is summed over).
    """
    if n <= 2:
        return (1.0 - p) if n == 2 else 0.0
    d = np.arange(1, n)
    one_link = 1.0 / (1.0 + np.maximum.outer(d, d))
    given_edge = _binomial(n - 2, p)
    first = p * given_edge @ one_link @ given_edge
    square = p * given_edge @ one_link**2 @ given_edge
    # degree of i is 2 + Bin(n - 3); that of j and of k is 1 + c + Bin(n - 3), c their common coin
    rest, hub = _binomial(n - 3, p), 1.0 / (1.0 + np.maximum.outer(d[1:], d))
    without, with_link = hub[:, : n - 2] @ rest, hub[:, 1:] @ rest
    both = p**2 * rest @ ((1 - p) * without**2 + p * with_link**2)
    own = 1.0 - 2 * (n - 1) * first + (n - 1) * square + (n - 1) * (n - 2) * both
    return float((n * (n - 1) * square + n * own - 1.0) / (n - 1))


def _binomial(n: int, p: float) -> np.ndarray:
    """(n + 1,) probabilities of 0..n successes."""
    if p in (0.0, 1.0):
        return np.eye(n + 1)[int(n * p)]
    k = np.arange(n + 1)
    log_factorial = np.array([math.lgamma(m + 1) for m in range(n + 1)])
    logs = log_factorial[n] - log_factorial[k] - log_factorial[n - k] + k * math.log(p) + (n - k) * math.log1p(-p)
    return np.exp(logs)


class SequentialEncounters(Topology):
    """The pairs that meet average one after the other in random order: W is their product, doubly stochastic only."""

    symmetric = False

    def __init__(self, meetings: EdgeActivation):
        super().__init__("encounters", meetings.num_peers)
        self.meetings, self.exchangeable = meetings, meetings.exchangeable

    def _entries(self, t, alive):
        W = np.eye(self.num_peers)
        for i, j in in_order(self.meetings, t, alive):
            W[[i, j]] = (W[i] + W[j]) / 2
        return Entries.from_dense(W)


class MatchedEncounters(Matching):
    """The pairs that meet, in random order, are taken if both are still free: at most one partner a round."""

    def __init__(self, meetings: EdgeActivation):
        super().__init__("encounters", meetings.num_peers)
        self.meetings, self.exchangeable = meetings, meetings.exchangeable

    def partner(self, t, ids):
        partner, free = np.arange(self.num_peers), np.ones(self.num_peers, dtype=bool)
        for i, j in in_order(self.meetings, t, None):
            if free[i] and free[j]:
                partner[i], partner[j] = j, i
                free[i] = free[j] = False
        return partner[ids]


def in_order(meetings: EdgeActivation, t: int, alive) -> np.ndarray:
    """(met, 2) the pairs that meet in round t, in an order that depends on (seed, t) alone."""
    i, j = meetings.links(t).among(alive).edges
    order = np.argsort(uniform(key(meetings.seed, t, "order"), i, j), kind="stable")
    return np.stack([i, j], axis=1)[order]


def edge_activation(num_peers: int, *, p: float, base="complete", rule, static_graph, seed: int = 0) -> Topology:
    """Each link of ``base`` is on in round t with probability ``p``; weights are those of the links that are on."""
    return EdgeActivation(static_graph(base, num_peers), rule, p=p, seed=seed, whole=base == "complete")


def encounters(num_peers: int, *, p: float = 0.1, reading: str = "metropolis", base="complete", rule, static_graph, seed=0):
    """Each pair meets with probability p, as in ADF-LoRA (Wang et al. 2025, arXiv 2511.18291), which leaves open what
    a peer that meets two others does: ``reading`` is "metropolis", "sequential" or "matching"."""
    meetings = edge_activation(num_peers, p=p, base=base, rule=rule, static_graph=static_graph, seed=seed)
    if reading == "metropolis":
        return meetings
    if reading not in ("sequential", "matching"):
        raise refuse("encounters", "reading 'metropolis', 'sequential' or 'matching'", repr(reading))
    if rule.name != "metropolis":
        raise refuse("encounters", f"the default weights for reading={reading!r}", repr(rule.name))
    return (SequentialEncounters if reading == "sequential" else MatchedEncounters)(meetings)


SEQUENCES: dict[str, Entry] = {
    "edge_activation": Entry(
        edge_activation, "each link of a base graph on with probability p, afresh every round (p, base)", {"p": 0.2}
    ),
    "encounters": Entry(encounters, "pairs meet with probability p and average (p, reading, base)", {"reading": "sequential"}),
}
