"""Quadratics of unequal curvature on eight peers: every optimiser across peers has a row, and lands in it to the digits.

f_i(x) = a_i ||x - b_i||^2 / 2, a_i = 1 + i / 8; scalar: b_i = i; wide: d = 20, b_i[k] = i + sin(i (k + 1)); x = 0 at first.
"""

from typing import NamedTuple

import numpy as np
import torch

import topologies
from dfl import simulate
from dfl.methods import Choice

NUM = 8
CURVATURE = 1 + np.arange(NUM) / 8


def centres(d: int) -> np.ndarray:
    """(8, d)."""
    i, k = np.arange(NUM)[:, None], np.arange(d)
    return i.astype(float) if d == 1 else i + np.sin(i * (k + 1))


def gradient(x: np.ndarray) -> np.ndarray:
    """Of every peer at its own row: (8, d)."""
    return CURVATURE[:, None] * (x - centres(x.shape[1]))


def optimum(d: int) -> np.ndarray:
    return (CURVATURE[:, None] * centres(d)).sum(0) / CURVATURE.sum()


class Given:
    """W(t) from a function of t, or one for ever; `sums` says which of its sums are one."""

    num_peers = NUM

    def __init__(self, w, sums: str = "doubly", period: int | None = 1):
        self.w, self.sums, self.period, self.name = w, sums, period, "given"

    def matrix(self, t: int, alive=None) -> np.ndarray:
        return self.w(t) if callable(self.w) else self.w


class Found(NamedTuple):
    x: np.ndarray  # (8, d)
    measures: list
    ledger: dict

    @property
    def largest(self) -> float:
        """The largest error over all peers."""
        return float(np.abs(self.x - optimum(self.x.shape[1])).max())

    @property
    def rms(self) -> float:
        return float(np.sqrt(((self.x - optimum(self.x.shape[1])) ** 2).mean()))


def descend(wrapper: str | Choice, topology, *, rounds: int, lr: float, d: int = 1, local_steps: int = 1, momentum: float = 0.0,
            start: np.ndarray | None = None, method: str = "lora", **slots) -> Found:
    """Full gradients, plain descent (or each peer's own heavy ball), through `dfl.simulate`: factor A holds x, B stays at zero."""
    x = torch.zeros(NUM, 1, d, dtype=torch.float64) if start is None else torch.from_numpy(start)[:, None].clone()
    velocity = np.zeros((NUM, d))

    def local_step(factors, t, trains, after_step=lambda: None):
        a = factors["x"][0]
        for _ in range(local_steps):
            velocity[:] = momentum * velocity + gradient(a[:, 0].numpy())
            a -= lr * torch.from_numpy(velocity)[:, None]
            after_step()

    graph = topologies.build(topology, NUM) if isinstance(topology, str) else topology
    result = simulate(method, graph, {"x": (x, torch.zeros(NUM, 1, 1, dtype=torch.float64))}, local_step, rounds, wrapper=wrapper,
                      lr=lr, local_steps=local_steps, measure_every=rounds, **slots)
    return Found(result.factors["x"][0][:, 0].numpy(), result.measures, result.ledger)


RING = topologies.build("ring", NUM).matrix(0)
