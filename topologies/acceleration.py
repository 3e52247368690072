"""Accelerated gossip inside one round: K products with a fixed W that agree faster than W^K.

For one W and one round only: iterates overshoot on the way, so never across optimiser steps or a changing W. All keep
the mean exactly at every step, for W with column sums of one. ``lam`` is the SLEM of W, or a guess of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Apply = Callable[[np.ndarray], np.ndarray]


def chebyshev(apply: Apply, x: np.ndarray, steps: int, lam: float) -> np.ndarray:
    """T_K(W / lam) / T_K(1 / lam) x, the best polynomial of degree K: what is left is at most 1 / T_K(1 / lam).

    ``apply(x)`` is W x, symmetric. Shapes (n, ...) in and out (Auzinger 2011; Scaman et al. 2017, arXiv 1702.08704).

    >>> import numpy as np
    >>> W = np.array([[0.75, 0.25], [0.25, 0.75]])
    >>> chebyshev(lambda x: W @ x, np.array([0.0, 1.0]), 1, 0.5).round(12).tolist()
    [0.25, 0.75]
    """
    if steps == 0 or lam == 0.0:
        return apply(x) if steps else x
    before, now, ratio = x, apply(x), lam  # ratio: T_{k-1}(1 / lam) / T_k(1 / lam)
    for _ in range(steps - 1):
        after = 1.0 / (2.0 / lam - ratio)
        before, now = now, (2.0 / lam) * after * apply(now) - ratio * after * before
        ratio = after
    return now


def fast_mix(apply: Apply, x: np.ndarray, steps: int, lam: float, first_step: bool = False) -> np.ndarray:
    """x_{k+1} = (1 + e) W x_k - e x_{k-1}, e = (1 - sqrt(1 - lam^2)) / (1 + sqrt(1 - lam^2)) (Liu, Morse 2011).

    From x_{-1} = x_0, or with ``first_step`` from x_1 = W x_0. Constant coefficients: forgiving when lam is a guess.
    """
    root = math.sqrt(1.0 - lam**2)
    e = (1.0 - root) / (1.0 + root)
    before, now = (x, apply(x)) if first_step and steps else (x, x)
    for _ in range(steps - (1 if first_step and steps else 0)):
        before, now = now, (1.0 + e) * apply(now) - e * before
    return now


def muffliato(apply: Apply, x: np.ndarray, steps: int, lam: float) -> np.ndarray:
    """x_1 = W x, x_{k+1} = g W x_k + (1 - g) x_{k-1}, g = 2 (1 - sqrt(l (1 - l/4))) / (1 - l/2)^2, l = 1 - lambda_2
    (Cyffers et al. 2022, arXiv 2206.05091). ``lam`` is lambda_2 here."""
    gap = 1.0 - lam
    g = 2.0 * (1.0 - math.sqrt(gap * (1.0 - gap / 4.0))) / (1.0 - gap / 2.0) ** 2
    before, now = (x, apply(x)) if steps else (x, x)
    for _ in range(steps - 1):
        before, now = now, g * apply(now) + (1.0 - g) * before
    return now


ACCELERATIONS: dict[str, Callable[..., np.ndarray]] = {"chebyshev": chebyshev, "fast_mix": fast_mix, "muffliato": muffliato}


def accelerate(apply: Apply, x: np.ndarray, steps: int, lam: float, method: str = "chebyshev") -> np.ndarray:
    """``steps`` accelerated gossip steps by the named method."""
    if method not in ACCELERATIONS:
        raise ValueError(f"acceleration {method!r} is not known; known: {', '.join(ACCELERATIONS)}")
    if steps < 0 or not 0 <= lam < 1:
        raise ValueError(f"acceleration needs steps of at least 0 and lam in [0, 1), got steps={steps}, lam={lam}")
    return ACCELERATIONS[method](apply, x, steps, lam)
