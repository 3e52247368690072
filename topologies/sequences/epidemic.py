"""Epidemic learning and the random-walk token."""

from __future__ import annotations

import networkx as nx
import numpy as np

from topologies.links import Lattice, Links
from topologies.mixing import Entries, Rule
from topologies.randomness import generator
from topologies.registry import Entry, refuse
from topologies.topology import GraphTopology, Topology
from topologies.weights import make


class ELLocal(GraphTopology):
    """Every peer pushes to s uniform others; a receiver averages what came with its own, 1 / (1 + received).

    Row-stochastic only: the mean wanders (de Vos et al. 2023, arXiv 2310.01972). weights "push_sum" keep it.
    """

    def __init__(self, num_peers: int, s: int, rule: Rule, seed: int):
        super().__init__("el_local", num_peers, rule)
        self.s, self.seed, self.exchangeable = s, seed, rule.check is None

    def links(self, t):
        n, rng = self.num_peers, generator(self.seed, t, "peers")
        targets = rng.integers(n - 1, size=(n, self.s)) if n > 1 else np.zeros((n, 0), dtype=np.int64)
        while len(twice := _with_repeats(targets)):  # rows without repeats are uniform subsets
            targets[twice] = rng.integers(n - 1, size=(len(twice), self.s))
        ids = np.arange(n)[:, None]
        return Links.from_arcs(n, np.repeat(ids, targets.shape[1], axis=1), targets + (targets >= ids), directed=True)

    def invariant_contraction(self):
        """(E|W|_F^2 - 1) / (n - 1) with E[1 / (1 + Bin(n-1, q))] = (1 - (1-q)^n) / (n q), q = s / (n-1)."""
        n = self.num_peers
        if self.rule.name != "uniform" or n == 1:
            return None if n > 1 else 0.0
        q = self.s / (n - 1)
        return ((1 - (1 - q) ** n) / q - 1) / (n - 1)


def _with_repeats(rows: np.ndarray) -> np.ndarray:
    ordered = np.sort(rows, axis=1)
    return np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))


class ELOracle(GraphTopology):
    """A fresh random s-regular graph each round; Metropolis weights are 1 / (s + 1)."""

    def __init__(self, num_peers: int, s: int, rule: Rule, seed: int):
        super().__init__("el_oracle", num_peers, rule)
        self.s, self.seed, self.exchangeable = s, seed, rule.check is None

    def links(self, t):
        seed = int(generator(self.seed, t, "peers").integers(2**31))
        return Links.from_networkx(nx.random_regular_graph(self.s, self.num_peers, seed=seed))

    def invariant_contraction(self):
        n = self.num_peers
        return (n / (self.s + 1) - 1) / max(1, n - 1) if self.rule.name == "metropolis" else None


class RandomWalk(Topology):
    """One token walks over a base graph; in round t its holder passes it to the next one, whose row of W is that message.

    The walk moves by the rows of a weight rule ("metropolis": visits tend to 1/n) or to a uniform neighbour ("uniform":
    visits tend to deg_i / sum deg). Where the token is at t follows from (seed, t) alone, but only by walking there:
    O(t) once, kept afterwards.
    """

    sums = "row"
    symmetric = False

    def __init__(self, base: Links | Lattice, moves: str, seed: int):
        super().__init__("random_walk", base.num_peers)
        self.base, self.seed, self.weighs = base, seed, None if moves == "uniform" else make(moves)(base.links)
        start = int(generator(seed, 0, "walk").integers(base.num_peers))
        self._visited = [start]

    def holder(self, t: int) -> int:
        """Who has the token at the beginning of round t."""
        while len(self._visited) <= t:
            self._visited.append(self._move(self._visited[-1], len(self._visited)))
        return self._visited[t]

    def _move(self, i: int, t: int) -> int:
        coin = generator(self.seed, t, "walk").random()
        if self.weighs is None:
            senders = self.base.senders(i)
            return int(senders[int(coin * len(senders))]) if len(senders) else i
        row = self.weighs.row(i)
        place = np.searchsorted(np.cumsum(list(row.values())), coin, side="right")
        return list(row)[min(place, len(row) - 1)]

    def _entries(self, t, alive):
        sender, receiver = self.holder(t), self.holder(t + 1)
        stays = sender == receiver or (alive is not None and not (alive[sender] and alive[receiver]))
        ends = np.array([[sender], [receiver]])[:, : 0 if stays else 1]
        diagonal = np.ones(self.num_peers)
        diagonal[ends[1]] = 0.0
        return Entries(Links(self.num_peers, ends[0], ends[1], directed=True), np.ones(ends.shape[1]), diagonal)


def el_local(num_peers: int, *, s: int = 2, rule, seed: int = 0) -> Topology:
    """EL-Local: every peer pushes to ``s`` random others, receivers average; row-stochastic (de Vos et al. 2023)."""
    _check("el_local", num_peers, s)
    rule = make("uniform") if rule.name == "metropolis" else rule
    return ELLocal(num_peers, min(s, num_peers - 1), rule, seed)


def el_oracle(num_peers: int, *, s: int = 2, rule, seed: int = 0) -> Topology:
    """EL-Oracle: a random ``s``-regular graph each round (de Vos et al. 2023, arXiv 2310.01972)."""
    _check("el_oracle", num_peers, s)
    if num_peers > 1 and num_peers * s % 2:
        raise refuse("el_oracle", "num_peers x s even", f"s={s}, num_peers={num_peers}")
    return ELOracle(num_peers, min(s, num_peers - 1), rule, seed)


def _check(name: str, num_peers: int, s: int) -> None:
    if s < 1 or (num_peers > 1 and s >= num_peers):
        raise refuse(name, "1 <= s < num_peers", f"s={s}, num_peers={num_peers}")


def random_walk(num_peers: int, *, base="ring", moves: str = "metropolis", static_graph, seed: int = 0) -> Topology:
    """A token walks over ``base``; W(t) hands it over. moves="metropolis": visits tend to 1/n; "uniform": to deg_i / sum deg."""
    if moves not in ("metropolis", "uniform"):
        raise refuse("random_walk", "moves 'metropolis' or 'uniform'", repr(moves))
    return RandomWalk(static_graph(base, num_peers), moves, seed)


SEQUENCES: dict[str, Entry] = {
    "el_local": Entry(el_local, "epidemic: every peer pushes to s random others; row-stochastic (s)"),
    "el_oracle": Entry(el_oracle, "epidemic: a random s-regular graph each round (s)"),
    "random_walk": Entry(random_walk, "one token walks over a base graph (base, moves)"),
}
