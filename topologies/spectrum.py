"""How fast a mixing matrix, or a sequence of them, brings peers to agreement. Dense up to 800 peers, sparse beyond."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from topologies.lanczos import DENSE, sparse_slem
from topologies.mixing import Entries
from topologies.topology import Topology

# Below it, a distance from J is rounding.
EXACT = 1e-10
# Operations an exact mean over a period may cost before it is sampled instead.
AFFORDABLE = 5e10


def eigenvalues(W) -> np.ndarray:
    """(n,) eigenvalues of W, that of the constant vector first. W: an array, sparse ``Entries`` or a static Topology."""
    if isinstance(W, Topology):
        closed = W.eigenvalues(0)
        return eigenvalues(W.matrix(0)) if closed is None else closed
    W = W.dense() if isinstance(W, Entries) else np.asarray(W, dtype=np.float64)
    deviation = W - 1.0 / len(W)
    symmetric = np.abs(deviation - deviation.T).max() < 1e-13
    rest = np.linalg.eigvalsh(deviation) if symmetric else np.linalg.eigvals(deviation)
    trivial = np.abs(rest).argmin()  # the constant vector's eigenvalue in W - J is zero
    return np.concatenate([[1.0], np.delete(rest, trivial)])


def slem(W) -> float:
    """Second largest eigenvalue modulus, max |eig(W - J)|; 0 for n = 1. W as in ``eigenvalues``.

    >>> slem([[0.75, 0.25], [0.25, 0.75]])
    0.5
    """
    closed = W.eigenvalues(0) if isinstance(W, Topology) else None
    if closed is None and isinstance(W, Topology | Entries):
        entries = W.entries(0) if isinstance(W, Topology) else W
        if entries.links.num_peers > DENSE:
            return sparse_slem(entries, symmetric=not entries.links.directed)
        W = entries
    rest = (eigenvalues(W) if closed is None else closed)[1:]
    return float(np.abs(rest).max(initial=0.0))


def spectral_gap(W) -> float:
    """1 - SLEM."""
    return 1.0 - slem(W)


class Estimate(NamedTuple):
    """A number, its standard error (0 when exact), and how it was found."""

    value: float
    standard_error: float
    how: str


def contraction(topology: Topology, rounds: int = 200) -> float:
    """``||E[W^T W] - J||_2``: E|x - mean|^2 shrinks at least by this factor a round. See ``contraction_estimate``."""
    return contraction_estimate(topology, rounds).value


def contraction_estimate(topology: Topology, rounds: int = 200) -> Estimate:
    """``||E[W^T W] - J||_2``, exactly where the law of W allows it, else from ``rounds`` sampled rounds.

    Exact: static and periodic topologies (mean over the period), laws with a closed form or few values. Sampled: by the
    trace identity (E|W|_F^2 - 1) / (n - 1) if the law does not change when peers are permuted (unbiased); else the norm
    of the mean over rounds, corrected for its upward bias by the jackknife.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    invariant = topology.invariant_contraction()
    if invariant is not None:
        return Estimate(invariant, 0.0, "closed form")
    closed = topology.second_moment()
    if closed is not None:
        return Estimate(distance(closed), 0.0, "closed form")
    if topology.period == 1 and topology.symmetric and topology.num_peers > DENSE:
        return Estimate(slem(topology) ** 2, 0.0, "SLEM squared")
    if topology.period and topology.period * topology.num_peers**3 < AFFORDABLE:
        return Estimate(distance(_mean_square(topology, range(topology.period))), 0.0, "mean over the period")
    law = topology.law()
    if law is not None:
        return Estimate(distance(sum(p * square(entries.dense()) for p, entries in law)), 0.0, "all outcomes")
    return _by_trace(topology, rounds) if topology.exchangeable else _by_jackknife(topology, rounds)


def square(W: np.ndarray) -> np.ndarray:
    return W.T @ W


def distance(second_moment: np.ndarray) -> float:
    """||E[W^T W] - J||_2."""
    return float(np.linalg.norm(second_moment - 1.0 / len(second_moment), 2))


def _mean_square(topology: Topology, rounds) -> np.ndarray:
    total = np.zeros((topology.num_peers, topology.num_peers))
    for t in rounds:
        total += square(topology.matrix(t))
    return total / len(rounds)


def _by_trace(topology: Topology, rounds: int) -> Estimate:
    entries = [topology.entries(t) for t in range(rounds)]
    traces = np.array([(e.weight**2).sum() + (e.diagonal**2).sum() for e in entries])
    values = (traces - 1.0) / max(1, topology.num_peers - 1)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(rounds)), f"trace identity, {rounds} rounds")


