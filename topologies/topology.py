"""What a topology is: num_peers, and for every round t a graph and a mixing matrix W(t)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable

import networkx as nx
import numpy as np

from topologies.links import Lattice, Links
from topologies.mixing import Entries, Rule, halve

# Above it, a peer's row is computed alone where the sequence allows it; below, W(t) is made once for all peers.
WHOLE = 2048
# Rounds whose W is kept: all hosted peers ask for the same round one after the other.
KEPT = 4


def alive_mask(alive, num_peers: int) -> np.ndarray | None:
    """``alive`` as a mask (n,) or None for everybody: accepts a boolean mask of n entries or a collection of ids."""
    if alive is None:
        return None
    given = alive if isinstance(alive, np.ndarray) else np.asarray(list(alive))
    if given.dtype == bool:
        if given.shape != (num_peers,):
            raise ValueError(f"alive as a mask needs {num_peers} entries, got shape {given.shape}")
        return None if given.all() else given
    ids, mask = given.astype(np.int64), np.zeros(num_peers, dtype=bool)
    if ids.size and (ids.min() < 0 or ids.max() >= num_peers or (ids != given).any()):
        raise ValueError(f"alive names peers that are not ids in 0..{num_peers - 1}: {given.tolist()}")
    mask[ids] = True
    return None if mask.all() else mask


class Topology(ABC):
    """A sequence of graphs with weights. Every method is a pure function of (seed, t) and its arguments.

    Attributes: ``period`` (W(t + period) = W(t), 1 when static, None without one), ``sums`` (which sums of W are one:
    "doubly", "row", "column"), ``symmetric`` and ``nonnegative`` of every W(t), ``exchangeable`` (rounds are
    independent draws of a law that does not change when peers are permuted).
    """

    period: int | None = None
    sums = "doubly"
    symmetric = True
    nonnegative = True
    exchangeable = False

    def __init__(self, name: str, num_peers: int):
        self.name, self.num_peers = name, num_peers
        self._kept: OrderedDict[tuple, Entries] = OrderedDict()

    @abstractmethod
    def _entries(self, t: int, alive: np.ndarray | None) -> Entries:
        """Sparse W(t) among the peers of the mask ``alive`` (None: all)."""

    def _row(self, t: int, i: int, alive: np.ndarray | None) -> dict[int, float]:
        """Row i alone; sequences that can do it without the other rows override this."""
        return self.entries(t, alive).row(i)

    def _column(self, t: int, j: int, alive: np.ndarray | None) -> list[int]:
        """Who receives from j; for symmetric W, from whom j receives."""
        if self.symmetric:
            return [i for i in self._row(t, j, alive) if i != j]
        return self.entries(t, alive).column(j).tolist()

    def entries(self, t: int, alive=None) -> Entries:
        """Sparse W(t). The last few rounds are kept."""
        t, mask = self.check_round(t), alive_mask(alive, self.num_peers)
        key = (t % self.period if self.period else t, None if mask is None else mask.tobytes())
        if key not in self._kept:
            self._kept[key] = self._entries(t, mask)
            while len(self._kept) > max(KEPT, min(self.period or 0, 64) if self.num_peers <= WHOLE else 0):
                self._kept.popitem(last=False)
        return self._kept[key]

    def matrix(self, t: int, alive=None) -> np.ndarray:
        """W(t), float64 of shape (n, n); W[i, j] is what i gives to j's message. Who is not alive has w_ii = 1."""
        return self.entries(t, alive).dense()

    def neighbors(self, t: int, i: int, alive=None) -> dict[int, float]:
        """Row i of W(t): ascending ids, i itself among them, to non-zero weights. The same bits as in ``matrix``."""
        t, i, mask = self.check_round(t), self.check_peer(i), alive_mask(alive, self.num_peers)
        if self.num_peers <= WHOLE:
            return self.entries(t, mask).row(i)
        return self._row(t, i, mask) if mask is None or mask[i] else {i: 1.0}

    def receivers(self, t: int, j: int, alive=None) -> list[int]:
        """Ascending ids of the other peers whose row of W(t) gives weight to j: to whom j has to send."""
        t, j, mask = self.check_round(t), self.check_peer(j), alive_mask(alive, self.num_peers)
        if self.num_peers <= WHOLE:
            return self.entries(t, mask).column(j).tolist()
        return self._column(t, j, mask) if mask is None or mask[j] else []

    def graph(self, t: int) -> nx.Graph | nx.DiGraph:
        """The links of round t; an arc (u, v) of a directed graph means that u sends to v."""
        return self.entries(t).links.to_networkx()

    def eigenvalues(self, t: int) -> np.ndarray | None:
        """(n,) eigenvalues of W(t), that of the constant vector first, where a closed form is known; else None."""
        return None

    def law(self) -> Iterable[tuple[float, Entries]] | None:
        """All values of W with their probabilities, when rounds are independent draws from few values; else None."""
        return None

    def invariant_contraction(self) -> float | None:
        """rho of E[W^T W] = J + rho (I - J), the form it has when the law does not change as peers are permuted, where a
        closed form is known; else None."""
        return None

    def second_moment(self) -> np.ndarray | None:
        """E[W^T W], (n, n), where a closed form is known; else None."""
        rho = self.invariant_contraction()
        if rho is None:
            return None
        J = np.full((self.num_peers, self.num_peers), 1.0 / self.num_peers)
        return J + rho * (np.eye(self.num_peers) - J)

    def check_peer(self, i: int) -> int:
        if not 0 <= i < self.num_peers:
            raise ValueError(f"peer {i} is not one of 0..{self.num_peers - 1}")
        return int(i)

    @staticmethod
    def check_round(t: int) -> int:
        if t < 0 or int(t) != t:
            raise ValueError(f"round t must be an integer of at least 0, got {t}")
        return int(t)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, num_peers={self.num_peers})"


