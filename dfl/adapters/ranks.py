"""Rank and scaling of every peer's adapter. The rows of all have the layout of the largest rank, zero beyond a peer's own."""

from typing import NamedTuple

import numpy as np

from dfl.adapters.kinds import kind_of
from dfl.config import LoraConfig, RankConfig
from dfl.seeds import derive

# factor, gradient and two moments in float32
_BYTES_PER_NUMBER = 16


class Ranks(NamedTuple):
    """`ranks` and `scalings` (what multiplies B A) by peer."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]

    @property
    def largest(self) -> int:
        return max(self.ranks)

    @property
    def unequal(self) -> tuple[int, ...] | None:
        """The ranks where they differ, else None: what a rule wants to know."""
        return self.ranks if len(set(self.ranks)) > 1 else None

    @property
    def reference(self) -> float:
        """The scaling of the layout: that of the first peer of the largest rank."""
        return self.scalings[self.ranks.index(self.largest)]

    def ratio(self, peer: int) -> float:
        """A peer's scaling against the layout's: what its B is multiplied by before it is mixed with others'."""
        return self.scalings[peer] / self.reference


def resolve(lora: LoraConfig, num_peers: int, seed: int, numbers_per_rank: int | None = None) -> Ranks | None:
    """Rank and scaling of every peer. None where they depend on the model and `numbers_per_rank` is not known yet.

    numbers_per_rank: sum of I + O over the adapted layers. ValueError for a budget below rank 1.
    """
    ranks = _ranks(lora.rank, num_peers, seed, numbers_per_rank)
    if ranks is None:
        return None
    alphas = lora.alpha if isinstance(lora.alpha, tuple) else (lora.alpha,) * num_peers
    roots = lora.rslora if isinstance(lora.rslora, tuple) else (lora.rslora,) * num_peers
    scaling = kind_of(lora).layers.scaling
    return Ranks(ranks, tuple(scaling(a, r, root) for r, a, root in zip(ranks, alphas, roots, strict=True)))


def _ranks(rank, num_peers: int, seed: int, numbers_per_rank: int | None) -> tuple[int, ...] | None:
    if isinstance(rank, int):
        return (rank,) * num_peers
    if isinstance(rank, tuple):
        return rank
    if rank.choices is not None:
        return _drawn(rank, num_peers, seed)
    if numbers_per_rank is None:
        return None
    budgets = rank.budget_mb if isinstance(rank.budget_mb, tuple) else (rank.budget_mb,) * num_peers
    ranks = tuple(min(rank.largest, int(budget * 1e6 / (_BYTES_PER_NUMBER * numbers_per_rank))) for budget in budgets)
    if min(ranks) < 1:
        raise ValueError(f"lora.rank.budget_mb = {min(budgets)} does not hold rank 1, which takes "
                         f"{_BYTES_PER_NUMBER * numbers_per_rank / 1e6:.3g} MB of this model")
    return ranks


def _drawn(rank: RankConfig, num_peers: int, seed: int) -> tuple[int, ...]:
    weights = np.array(rank.weights or [1.0] * len(rank.choices), dtype=float)
    generator = np.random.Generator(np.random.Philox(derive(seed, "ranks")))
    return tuple(int(r) for r in generator.choice(rank.choices, size=num_peers, p=weights / weights.sum()))
