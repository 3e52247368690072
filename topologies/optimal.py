"""Global weight rules: weights that are an optimum, or a fixed point, over the whole graph."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import numpy as np

from topologies import convex
from topologies.lanczos import laplacian_extremes
from topologies.links import Links
from topologies.mixing import Entries, Rule, as_numbers, complement


def best_constant() -> Rule:
    """W = I - alpha L with alpha = 2 / (lambda_2(L) + lambda_n(L)), on each component (Xiao, Boyd 2004)."""

    def solve(links, _):
        smallest, largest = laplacian_extremes(links)
        return _constant(links, 2.0 / (smallest + largest))

    return Rule("best_constant", solve=by_component(solve), nonnegative=False)


def laplacian() -> Rule:
    """W = I - 2 L / (3 lambda_max(L)): eigenvalues in [1/3, 1] (Ghiasvand, Alizadeh, Pedarsani 2025, arXiv 2501.15361)."""

    def solve(links):
        return _constant(links, 2.0 / (3.0 * laplacian_extremes(links)[1]) if len(links.sender) else 0.0)

    return Rule("laplacian", solve=solve)


def _constant(links: Links, alpha: float) -> Entries:
    weight = np.full(len(links.sender), alpha)
    return Entries(links, weight, complement(weight, links.receiver, links.num_peers))


def fdla() -> Rule:
    """Minimise ||W - J||_2 over symmetric W with W 1 = 1 on the graph (Xiao, Boyd 2004: fastest distributed averaging)."""
    convex.require("weights='fdla'")
    return Rule("fdla", solve=by_component(lambda links, _: _fastest("weights='fdla'", links)), nonnegative=False)


def fastest_mixing_chain() -> Rule:
    """FDLA with W >= 0 (Boyd, Diaconis, Xiao 2004)."""
    wish = "weights='fastest_mixing_chain'"
    convex.require(wish)
    return Rule("fastest_mixing_chain", solve=by_component(lambda links, _: _fastest(wish, links, nonnegative=True)))


def link_reliability(success=1.0) -> Rule:
    """Minimise lambda_max(E[W^T W] - J) when each message over a link arrives with probability p and else is replaced
    by the receiver's own: E[W^T W] = (I - sum p w L_e)^2 + sum 2 p (1 - p) w^2 L_e, W >= 0.

    ``success``: a number, or a symmetric (n, n) table of probabilities (Ye, Liang, Li 2021, arXiv 2108.02397).
    """
    convex.require("weights='link_reliability'")
    p = as_numbers("link_reliability", "success", success)
    if p.ndim not in (0, 2) or not ((p >= 0) & (p <= 1)).all() or (p.ndim == 2 and (p != p.T).any()):
        raise ValueError("weights='link_reliability' needs success: a probability or a symmetric (n, n) table of them")

    def check(num_peers):
        if p.ndim == 2 and len(p) != num_peers:
            raise ValueError(f"weights='link_reliability': success is {p.shape}, the topology has {num_peers} peers")

    def solve(links, members):
        i, j = (members[end] for end in links.edges)
        return _reliable(links, p[i, j] if p.ndim else np.full(len(i), p))

    return Rule("link_reliability", solve=by_component(solve), check=check)


def by_component(solve: Callable[[Links, np.ndarray], Entries]) -> Callable[[Links], Entries]:
    """``solve`` on each connected component alone, for an optimum over a disconnected graph has no meaning; it gets the
    component's links and the ids of its members in the whole network."""

    def solve_all(links: Links) -> Entries:
        label, place = links.components(), np.zeros(links.num_peers, dtype=np.int64)
        weight, diagonal = np.zeros(len(links.sender)), np.ones(links.num_peers)
        for root in np.unique(label[links.receiver]):
            members, arcs = np.flatnonzero(label == root), label[links.receiver] == root
            place[members] = np.arange(len(members))
            part = solve(Links(len(members), place[links.sender[arcs]], place[links.receiver[arcs]]), members)
            weight[arcs], diagonal[members] = part.weight, part.diagonal
        return Entries(links, weight, diagonal)

    return solve_all


def _assemble(links: Links, edge_weight: np.ndarray) -> Entries:
    i, j = links.edges
    table = np.zeros((links.num_peers, links.num_peers))
    table[i, j] = table[j, i] = edge_weight
    weight = table[links.receiver, links.sender]
    return Entries(links, weight, complement(weight, links.receiver, links.num_peers))


