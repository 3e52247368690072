"""A small interior-point solver: a linear objective under linear matrix inequalities.

The optimal weights of this package are semidefinite programmes with a few hundred unknowns at most; Newton's method
on the log-determinant barrier solves them to nine digits without a dependency (Boyd, Vandenberghe 2004, chapter 11).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Entries of the largest array the Hessian needs; beyond it the problem wants a first-order method.
LARGEST = 4e7


@dataclass(frozen=True, eq=False)
class Block:
    """F(x) = constant + sum_k x_k slopes[k], positive definite. Shapes (N, N) and (unknowns, N, N)."""

    constant: np.ndarray
    slopes: np.ndarray

    def at(self, x: np.ndarray) -> np.ndarray:
        return self.constant + np.tensordot(x, self.slopes, axes=1)


def minimise(cost, blocks: list[Block], A, b, x, gap: float = 1e-10) -> np.ndarray:
    """argmin cost @ x with every block positive definite and A x < b, from a strictly feasible x (unknowns,).

    The value is within ``gap`` of the optimum. Raises ValueError when the problem is too large.
    """
    if sum(block.slopes.size for block in blocks) > LARGEST:
        raise ValueError(f"optimal weights for {len(x)} links are too large a problem; take weights='best_constant'")
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
        step = -np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        decrement = -gradient @ step
        if decrement < 1e-9:
            break
        length, value = 1.0, _value(cost, blocks, A, b, x)
        while not _value(cost, blocks, A, b, x + length * step) <= value - 0.1 * length * decrement:
            length /= 2
            if length < 1e-12:  # rounding has eaten the descent: this is the centre
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
        products = np.linalg.inv(block.at(x)) @ block.slopes
        gradient = gradient - np.trace(products, axis1=1, axis2=2)
        flat = products.reshape(len(x), -1)
        hessian = hessian + flat @ products.transpose(0, 2, 1).reshape(len(x), -1).T
    return gradient, hessian
