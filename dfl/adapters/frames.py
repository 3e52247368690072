"""A frozen A of its own for every peer, orthogonal to those of all others: a function of a seed, so that none ever travels."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.layout import Layout, a_view, empty_rows
from dfl.seeds import derive

Frames = Callable[[int], Tensor]  # of a peer: a row (D,) with its A, zero elsewhere


def make_frames(layout: Layout, seed: int, peers: int) -> Frames:
    """Peer i's A of every layer, (R, I) with orthonormal rows.

    Rows i R .. i R + R - 1 of one random orthogonal matrix of each layer, of cosines with random signs and in random
    order: A_i A_j^T = 0 for N R <= I, so that <B_i A_i, B_j A_j>_F = 0 for any B. Where there is no room for all, Gaussian
    rows of length about 1, of which two have an inner product of about 1 / sqrt(I). The same bits on every process: drawn
    on the CPU, rounded once from float64.
    """
    def of_peer(peer: int) -> Tensor:
        row = empty_rows(1, layout.size)[0]
        for pair in layout.pairs:
            a_view(row, pair).copy_(torch.from_numpy(frame(pair.rank, pair.d_in, peers, derive(seed, "frame", pair.name), peer)))
        return row

    return of_peer


def frame(rank: int, d_in: int, peers: int, seed: int, peer: int) -> np.ndarray:
    """(R, I), float64: the rows of one peer."""
    draw = np.random.Generator(np.random.Philox(seed))
    if peers * rank > d_in:
        own = np.random.Generator(np.random.Philox(derive(seed, "peer", peer)))
        return own.standard_normal((rank, d_in)) / math.sqrt(d_in)
    order, signs = draw.permutation(d_in), draw.choice([-1.0, 1.0], d_in)
    numbers = order[peer * rank:(peer + 1) * rank]
    cosines = np.cos(np.pi * numbers[:, None] * (np.arange(d_in) + 0.5) / d_in) * math.sqrt(2 / d_in)
    cosines[numbers == 0] /= math.sqrt(2)
    return cosines * signs


def collision(masks: Tensor, frames: Sequence[Tensor], layout: Layout) -> Tensor:
    """How much the adapters of N peers meet, (N, N), 0 to 1: over layers the mean of |M_i and M_j| / min(|M_i|, |M_j|) times
    ||A_i A_j^T||_F^2 / R.

    masks: (N, D) bool, which numbers of B each uses; frames: rows (D,) with their A. Zero for orthogonal A.
    """
    found = torch.zeros(len(masks), len(masks), dtype=torch.float64)
    for pair in layout.pairs:
        used = masks[:, pair.b:pair.b + pair.d_out * pair.rank].double()
        a = torch.stack([a_view(row, pair) for row in frames]).double()
        sizes = used.sum(1)
        overlap = used @ used.T / torch.minimum(sizes[:, None], sizes[None]).clamp_min(1)
        met = torch.einsum("pri,qsi->pqrs", a, a).square().sum((2, 3)) / pair.rank
        found += overlap * met / len(layout.pairs)
    return found


def clusters(cost: np.ndarray, meets: np.ndarray, *, kappa: float = 1.0, degree: int = 2) -> list[tuple[int, int]]:
    """Edges (i, j), i < j, taken greedily by cost_ij + kappa meets_ij, the least first, while both ends have fewer than `degree`.

    For a topology of links that are cheap and whose adapters do not meet: a line `i j` of each in a file of
    `topology: {name: edge_list, path: ...}`. Both (N, N), symmetric. ValueError where they are not.
    """
    cost, meets = np.asarray(cost, dtype=float), np.asarray(meets, dtype=float)
    if cost.shape != meets.shape or cost.ndim != 2 or not np.allclose(cost, cost.T) or not np.allclose(meets, meets.T):
        raise ValueError(f"costs {cost.shape} and collisions {meets.shape} have to be symmetric matrices of one size")
    score, free, found = cost + kappa * meets, [degree] * len(cost), []
    pairs = sorted((float(score[i, j]), i, j) for i in range(len(cost)) for j in range(i + 1, len(cost)))
    for _, i, j in pairs:
        if free[i] and free[j]:
            free[i], free[j] = free[i] - 1, free[j] - 1
            found.append((i, j))
    return sorted(found)
