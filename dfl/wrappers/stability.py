"""Whether what a wrapper remembers makes disagreement grow: its recursion without gradients over the run's own W(t).

Steps that are small against everything else leave a linear recursion; if that grows, no learning rate saves the run.
"""

from collections.abc import Callable

import numpy as np

ROUNDS = 200
TOLERANCE = 1.004  # a root on the unit circle, in the second half of so many rounds
Mix = Callable[[np.ndarray], np.ndarray]
Recursion = Callable[[Mix, int, np.ndarray], np.ndarray]


def growth(topology, recursion: Recursion, parts: int, rounds: int = ROUNDS) -> float:
    """The factor by which disagreement grows per round in the end, over W(0) ... W(rounds - 1).

    recursion(mix, t, state (parts, n, k)) -> state, linear, mix(v (n, k)) = W(t) v. Begins at random, the same
    numbers at every process; means over the peers are taken off, which gradients govern.
    """
    state = np.random.default_rng(0).standard_normal((parts, topology.num_peers, 2))
    logs = np.zeros(rounds)
    there = getattr(topology, "there", None)  # of peers that come and go: who is away stays as it is
    for t in range(rounds):
        before, state = state, recursion(mixing(topology, t), t, state)
        if there is not None:
            state = np.where(there(t)[:, None], state, before)
        state = state - state.mean(1, keepdims=True)
        size = float(np.linalg.norm(state))
        if size < 1e-290:  # nothing is left of it
            return 0.0
        logs[t] = np.log(size)
        state = state / size
    return float(np.exp(logs[rounds // 2:].mean()))


def mixing(topology, t: int) -> Mix:
    """v -> W(t) v, sparse where the topology is ours."""
    if hasattr(topology, "entries"):
        return topology.entries(t).apply
    w = np.asarray(topology.matrix(t))
    return lambda values: w @ values


def name_of(topology) -> str:
    return getattr(topology, "name", "given")


def smallest_eigenvalue(topology) -> float | None:
    """Of a W that is symmetric and the same in every round; None for any other."""
    if getattr(topology, "period", None) != 1:
        return None
    w = np.asarray(topology.matrix(0))
    return float(np.linalg.eigvalsh(w)[0]) if np.allclose(w, w.T, rtol=0, atol=1e-12) else None


def mean_square(momentum: float, gain: float, mean: float, square: float) -> float:
    """The factor per round of the mean square of x under outer steps m <- momentum m + gain (W - I) x, x <- x + m.

    W are independent, with E[W] = mean I and E[W^T W] = square I where the network mean is taken off.
    """
    # moments (E|x|^2, E<x, m>, E|m|^2): p = E<x, (W - I) x>, s = E|(W - I) x|^2, both per E|x|^2
    p, s = mean - 1, square - 2 * mean + 1
    after_m = np.array([gain ** 2 * s, 2 * momentum * gain * p, momentum ** 2])
    cross = np.array([gain * p, momentum, 0.0])
    table = np.stack([np.array([1.0, 0.0, 0.0]) + 2 * cross + after_m, cross + after_m, after_m])
    return float(np.abs(np.linalg.eigvals(table)).max())


def moments(topology, rounds: int = ROUNDS) -> tuple[float, float]:
    """(mean, square) of `mean_square` for a law of W(t) that does not change as peers are permuted, from its first
    rounds."""
    num = topology.num_peers
    matrices = [topology.matrix(t) for t in range(rounds)]
    trace, size = np.mean([np.trace(w) for w in matrices]), np.mean([np.square(w).sum() for w in matrices])
    return float(trace - 1) / (num - 1), float(size - 1) / (num - 1)
