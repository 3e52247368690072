"""MATCHA: the matchings of a base graph are switched on independently, under a budget (Wang et al. 2019, arXiv 1905.09435)."""

from __future__ import annotations

import itertools

import numpy as np

from topologies import convex
from topologies.coloring import matchings as edge_colouring
from topologies.links import Links
from topologies.mixing import Entries, complement
from topologies.randomness import generator
from topologies.registry import Entry, refuse
from topologies.topology import Topology


def laplacian(num_peers: int, pairs) -> np.ndarray:
    """(n, n) of a set of edges."""
    i, j = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Links.from_arcs(num_peers, i, j).laplacian()


def best_probabilities(laplacians: np.ndarray, budget: float) -> np.ndarray:
    """(M,) p that maximises lambda_2(sum p_m L_m) with 0 <= p <= 1 and sum p <= budget M. laplacians: (M, n, n)."""
    M, n = laplacians.shape[:2]
    if budget >= 1.0:
        return np.ones(M)
    wish = "topology 'matcha' with optimise=True"
    convex.require(wish)
    import cvxpy

    p, connectivity = cvxpy.Variable(M), cvxpy.Variable()
    mean = cvxpy.reshape(laplacians.reshape(M, n * n).T @ p, (n, n), order="F")
    J = np.full((n, n), 1.0 / n)
    connected = mean - connectivity * (np.eye(n) - J) + J >> 0  # J: the constant vector's own zero would leave no inside
    limits = [connected, p >= 0, p <= 1, cvxpy.sum(p) <= budget * M]
    convex.solve(wish, cvxpy.Maximize(connectivity), limits, order=n, instead="say optimise=False")
    return np.clip(p.value, 0.0, 1.0)


def second_moment(laplacians: np.ndarray, p: np.ndarray, alpha: float) -> np.ndarray:
    """E[W^2] = (I - alpha Lb)^2 + 2 alpha^2 Lt, for a matching has L_m^2 = 2 L_m."""
    mean = np.tensordot(p, laplacians, axes=1)
    spread = np.tensordot(p * (1 - p), laplacians, axes=1)
    step = np.eye(len(mean)) - alpha * mean
    return step @ step + 2 * alpha**2 * spread


def best_alpha(laplacians: np.ndarray, p: np.ndarray) -> float:
    """Minimises ||E[W^2] - J||, which is convex in alpha, by golden section."""

    def rho(alpha):
        return np.linalg.eigvalsh(second_moment(laplacians, p, alpha) - 1.0 / laplacians.shape[1])[-1]

    golden, low, high = (5**0.5 - 1) / 2, 0.0, 1.0  # one link alone is best averaged with alpha = 1/2, more want less
    while high - low > 1e-10:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if rho(left) <= rho(right) else (left, high)
    return (low + high) / 2


class Matcha(Topology):
    """W = I - alpha sum_m B_m L_m, B_m ~ Bernoulli(p_m) afresh each round. ``clip`` keeps the diagonal non-negative."""

    def __init__(self, num_peers: int, matchings, probabilities, alpha: float, seed: int, nonnegative: bool):
        super().__init__("matcha", num_peers)
        self.matchings, self.probabilities, self.alpha, self.seed = matchings, probabilities, alpha, seed
        self.nonnegative = nonnegative

    def active(self, t: int) -> np.ndarray:
        """(M,) which matchings are on."""
        return generator(self.seed, t, "coins").random(len(self.matchings)) < self.probabilities

    def _of(self, active, alive=None) -> Entries:
        pairs = [pair for matching in itertools.compress(self.matchings, active) for pair in matching]
        i, j = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        links = Links.from_arcs(self.num_peers, i, j).among(alive)
        weight = np.full(len(links.sender), self.alpha)
        return Entries(links, weight, complement(weight, links.receiver, self.num_peers))

    def _entries(self, t, alive):
        return self._of(self.active(t), alive)

    def second_moment(self):
        if not self.matchings:
            return np.eye(self.num_peers)
        laplacians = np.stack([laplacian(self.num_peers, pairs) for pairs in self.matchings])
        return second_moment(laplacians, self.probabilities, self.alpha)


def matcha(
    num_peers: int,
    *,
    base="complete",
    budget: float = 0.5,
    matchings=None,
    optimise: bool = True,
    clip: bool = False,
    static_graph,
    seed: int = 0,
) -> Topology:
    """``budget``: share of the matchings on in the mean. ``matchings``: lists of pairs, instead of a colouring of
    ``base``. ``optimise=False``: every matching has probability ``budget``."""
    if not 0 < budget <= 1:
        raise refuse("matcha", "budget in (0, 1]", budget)
    links = static_graph(base, num_peers).links if matchings is None else _union(num_peers, matchings)
    groups = [list(map(tuple, group)) for group in (edge_colouring(links) if matchings is None else matchings)]
    if not groups:
        return Matcha(num_peers, [], np.zeros(0), 0.0, seed, True)
    laplacians = np.stack([laplacian(num_peers, pairs) for pairs in groups])
    p = best_probabilities(laplacians, budget) if optimise else np.full(len(groups), float(budget))
    alpha, ceiling = best_alpha(laplacians, p), 1.0 / int(links.in_degree.max())
    alpha = min(alpha, ceiling) if clip else alpha
    return Matcha(num_peers, groups, p, alpha, seed, alpha <= ceiling)


def _union(num_peers: int, matchings) -> Links:
    """The graph of given matchings, after checking that they are matchings."""
    if not isinstance(matchings, (list, tuple)):
        raise refuse("matcha", "matchings as a list of lists of pairs", repr(matchings))
    for group in matchings:
        ends = np.array(group, dtype=np.int64).ravel()
        if len(set(ends.tolist())) < len(ends) or ends.size and not 0 <= ends.min() <= ends.max() < num_peers:
            raise refuse("matcha", f"matchings of peers 0..{num_peers - 1}, none twice in one", group)
    i, j = np.array([pair for group in matchings for pair in group], dtype=np.int64).reshape(-1, 2).T
    links = Links.from_arcs(num_peers, i, j)
    if not links.is_connected():
        raise refuse("matcha", "matchings that together connect all peers", matchings)
    return links


SEQUENCES: dict[str, Entry] = {
    "matcha": Entry(
        matcha,
        "matchings of a base graph on at random under a budget (base, budget, matchings, optimise, clip)",
        {"base": {"name": "exponential", "symmetric": True}},
    ),
}
