"""The step size gamma of a mix of what a codec lets through: found, or checked."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch

GRID = 0.8 ** np.arange(48)  # what is tried: 1 ... 3e-5
UNKNOWN = (-1.0, 0.9)  # eigenvalues where the graph changes or is too large to ask
LARGEST = 256  # peers whose W is asked for its eigenvalues
NUM_TRIAL, ROUNDS_TRIAL = 256, 150


def step_size(compressor: Any, memory: str, gamma: float | None, topology: Any, rounds: bool) -> float:
    """gamma, or a step that makes consensus converge fast. 1 for mere rounding, and for numbers that all peers share.

    Found: of those in GRID the one with the smallest radius (`radius`) over the eigenvalues of W but 1. ValueError for a step
    that is none, or under which a trial of consensus on this topology does not converge.
    """
    if gamma is not None:
        if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 < gamma <= 1:
            raise ValueError(f"codec.gamma = {gamma!r} is not allowed; allowed: a number above 0, up to 1, or null: found")
        check_by_trial(compressor, memory, float(gamma), topology)
        return float(gamma)
    if memory != "differences" and (rounds or compressor.draws == "round"):
        return 1.0
    return found(compressor.kept, memory, eigenvalues(topology))


def eigenvalues(topology: Any) -> tuple[complex, ...]:
    """Those of W but 1; of a graph that changes, or of more than LARGEST peers, ends of an interval."""
    if topology is None or getattr(topology, "period", None) != 1 or not 1 < topology.num_peers <= LARGEST:
        return UNKNOWN
    w = topology.matrix(0)
    values = np.linalg.eigvalsh(w) if np.array_equal(w, w.T) else np.linalg.eigvals(w)
    values = np.delete(values, np.abs(values - 1).argmin())
    # a graph in pieces has more than one that is 1: nothing moves along it
    return tuple(sorted({complex(np.round(value, 6)) for value in values if abs(value - 1) > 1e-6}, key=lambda v: (v.real, v.imag)))


@lru_cache(maxsize=256)
def found(kept: float, memory: str, values: tuple[complex, ...]) -> float:
    """The step of GRID with the smallest radius at its worst eigenvalue."""
    if not values or kept >= 1:
        return 1.0
    return float(GRID[radius(GRID[:, None], kept, memory, np.array(values)[None, :]).max(1).argmin()])


def radius(gamma: np.ndarray, kept: float, memory: str, value: np.ndarray) -> np.ndarray:
    """By what the mean square of a number shrinks a round, where it travels with probability `kept`.

    In the direction of an eigenvalue lambda of W, g = gamma (1 - lambda): differences: x^ <- x with that probability, then x <- x -
    g x^; feedback: with that probability x <- x - g (x + e), e <- 0, else e <- x + e. The largest eigenvalue of the linear map of
    the second moments. none: x <- x - g C(x), E C(x) = x, E |C(x)|² = |x|² / kept. Exact for places that all peers share
    (`random_k`). Compressors that choose what is largest bear a larger step.
    """
    g = (gamma * (1 - value)).astype(complex)
    if memory == "none":
        return np.abs(1 - g) ** 2 + np.abs(g) ** 2 * (1 / kept - 1)
    one, zero = np.ones_like(g), np.zeros_like(g)
    if memory == "differences":
        sent, kept_back = _matrix(1 - g, zero, one, zero), _matrix(one, -g, zero, one)
    else:
        sent, kept_back = _matrix(1 - g, -g, zero, zero), _matrix(one, zero, one, one)
    moments = kept * _squared(sent) + (1 - kept) * _squared(kept_back)
    return np.abs(np.linalg.eigvals(moments)).max(-1)


def _matrix(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.stack([np.stack([a, b], -1), np.stack([c, d], -1)], -2)


def _squared(m: np.ndarray) -> np.ndarray:
    """m (..., 2, 2) times its conjugate, by Kronecker: (..., 4, 4)."""
    return np.einsum("...ij,...kl->...ikjl", m, m.conj()).reshape(*m.shape[:-2], 4, 4)


def check_by_trial(compressor: Any, memory: str, gamma: float, topology: Any) -> None:
    """ValueError where peers that start apart, and do nothing but mix random numbers with this step, are not closer after a while.

    On the run's own W, NUM_TRIAL numbers a peer; not asked of a graph of more than LARGEST peers.
    """
    if topology is None or topology.num_peers > LARGEST or topology.num_peers < 2:
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(topology.num_peers, NUM_TRIAL, generator=generator, dtype=torch.float64)
    known, errors = x.clone(), torch.zeros_like(x)
    x, start = x + torch.randn(x.shape, generator=generator, dtype=torch.float64), 2 * NUM_TRIAL * topology.num_peers
    for t in range(ROUNDS_TRIAL):
        w = torch.from_numpy(np.asarray(topology.matrix(t)))
        wanted = x - known if memory == "differences" else x + errors if memory == "feedback" else x
        sent = torch.stack([_through(compressor, row, 2**20 * t + (0 if compressor.draws == "round" else peer))
                            for peer, row in enumerate(wanted)])
        known, errors = (known + sent if memory == "differences" else sent), wanted - sent
        x = x + gamma * (w @ known - known)
        left = float((x - x.mean(0)).square().sum())
        if not math.isfinite(left) or left > 1e6 * start:
            break
    if not left <= start:
        good = found(compressor.kept, memory, eigenvalues(topology))
        raise ValueError(f"codec.gamma = {gamma} diverges on this topology: peers that only mix were further apart after "
                         f"{t + 1} rounds than before; allowed: less, such as {good:.3g}")


def _through(compressor: Any, row: torch.Tensor, seed: int) -> torch.Tensor:
    return compressor.unpack("trial", compressor.pack("trial", row, seed if compressor.draws else None), len(row)).to(row)
