"""A small interior-point solver: a linear objective under linear matrix inequalities.

The optimal weights of this package are semidefinite programmes with a few hundred unknowns at most; Newton's method
on the log-determinant barrier solves them to nine digits without a dependency (Boyd, Vandenberghe 2004, chapter 11).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Entries of the largest array the Hessian needs; beyond it the problem wants a first-order method.
LARGEST = 4e6


@dataclass(frozen=True, eq=False)
class Block:
    """F(x) = constant + sum_k x_k slopes[k], positive definite. Shapes (N, N) and (unknowns, N, N)."""

    constant: np.ndarray
    slopes: np.ndarray

    @property
    def cost(self) -> int:
        return self.slopes.size

    def at(self, x: np.ndarray) -> np.ndarray:
        return self.constant + np.tensordot(x, self.slopes, axes=1)

    def derivatives(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and Hessian of -logdet F."""
        products = np.linalg.inv(self.at(x)) @ self.slopes
        flat = products.reshape(len(x), -1)
        return -np.trace(products, axis1=1, axis2=2), flat @ products.transpose(0, 2, 1).reshape(len(x), -1).T


@dataclass(frozen=True, eq=False)
class EdgeBlock:
    """F(w, s) = constant + sign sum_e w_e b_e b_e^T + s I with b_e a row of ``ends`` (edges, n): slopes of rank one, so
    that the Hessian is the elementwise square of one small product."""

    constant: np.ndarray
    ends: np.ndarray
    sign: float

    @property
    def cost(self) -> int:
        return 4 * len(self.ends) ** 2

    def at(self, x: np.ndarray) -> np.ndarray:
        return self.constant + self.sign * (self.ends.T * x[:-1]) @ self.ends + x[-1] * np.eye(len(self.constant))

    def derivatives(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and Hessian of -logdet F."""
        inverse = np.linalg.inv(self.at(x))
        half = self.ends @ inverse
        across, spread = half @ self.ends.T, self.sign * (half**2).sum(axis=1)
        hessian = np.block([[across**2, spread[:, None]], [spread[None], np.array([[(inverse**2).sum()]])]])
        return -np.append(self.sign * np.diag(across), np.trace(inverse)), hessian


def minimise(cost, blocks: list[Block | EdgeBlock], A, b, x, gap: float = 1e-9) -> np.ndarray:
    """argmin cost @ x with every block positive definite and A x < b, from a strictly feasible x (unknowns,).

    The value is within ``gap`` of the optimum. Raises ValueError when the problem is too large.
    """
    if max(block.cost for block in blocks) > LARGEST:
        raise ValueError(f"optimal weights for {len(x) - 1} links are too large a problem; take weights='best_constant'")
    barriers, sharpness = sum(len(block.constant) for block in blocks) + len(b), 1.0
    while True:
        x = _centre(sharpness * np.asarray(cost), blocks, A, b, x)
        if barriers / sharpness < gap:
            return x
        sharpness *= 20.0


def _centre(cost, blocks, A, b, x) -> np.ndarray:
    """Newton's method on cost @ x - sum logdet F(x) - sum log(b - A x)."""
    for _ in range(60):
        gradient, hessian = _derivatives(cost, blocks, A, b, x)
        step = -_solve(hessian, gradient)
        decrement = -gradient @ step
        if decrement < 1e-6:  # of the barrier: the objective is then within 1e-6 / sharpness of the centre
            break
        length, value = 1.0, _value(cost, blocks, A, b, x)
        while not _value(cost, blocks, A, b, x + length * step) <= value - 0.1 * length * decrement:
            length /= 2
            if length < 1e-6:  # rounding has eaten the descent: this is the centre
                return x
        x = x + length * step
    return x


def _value(cost, blocks, A, b, x) -> float:
    slack = b - A @ x
    if (slack <= 0).any():
        return np.inf
    value = cost @ x - np.log(slack).sum()
    for block in blocks:
        try:
            value -= 2 * np.log(np.diag(np.linalg.cholesky(block.at(x)))).sum()
        except np.linalg.LinAlgError:
            return np.inf
    return value


def _derivatives(cost, blocks, A, b, x) -> tuple[np.ndarray, np.ndarray]:
    pull = 1.0 / (b - A @ x)
    gradient, hessian = cost + A.T @ pull, (A.T * pull**2) @ A
    for block in blocks:
        more_gradient, more_hessian = block.derivatives(x)
        gradient, hessian = gradient + more_gradient, hessian + more_hessian
    return gradient, hessian


def _solve(hessian: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(hessian, gradient)
    except np.linalg.LinAlgError:  # flat directions
        return np.linalg.lstsq(hessian, gradient, rcond=None)[0]