class GraphTopology(Topology):
    """Links from ``links(t)``, weights from a rule that is applied afresh to the links that are there."""

    def __init__(self, name: str, num_peers: int, rule: Rule):
        super().__init__(name, num_peers)
        if rule.check is not None:
            rule.check(num_peers)
        self.rule, self.sums, self.symmetric, self.nonnegative = rule, rule.sums, rule.symmetric, rule.nonnegative

    @abstractmethod
    def links(self, t: int) -> Links: ...

    def senders(self, t: int, i: int) -> np.ndarray:
        """Ascending ids of those that i receives from in round t; overridden where that needs no other peer's links."""
        return self.links(t).senders(i)

    def _entries(self, t, alive):
        return self.rule(self.links(t).among(alive))

    def _row(self, t, i, alive):
        if self.rule.link is None or self.rule.directed:
            return super()._row(t, i, alive)
        senders = self._there(t, i, alive)
        degrees = np.array([len(self._there(t, j, alive)) for j in senders], dtype=np.int64)
        return self.rule.local_row(i, senders, degrees)

    def _there(self, t, i, alive):
        senders = self.senders(t, int(i))
        return senders if alive is None else senders[alive[senders]]


class StaticTopology(GraphTopology):
    """The same links in every round."""

    period = 1

    def __init__(self, name: str, base: Links | Lattice, rule: Rule):
        super().__init__(name, base.num_peers, rule)
        if base.directed:
            rule.check_links(base.links)
        self.base = base

    def links(self, t):
        return self.base.links

    def senders(self, t, i):
        return self.base.senders(i)

    def eigenvalues(self, t):
        if not isinstance(self.base, Lattice) or self.rule.link is None or self.rule.name == "target":
            return None
        degree = len(self.base.steps)
        weight = float(self.rule.link(0, 1, degree, degree)) if degree else 0.0
        return 1.0 - degree * weight + weight * self.base.adjacency_eigenvalues()


class LazyTopology(Topology):
    """(I + W(t)) / 2 of another topology."""

    def __init__(self, inner: Topology):
        super().__init__(inner.name, inner.num_peers)
        self.inner, self.period, self.exchangeable = inner, inner.period, inner.exchangeable
        self.sums, self.symmetric, self.nonnegative = inner.sums, inner.symmetric, inner.nonnegative

    def _entries(self, t, alive):
        return halve(self.inner._entries(t, alive))

    def _row(self, t, i, alive):
        row = {j: w / 2 for j, w in self.inner._row(t, i, alive).items()}
        return dict(sorted({**row, i: (1.0 + 2 * row.get(i, 0.0)) / 2}.items()))

    def _column(self, t, j, alive):
        return self.inner._column(t, j, alive)

    def eigenvalues(self, t):
        closed = self.inner.eigenvalues(t)
        return None if closed is None else (1.0 + closed) / 2

    def law(self):
        law = self.inner.law()
        return None if law is None else ((probability, halve(entries)) for probability, entries in law)
