"""The matrix toy: peers fit a shared rank-4 matrix plus a private rank-2 one, with noisy gradients on LoRA factors.

f_i(A, B) = 1/2 ||B A - M_i||_F², d = k = 32, r = 4; M_i = M + H_i.
"""

import numpy as np
import torch

PEERS, SIZE, RANK, STEPS, LR = 10, 32, 4, 20, 0.01


class Toy:
    """One draw of the problem and of its gradient noise; the same noise for every rule."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        shared = 2 / np.sqrt(RANK * SIZE) * rng.standard_normal((SIZE, RANK)) @ rng.standard_normal((RANK, SIZE))
        private = rng.standard_normal((PEERS, SIZE, 2)) @ rng.standard_normal((PEERS, 2, SIZE)) / np.sqrt(2 * SIZE)
        self.targets = shared + private
        self.a0 = 1.5 * np.linalg.qr(rng.standard_normal((SIZE, RANK)))[0].T
        self.seed = seed
        self._drawn: dict[int, np.ndarray] = {}

    def noise(self, t: int) -> np.ndarray:
        """Gradient noise of round t: (STEPS, 2, PEERS, RANK, SIZE) for A and (transposed) B."""
        if t not in self._drawn:
            rng = np.random.default_rng((self.seed, t))
            self._drawn[t] = 0.1 / np.sqrt(SIZE) * rng.standard_normal((STEPS, 2, PEERS, RANK, SIZE))
        return self._drawn[t]

    def factors(self) -> dict:
        a = torch.tensor(np.broadcast_to(self.a0, (PEERS, RANK, SIZE)).copy())
        return {"toy": (a, torch.zeros(PEERS, SIZE, RANK, dtype=torch.float64))}

    def local_step(self, factors, t: int, trains) -> None:
        a, b = factors["toy"]
        targets = torch.from_numpy(-self.targets)
        noise = torch.from_numpy(self.noise(t))
        for k in range(STEPS):
            residual = torch.baddbmm(targets, b, a)
            grad_a = torch.baddbmm(noise[k, 0], b.mT, residual) if "A" in trains else None
            if "B" in trains:
                b.sub_(torch.baddbmm(noise[k, 1].mT, residual, a.mT), alpha=LR)
            if grad_a is not None:
                a.sub_(grad_a, alpha=LR)

    def peer_loss(self, factors) -> float:
        """mean_i 1/2 ||B_i A_i - mean M||²."""
        a, b = factors["toy"]
        goal = torch.from_numpy(self.targets.mean(0))
        return float((torch.bmm(b, a) - goal).square().sum((1, 2)).mean() / 2)
