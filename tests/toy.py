"""The matrix toy: peers fit a shared rank-4 matrix plus a private rank-2 one, with noisy gradients on LoRA factors.

f_i(A, B) = 1/2 ||B A - M_i||_F², d = k = 32, r = 4; M_i = M + H_i.
"""

from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor

PEERS, SIZE, RANK, STEPS, LR = 10, 32, 4, 20, 0.01


class Toy:
    """One draw of the problem and of its gradient noise; the same noise for every rule."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        columns = 2 / np.sqrt(RANK * SIZE) * rng.standard_normal((SIZE, RANK))
        rows = rng.standard_normal((RANK, SIZE))
        own_columns = rng.standard_normal((PEERS, SIZE, 2)) / np.sqrt(2 * SIZE)
        own_rows = rng.standard_normal((PEERS, 2, SIZE))
        self.targets = columns @ rows + own_columns @ own_rows
        # M_i = columns_i @ rows_i, of rank 6
        self.columns = torch.from_numpy(np.concatenate([np.broadcast_to(columns, (PEERS, SIZE, RANK)), own_columns], 2))
        self.rows = torch.from_numpy(np.concatenate([np.broadcast_to(rows, (PEERS, RANK, SIZE)), own_rows], 1))
        self.a0 = 1.5 * np.linalg.qr(rng.standard_normal((SIZE, RANK)))[0].T
        self.seed = seed
        self._drawn: dict[int, np.ndarray] = {}

    def noise(self, t: int) -> np.ndarray:
        """Gradient noise of round t: (STEPS, 2, PEERS, RANK, SIZE) for A and (transposed) B."""
        if t not in self._drawn:
            self._drawn[t] = self.draw(t)
        return self._drawn[t]

    def draw(self, t: int) -> np.ndarray:
        """The same, not kept."""
        return 0.1 / np.sqrt(SIZE) * np.random.default_rng((self.seed, t)).standard_normal((STEPS, 2, PEERS, RANK, SIZE))

    def factors(self) -> dict:
        a = torch.tensor(np.broadcast_to(self.a0, (PEERS, RANK, SIZE)).copy())
        return {"toy": (a, torch.zeros(PEERS, SIZE, RANK, dtype=torch.float64))}

    def local_step(self, factors, t: int, trains) -> None:
        descend(*factors["toy"], self.columns, self.rows, torch.from_numpy(self.noise(t)), trains)

    def peer_loss(self, factors) -> float:
        """mean_i 1/2 ||B_i A_i - mean M||²."""
        a, b = factors["toy"]
        goal = torch.from_numpy(self.targets.mean(0))
        return float((torch.bmm(b, a) - goal).square().sum((1, 2)).mean() / 2)


class Toys:
    """The toys of several seeds at once, every step of all of them in the same few calls.

    Side by side, each with its graph: peers 0 to 9 are the first seed's, 10 to 19 the second's, and so on, and none of one seed ever
    hears one of another. As layers: ten peers hold a pair of factors for each seed, all on one graph.
    """

    def __init__(self, seeds: Iterable[int]):
        self.toys = [Toy(seed) for seed in seeds]
        self.columns = torch.cat([toy.columns for toy in self.toys])
        self.rows = torch.cat([toy.rows for toy in self.toys])
        self.noise = cache(self._noise)

    def _noise(self, t: int) -> Tensor:
        """Each toy's own noise: (STEPS, 2, all peers, RANK, SIZE)."""
        return torch.from_numpy(np.concatenate([toy.draw(t) for toy in self.toys], 2))

    def factors(self, layers: bool) -> dict:
        own = {str(toy.seed): toy.factors()["toy"] for toy in self.toys}
        return own if layers else {"toys": tuple(torch.cat(parts) for parts in zip(*own.values(), strict=True))}

    def local_step(self, factors, t: int, trains) -> None:
        a, b = (torch.cat(parts) for parts in zip(*factors.values(), strict=True))
        descend(a, b, self.columns, self.rows, self.noise(t), trains)
        for (own_a, own_b), new_a, new_b in zip(factors.values(), a.chunk(len(factors)), b.chunk(len(factors)), strict=True):
            own_a.copy_(new_a)
            own_b.copy_(new_b)

    def apart(self, factors) -> list[dict]:
        """The factors of each seed as its toy has them."""
        parts = factors.values()
        if len(factors) == 1:
            a, b = factors["toys"]
            parts = zip(a.chunk(len(self.toys)), b.chunk(len(self.toys)), strict=True)
        return [{"toy": part} for part in parts]


class SideBySide:
    """Graphs whose peers never meet as one graph: W(t) is block diagonal."""

    def __init__(self, graphs):
        self.graphs = list(graphs)
        self.num_peers = sum(graph.num_peers for graph in self.graphs)
        self.matrix = cache(self._matrix)

    def _matrix(self, t: int) -> np.ndarray:
        w, start = np.zeros((self.num_peers, self.num_peers)), 0
        for graph in self.graphs:
            stop = start + graph.num_peers
            w[start:stop, start:stop] = graph.matrix(t)
            start = stop
        return w


def descend(a: Tensor, b: Tensor, columns: Tensor, rows: Tensor, noise: Tensor, trains: Iterable[str]) -> None:
    """STEPS noisy gradient steps of a (N, R, I) and b (N, O, R) in place, for any number N of peers.

    columns (N, O, K), rows (N, K, I): M_i = columns_i @ rows_i. The residual B A - M stays a product of rank R + K: nothing of
    size O x I is formed, and what is not trained is multiplied once. noise (STEPS, 2, N, R, I).
    """
    of_a, of_b = torch.cat([a, rows], 1), torch.cat([b, -columns], 2).mT.contiguous()
    own_a, own_b = of_a[:, :RANK], of_b[:, :RANK]  # B transposed, as its noise is
    through_a = through_b = None
    for k in range(STEPS):
        if "A" in trains and (through_b is None or "B" in trains):
            through_b = own_b @ of_b.mT
        if "B" in trains and (through_a is None or "A" in trains):
            through_a = own_a @ of_a.mT
        grad_a = torch.baddbmm(noise[k, 0], through_b, of_a) if "A" in trains else None
        if "B" in trains:
            own_b.sub_(torch.baddbmm(noise[k, 1], through_a, of_b), alpha=LR)
        if grad_a is not None:
            own_a.sub_(grad_a, alpha=LR)
    a.copy_(own_a)
    b.copy_(own_b.mT)
