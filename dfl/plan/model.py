"""How many rounds to a target, from what a few rounds have shown. Numbers only; more is better (a loss has its sign turned).

**Learning.** The consensus model's metric over local steps s is a_c(s) = a_0 + (a_inf - a_0) (1 - exp(-(s / tau)^p)), a
saturating curve that may begin slowly (p > 1) or go on for long (p < 1). A few noisy points do not fix tau, p and a_inf, so
that all curves of a grid of (tau, p) stay, each with its best a_inf and the weight that its errors leave it (`fit_curve`);
the prediction is their weighted median, its range the middle 80 % of the weight. What no curve of the family knows, the probe
itself tells: from its first points its later ones are predicted, and how far the steps to them were off, for as much further
as they lie, widens the range (`foresight`).

**Disagreement.** x_i, the deviation of peer i's product from the mean of all, answers training linearly: in a local phase
it moves by

    u_i(t) = phi u_i(t-1) - beta x_i(t) + xi_i(t),    x(t+1) = W(t) (x(t) + u(t)),

with xi independent over peers and rounds. phi: peers with other data pull the same way round after round; beta: what a peer
has been told away from its own data it partly takes back. `response` finds phi, beta and E|xi|^2 by least squares;
`disagreement` follows the covariances of x and u through the matrices W(t) themselves, so that Xi^2(t) = mean_i |x_i|^2 is
exact for this model under every sequence of graphs. For phi = beta = 0 it is Xi^2 <- rho (Xi^2 + d^2) with rho =
E|(W - J) v|^2 (`contraction`), rho / (1 - rho) d^2 in the long run; for a symmetric W, the same in every round, and beta = 0
each eigenvalue l adds l^2 (1 + l phi) / ((1 - l^2) (1 - l phi)) times the drift in its direction (`in_the_long_run`).

**Cost.** A peer's own model is worse than the consensus by what the disagreement costs, a_p - a_0 = (a_c - a_0)
exp(-kappa Xi^2): for a little of it a_c - a_p = kappa (a_c - a_0) Xi^2, linear in Xi^2 as a smooth loss has it, and never
below the start (`fit_cost`).

Taken for granted: the consensus learns as fast per local step on every graph, under every codec and trigger, so that these
matter by disagreement, bytes and seconds alone; the drift of rounds that nobody has seen is that of the last third of those
measured; a metric rises by a curve of the family. It fails where a graph is so sparse, or data so skewed, that the mean of
the factors stops being a good model; where learning rates change much after the probe; for metrics that wait long before
they rise; and for methods that change what they do in the course of a run.

Sources: decentralised SGD's recursion for the distance to consensus: Koloskova, Loizou, Boreiri, Jaggi, Stich 2020, arXiv
2003.10422; random matrices: Boyd, Ghosh, Prabhakar, Shah 2006 (Randomized gossip algorithms). Drift with a memory, the
weights of curves and the bounded cost are ours.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

SHAPES = (0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)  # p
RANGE = (0.1, 0.9)  # of the weight of all curves
_SLOWEST = 10  # the largest time constant, in probes
_FIRST = 4  # points from which others are predicted at least, the start among them
_NORMAL = NormalDist().inv_cdf(RANGE[1])  # standard deviations to either side that hold RANGE of a normal distribution
_FINEST = 1e-3  # errors below this share of what a curve rises by are none: no curve is so exact


class Curve(NamedTuple):
    """Curves of one start, with their weights: end, tau, shape, weight (K,). seen: the steps that they were fitted to."""

    start: float
    end: np.ndarray
    tau: np.ndarray
    shape: np.ndarray
    weight: np.ndarray
    seen: float

    def at(self, steps: np.ndarray) -> np.ndarray:
        """(K, T) at steps (T,)."""
        return self.start + (self.end - self.start)[:, None] * _risen(steps, self.tau, self.shape)

    def steps_to(self, value: float) -> np.ndarray:
        """The steps to a value above the start, (K,); inf where a curve ends below."""
        rise = self.end - self.start
        share = np.divide(value - self.start, rise, out=np.full_like(rise, np.inf), where=rise > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(share < 1, self.tau * (-np.log1p(-share)) ** (1 / self.shape), np.inf)

    def reaches(self, target: float) -> float:
        """The weight of the curves whose end is beyond the target."""
        return float(self.weight[self.end > target].sum())


def foresight(steps: Sequence[float], values: Sequence[float], best: float = math.inf) -> float:
    """How far predictions from the first half of the points, or more of them, were off at the later ones: the root mean square of
    log(predicted over true steps), over that of log(true steps over those that were fitted). 0 where there are too few points.

    A prediction `f` times as far as what was measured is taken to be off by a factor of exp(foresight log f), one standard deviation.
    Only points above all that were fitted count; a curve that never comes there is off by the slowest of `fit_curve`.
    """
    off, ahead = 0.0, 0.0
    for known in range(max(_FIRST, len(steps) // 2), len(steps)):
        curve = fit_curve(steps[:known], values[:known], best)
        for step, value in zip(steps[known:], values[known:], strict=True):
            if value > max(values[:known]):
                predicted = _quantile(curve.steps_to(value), curve.weight, 0.5)
                off += math.log(min(predicted, _SLOWEST * step) / step) ** 2
                ahead += math.log(step / steps[known - 1]) ** 2
    return math.sqrt(off / ahead) if ahead else 0.0


def _risen(steps: np.ndarray, tau: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return 1 - np.exp(-(np.asarray(steps, dtype=float)[None] / tau[:, None]) ** shape[:, None])


def fit_curve(steps: Sequence[float], values: Sequence[float], best: float = math.inf) -> Curve:
    """The curves through (steps, values), the first of which is the start, at 0 steps. best: no end lies beyond it.

    ValueError for fewer than three points.
    """
    if len(steps) < 3 or steps[0] != 0:
        raise ValueError(f"a curve needs its start and two more points, got steps {list(steps)}; allowed: a longer probe, or "
                         "evaluations more often")
    s, rise = np.asarray(steps[1:], dtype=float), np.asarray(values[1:], dtype=float) - values[0]
    taus = np.geomspace(s[0] / 4, _SLOWEST * s[-1], 80)
    tau, shape = (grid.ravel() for grid in np.meshgrid(taus, SHAPES, indexing="ij"))
    form = _risen(s, tau, shape)
    height = np.clip((form * rise).sum(1) / np.maximum((form**2).sum(1), 1e-300), 0.0, max(0.0, best - values[0]))
    errors = ((rise - height[:, None] * form) ** 2).sum(1) + len(s) * (_FINEST * max(np.abs(rise).max(), 1e-12)) ** 2
    weight = (errors / errors.min()) ** (-(len(s) - 1) / 2)  # with the variance of errors and the height integrated out
    return Curve(float(values[0]), values[0] + height, tau, shape, weight / weight.sum(), float(s[-1]))


class Moments(NamedTuple):
    """Of one round, means over peers of inner products of deviations from the mean: the drift u, the drift v of the round
    before (nothing in the first), and x at the start of the round."""

    uu: float
    uv: float
    ux: float
    vv: float
    vx: float
    xx: float


class Response(NamedTuple):
    """phi, beta, and E|xi|^2 of each measured round; later ones have the mean of the last third."""

    phi: float
    beta: float
    noise: tuple[float, ...]

    def noise_at(self, t: int) -> float:
        return self.noise[t] if t < len(self.noise) else float(np.mean(self.noise[-max(1, len(self.noise) // 3):]))


def response(moments: Sequence[Moments]) -> Response:
    """Least squares over all rounds but the first, phi and beta kept within [0, 0.99] and [0, 1]."""
    _, uv, ux, vv, vx, xx = np.sum(moments[1:], axis=0) if len(moments) > 1 else np.zeros(6)
    both, least = np.array([[vv, vx], [vx, xx]]), 1e-9 * (vv + xx)
    phi, beta = np.linalg.solve(both, [uv, ux]) * [1, -1] if np.linalg.det(both) > least**2 else (0.0, 0.0)
    if phi < 0 or not 0 <= beta <= 1:  # at an edge the other is fitted alone
        beta = float(np.clip(-ux / xx, 0, 1)) if phi < 0 and xx > least else float(np.clip(beta, 0, 1))
        phi = 0.0 if phi < 0 or vv <= least else (uv + beta * vx) / vv
    phi = float(np.clip(phi, 0, 0.99))
    left = [m.uu - 2 * (phi * m.uv - beta * m.ux) + phi**2 * m.vv - 2 * phi * beta * m.vx + beta**2 * m.xx for m in moments]
    return Response(phi, float(beta), tuple(max(0.0, float(one)) for one in left))


def disagreement(matrix: Callable[[int], np.ndarray], num_peers: int, answer: Response, rounds: int,
                 period: int | None = None) -> np.ndarray:
    """Xi^2 after the mix of each round, (rounds,). matrix(t): W(t), rows summing to one.

    Computed until it repeats itself, for graphs of a `period`; for others, over at most 200 rounds more than were measured. What
    follows is the mean of the last half of those.
    """
    J = np.full((num_peers, num_peers), 1.0 / num_peers)
    P = np.eye(num_peers) - J
    phi, beta, found = answer.phi, answer.beta, []
    xx, xu, uu = np.zeros_like(P), np.zeros_like(P), np.zeros_like(P)
    for t in range(min(rounds, len(answer.noise) + 200)):
        # from E[x x'], E[x v'], E[v v'] with the drift v of the round before to those with u = phi v - beta x + xi
        noise = answer.noise_at(t) * num_peers / max(1, num_peers - 1) * P
        uu = phi**2 * uu + beta**2 * xx - phi * beta * (xu + xu.T) + noise
        xu = phi * xu - beta * xx
        W = P @ matrix(t)
        trained = xx + xu + xu.T + uu
        xu = W @ (xu + uu)  # E[x(t+1) u(t)']
        xx = W @ trained @ W.T
        found.append(float(np.trace(xx)) / num_peers)
        back = t - period if period and t >= len(answer.noise) + period else None
        if back is not None and abs(found[t] - found[back]) <= 1e-9 * found[t]:
            break
    last = found[-period:] if period and len(found) < rounds else found[-max(1, len(found) // 2):]
    return np.array(found + [float(np.mean(last))] * (rounds - len(found)))


def in_the_long_run(eigenvalues: Iterable[float], phi: float, drift: float) -> float:
    """Xi^2 after many rounds of a symmetric W with these eigenvalues, that of the constant vector left out, when beta = 0 and
    mean_i |u_i|^2 = `drift`, of which each eigenvector has an equal share."""
    each = np.asarray(list(eigenvalues), dtype=float)
    return float(np.mean(each**2 * (1 + each * phi) / ((1 - each**2) * (1 - each * phi))) * drift)


def contraction(matrices: Sequence[np.ndarray]) -> float:
    """rho = E|(W - J) v|^2 over rounds and over random v of length one with sum zero."""
    n = len(matrices[0])
    P = np.eye(n) - 1.0 / n
    return float(np.mean([np.square(P @ W @ P).sum() for W in matrices]) / max(1, n - 1))


def fit_cost(start: float, consensus: Sequence[float], peers: Sequence[float], distances: Sequence[float]) -> float:
    """kappa of a_p - a_0 = (a_c - a_0) exp(-kappa Xi^2) by least squares, at least zero. One value of each for every evaluation."""
    c, p, xi = (np.asarray(one, dtype=float) for one in (consensus, peers, distances))
    if not len(xi) or xi.max() <= 0:
        return 0.0
    tried = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, 400) / xi.mean()])
    errors = ((p - start)[None] - (c - start)[None] * np.exp(-tried[:, None] * xi[None])) ** 2
    return float(tried[errors.sum(1).argmin()])


class Reach(NamedTuple):
    """Rounds to the target, and the range of RANGE; inf: not reached. best: the median of what is come to in the end."""

    rounds: float
    low: float
    high: float
    best: float


def reach(curve: Curve, kappa: float, distances: np.ndarray, local_steps: float, target: float, error: float = 0.0) -> Reach:
    """The first round after which the mean over peers is at the target. distances: Xi^2 after each round, (T,); error: the probe's
    `foresight`, which widens the range where the target lies beyond what was measured."""
    steps = local_steps * np.arange(1, len(distances) + 1)
    values = curve.start + (curve.at(steps) - curve.start) * np.exp(-kappa * distances)[None]
    there = values >= target
    first = np.where(there.any(1), there.argmax(1) + 1.0, math.inf)
    low, high = (_quantile(first, curve.weight, share) for share in RANGE)
    middle = _quantile(first, curve.weight, 0.5)
    if math.isfinite(middle):
        low, high = widened(middle, low, high, error, middle * local_steps / curve.seen)
    return Reach(middle, low, high, _quantile(values.max(1), curve.weight, 0.5))


def widened(middle: float, low: float, high: float, error: float, ahead: float) -> tuple[float, float]:
    """The range of rounds with the probe's own error, `ahead` times as far as it saw; both are taken to be independent. What was seen
    had not come to the target."""
    more = _NORMAL * error * math.log(max(1.0, ahead))
    if more == 0:
        return low, high
    return (max(middle / ahead, math.floor(middle * math.exp(-math.hypot(math.log(middle / low), more)))),
            math.ceil(middle * math.exp(math.hypot(math.log(high / middle), more))) if math.isfinite(high) else high)


def _quantile(values: np.ndarray, weight: np.ndarray, share: float) -> float:
    order = np.argsort(values, kind="stable")
    place = np.searchsorted(np.cumsum(weight[order]), share * weight.sum())
    return float(values[order[min(place, len(order) - 1)]])