def _by_jackknife(topology: Topology, rounds: int) -> Estimate:
    parts = [part for part in np.array_split(np.arange(rounds), 20) if len(part)]
    means, sizes = [_mean_square(topology, part) for part in parts], [len(part) for part in parts]
    total = sum(m * size for m, size in zip(means, sizes, strict=True))
    without = np.array([distance((total - m * s) / (rounds - s)) for m, s in zip(means, sizes, strict=True)])
    blocks, whole = len(parts), distance(total / rounds)
    value = blocks * whole - (blocks - 1) * without.mean()
    error = math.sqrt((blocks - 1) * without.var())
    return Estimate(float(value), error, f"jackknife, {rounds} rounds")


def product_log_norm(topology: Topology, rounds: int, start: int = 0) -> float:
    """log ||(I - J) W(start + rounds - 1) .. W(start) (I - J)||_2, -inf when that is rounding.

    The product is rescaled every round, so thousands of rounds do not underflow.
    """
    n, scale = topology.num_peers, 0.0
    deviation = np.eye(n) - 1.0 / n
    for t in range(start, start + rounds):
        deviation = topology.entries(t).apply(deviation) if n > 64 else topology.matrix(t) @ deviation
        deviation -= deviation.mean(axis=0)
        size = np.linalg.norm(deviation)
        if size < EXACT:  # relative to the last round: consensus is exact
            return -math.inf
        deviation /= size
        scale += math.log(size)
    return scale + math.log(np.linalg.norm(deviation, 2))


def product_rate(topology: Topology, rounds: int = 200) -> float:
    """``||W(T-1) .. W(0) - J||_2 ^ (1/T)``: the worst-case shrinking of |x - mean| a round; 0 for exact consensus."""
    return math.exp(product_log_norm(topology, rounds) / rounds)


def cycle_rate(topology: Topology) -> float:
    """Spectral radius of W(T-1) .. W(0) - J over one period T, to the power 1/T: the long-run rate of a periodic one."""
    product = np.eye(topology.num_peers)
    for t in range(topology.period):
        product = topology.matrix(t) @ product
    return slem(product) ** (1.0 / topology.period)


class FiniteTime(NamedTuple):
    """Exact consensus: after ``rounds`` from round 0, and whether as many rounds do it from every start of the period."""

    rounds: int
    period: int | None
    from_any_start: bool


def finite_time(topology: Topology, max_rounds: int | None = None) -> FiniteTime | None:
    """The least T with ||W(T-1) .. W(0) - J|| < 1e-10, or None up to ``max_rounds`` (the period, or 2 log2 n + 4)."""
    n, period = topology.num_peers, topology.period
    limit = max_rounds or max(period or 0, 2 * math.ceil(math.log2(n)) + 4 if n > 1 else 1)
    if max_rounds is None and limit * n**3 > AFFORDABLE:
        limit = 2 * math.ceil(math.log2(n)) + 4
    rounds = next((T for T, distance in enumerate(_deviations(topology, 0, limit), 1) if distance < EXACT), None)
    if rounds is None:
        return None
    every = period is not None and all(_averages(topology, s, rounds) for s in range(1, period))
    return FiniteTime(rounds, period, every)


def _averages(topology: Topology, start: int, rounds: int) -> bool:
    return any(distance < EXACT for distance in _deviations(topology, start, rounds))


def _deviations(topology: Topology, start: int, rounds: int):
    """||W(start + T - 1) .. W(start) - J||_F for T = 1, 2, .. rounds."""
    deviation = np.eye(topology.num_peers) - 1.0 / topology.num_peers
    for t in range(start, start + rounds):
        deviation = topology.matrix(t) @ deviation
        yield np.linalg.norm(deviation)


def effective_neighbors(W, decay: float) -> float:
    """(1 / (1 - g)) / mean_k(lam_k^2 / (1 - g lam_k^2)), g = ``decay`` in [0, 1): with how many peers one averages
    while older values fade by g a round (Vogels et al. 2022, arXiv 2206.03093). For symmetric W."""
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    squared = np.abs(eigenvalues(W)) ** 2
    return float(1.0 / (1.0 - decay) / np.mean(squared / (1.0 - decay * squared)))


def mixing_time(W, tolerance: float = 1e-3) -> float:
    """ln(n / tolerance) / (1 - SLEM): rounds after which every start is within ``tolerance`` of agreement."""
    n = W.num_peers if isinstance(W, Topology) else W.links.num_peers if isinstance(W, Entries) else len(W)
    gap = spectral_gap(W)
    return math.log(n / tolerance) / gap if gap > EXACT else math.inf
