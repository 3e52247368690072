"""Spectral quantities of mixing matrices and of sequences of them."""

from __future__ import annotations

import numpy as np

from topologies.topology import Topology


def slem(W: np.ndarray) -> float:
    """Second largest eigenvalue modulus: max |eig(W - J)|, J = 11^T / n. 0 for n = 1."""
    deviation = np.asarray(W, dtype=np.float64) - 1.0 / len(W)
    symmetric = np.allclose(deviation, deviation.T, rtol=0, atol=1e-13)
    eigenvalues = np.linalg.eigvalsh(deviation) if symmetric else np.linalg.eigvals(deviation)
    return float(np.abs(eigenvalues).max())


def contraction(topology: Topology, rounds: int = 200) -> float:
    """``||E[W^T W] - J||_2``: E||x - mean||^2 shrinks at least by this factor a round.

    Exact for a static or periodic topology (mean over the period), else the mean over ``rounds`` rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    n, count = topology.num_peers, topology.period or rounds
    second_moment = np.zeros((n, n))
    for t in range(count):
        W = topology.matrix(t)
        second_moment += W.T @ W / count
    return float(np.linalg.norm(second_moment - 1.0 / n, 2))
