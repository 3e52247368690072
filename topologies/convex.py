"""Semidefinite programmes. Weight rules state them as their papers do, and cvxpy's solvers solve them.

cvxpy, Clarabel and SCS come with the extra ``topologies``; nothing else here needs them.
"""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np

from topologies.links import Links

INSTEAD = "take weights='best_constant' or 'metropolis'"
STEPS = 20_000  # of SCS
# What a weight or the sum of a row may be outside its limit by, when a solver stops.
SLACK = 1e-5


def require(wish: str) -> None:
    """ValueError that names the extra where a package is missing. ``wish``: what was asked for."""
    if not all(map(importlib.util.find_spec, ("cvxpy", "clarabel", "scs"))):
        raise ValueError(f"{wish} needs a convex solver, which is not installed: pip install 'dfl[topologies]'")


def solve(wish: str, objective, constraints: list, order: int, interior: int = 64, largest: int = 256, instead=INSTEAD) -> None:
    """Sets the variables of a cvxpy problem to its optimum.

    ``order``: rows of the largest matrix that has to be semidefinite. Up to ``interior`` Clarabel's interior points are
    tried: eight digits of the objective, in a time that grows with the sixth power. SCS splits the problem: six digits, and the
    third power for each of up to thousands of steps. Raises ValueError beyond ``largest``, and where neither finds an optimum.
    """
    import cvxpy

    if order > largest:
        raise ValueError(f"{wish} is too large a problem: a matrix of {order} rows, at most {largest} are taken; {instead}")
    problem = cvxpy.Problem(objective, constraints)
    # where the optimum leaves Clarabel too little room to move in, it gives up; SCS does not mind
    if not (order <= interior and _interior(problem) or _split(problem)):
        raise ValueError(f"{wish} was not found: the solver ended with {problem.status!r}; {instead}")


def _interior(problem) -> bool:
    # where rounding stops Clarabel short of 1e-9, 1e-7 will do
    limits = {f"tol_{name}": 1e-9 for name in ("gap_abs", "gap_rel", "feas")}
    limits |= {f"reduced_{name}": 1e-7 for name in limits}
    # one thread and one factorisation: the default of both depends on the machine, and so would the last bits
    return _run(problem, ("optimal", "optimal_inaccurate"), solver="CLARABEL", max_threads=1, direct_solve_method="qdldl", **limits)


def _split(problem) -> bool:
    return _run(problem, ("optimal",), solver="SCS", eps_abs=1e-8, eps_rel=1e-8, max_iters=STEPS)


def _run(problem, good: tuple[str, ...], **settings) -> bool:
    import cvxpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a solution is inaccurate, as the status says, too
        try:
            problem.solve(**settings)
        except cvxpy.SolverError:
            return False
    return problem.status in good


def laplacian(links: Links, weight):
    """sum_e w_e (e_i - e_j)(e_i - e_j)^T as an (n, n) expression of ``weight`` (edges,)."""
    import cvxpy
    from scipy import sparse

    (i, j), n = links.edges, links.num_peers
    edge, one = np.arange(len(i)), np.ones(len(i))
    place = np.concatenate([i * n + i, j * n + j, i * n + j, j * n + i]), np.tile(edge, 4)
    table = sparse.csc_matrix((np.concatenate([one, one, -one, -one]), place), shape=(n * n, len(i)))
    return cvxpy.reshape(table @ weight, (n, n), order="F")


def rows_to_one(links: Links, weight) -> list:
    """w >= 0, and at every peer a sum of at most one."""
    from scipy import sparse

    i, j = links.edges
    ends, edges = np.concatenate([i, j]), np.tile(np.arange(len(i)), 2)
    touches = sparse.csc_matrix((np.ones(len(ends)), (ends, edges)), shape=(links.num_peers, len(i)))
    return [weight >= 0, touches @ weight <= 1]


def within_rows(links: Links, weight: np.ndarray) -> np.ndarray:
    """A solution that is outside its limits by a solver's rounding, put back inside: W has no entry below zero."""
    (i, j), weight = links.edges, np.maximum(weight, 0.0)
    sums = np.bincount(np.concatenate([i, j]), weights=np.tile(weight, 2), minlength=links.num_peers)
    largest = max(1.0, float(sums.max()))
    assert largest < 1 + SLACK, largest
    return weight / largest
