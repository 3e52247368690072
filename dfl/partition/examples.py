"""What a partition may look at, and helpers that every partition uses. N peers, C classes, n examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Part = list[np.ndarray]


@dataclass(frozen=True)
class Examples:
    """Labels (n,), the names of the classes, and the raw columns."""

    labels: np.ndarray
    label_names: list[str]
    columns: Mapping[str, Sequence]

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> np.ndarray:
        """(C,) examples of each class."""
        return np.bincount(self.labels, minlength=len(self.label_names))

    def pools(self, rng: np.random.Generator) -> list[np.ndarray]:
        """The shuffled examples of each class."""
        return [rng.permutation(np.flatnonzero(self.labels == label)) for label in range(len(self.label_names))]


def cut(pool: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """The pool in consecutive pieces proportional to `weights` (N,), which sum to 1."""
    return np.split(pool, np.floor(np.cumsum(weights)[:-1] * len(pool) + 1e-9).astype(int))


def wrong(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"partition.{key} = {value!r} is not allowed; allowed: {allowed}")


def check_number(key: str, value: Any, *, whole: bool = False) -> None:
    """ValueError unless the value is a positive number."""
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < float("inf"):
        raise wrong(key, value, f"a positive {'whole ' if whole else ''}number")