def _fastest(wish: str, links: Links, nonnegative: bool = False) -> Entries:
    """min s with -s I <= W - J <= s I, W = I - sum w_e L_e."""
    import cvxpy

    n, w, s = links.num_peers, cvxpy.Variable(len(links.edges[0])), cvxpy.Variable()
    distance = np.eye(n) - 1.0 / n - convex.laplacian(links, w)
    limits = [s * np.eye(n) - distance >> 0, s * np.eye(n) + distance >> 0]
    if nonnegative:
        limits += convex.rows_to_one(links, w)
    # where weights stop at zero, SCS takes long or does not come to an end
    convex.solve(wish, cvxpy.Minimize(s), limits, order=n, interior=64 if nonnegative else 32)
    return _assemble(links, convex.within_rows(links, w.value) if nonnegative else w.value)


def _reliable(links: Links, p: np.ndarray) -> Entries:
    """min s with s I + J - E[W^T W] >= 0, linear by u_e >= w_e^2 and a Schur complement of the square of E[W]."""
    import cvxpy

    n, m = links.num_peers, len(p)
    w, u, s = cvxpy.Variable(m), cvxpy.Variable(m), cvxpy.Variable()
    mean = np.eye(n) - convex.laplacian(links, cvxpy.multiply(p, w))
    spread = convex.laplacian(links, cvxpy.multiply(2 * p * (1 - p), u))
    square = cvxpy.bmat([[s * np.eye(n) + 1.0 / n - spread, mean], [mean, np.eye(n)]]) >> 0
    limits = [square, cvxpy.square(w) <= u, *convex.rows_to_one(links, w)]
    # SCS does not come to an end here: beyond 64 peers there is nothing to take
    convex.solve("weights='link_reliability'", cvxpy.Minimize(s), limits, order=2 * n, interior=128, largest=128)
    return _assemble(links, convex.within_rows(links, w.value))


def sinkhorn(affinity=None, own_affinity: float = 1.0) -> Rule:
    """Scales a non-negative matrix on the graph to row and column sums of one (Sinkhorn, Knopp 1967).

    ``affinity``: (n, n), its diagonal the self weights; without it, the numbers that came with the links, else ones,
    and ``own_affinity`` on the diagonal. Symmetric in, symmetric out: W = D M D.
    """
    table = None if affinity is None else as_numbers("sinkhorn", "affinity", affinity)
    if table is not None and (table.ndim != 2 or len(set(table.shape)) > 1 or not np.isfinite(table).all() or (table < 0).any()):
        raise ValueError("weights='sinkhorn' needs affinity: a square table of finite non-negative numbers")

    def check(num_peers):
        if table is not None and len(table) != num_peers:
            raise ValueError(f"weights='sinkhorn': affinity is {table.shape}, the topology has {num_peers} peers")

    def solve(links):
        own = np.full(links.num_peers, float(own_affinity)) if table is None else np.diag(table).copy()
        if table is not None:
            values = table[links.receiver, links.sender]
        else:
            values = np.ones(len(links.sender)) if links.affinity is None else links.affinity
        values = np.where(_on_cycles(links), values, 0.0)
        alone = np.bincount(links.receiver, weights=values, minlength=links.num_peers) == 0
        return _scale(Entries(links, values, np.where(alone, 1.0, own)))

    return Rule("sinkhorn", symmetric=False, directed=True, solve=solve, check=check)


def _on_cycles(links: Links) -> np.ndarray:
    """(arcs,) whether an arc lies on a directed cycle; one that does not is zero in every doubly stochastic matrix."""
    if not links.directed:
        return np.ones(len(links.sender), dtype=bool)
    label = np.zeros(links.num_peers, dtype=np.int64)
    for number, members in enumerate(nx.strongly_connected_components(links.to_networkx())):
        label[list(members)] = number
    return label[links.sender] == label[links.receiver]


def _scale(M: Entries) -> Entries:
    links, flipped = M.links, Entries(_reverse(M.links), M.weight, M.diagonal)
    rows = columns = np.ones(links.num_peers)
    for _ in range(20_000):
        with np.errstate(all="ignore"):
            # the root damps the step and keeps rows == columns when M is symmetric
            rows, columns = np.sqrt(rows / M.apply(columns)), np.sqrt(columns / flipped.apply(rows))
            error = np.abs(rows * M.apply(columns) - 1).max() + np.abs(columns * flipped.apply(rows) - 1).max()
        if not error > 1e-14:
            break
    if not error < 1e-11:
        raise ValueError(
            "weights='sinkhorn' cannot be satisfied: no matrix with these zeros has row and column sums of one; "
            "give every peer a self weight (own_affinity, or the diagonal of affinity)"
        )
    return Entries(links, rows[links.receiver] * M.weight * columns[links.sender], rows * M.diagonal * columns)


def _reverse(links: Links) -> Links:
    return Links(links.num_peers, links.receiver, links.sender, links.directed)
