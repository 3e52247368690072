"""The batches of the hosted peers, each made while the model works on the one before, where that pays."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from dfl.training.hosted import HostedPeers

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class Wanted(NamedTuple):
    """Of step k of round t: for the rows `active`, which go through the model together."""

    t: int
    k: int
    active: tuple[int, ...]


class Batches:
    """Of `split`, for the steps of `peers`: a list of one for each micro-batch of a step, on their device."""

    def __init__(self, peers: HostedPeers, task: Any, split: Any):
        self.peers, self.task, self.features = peers, task, split.features
        self.ahead = Ahead(self._make) if pays(split.features, peers.device) else None

    def of(self, wanted: Wanted, following: Wanted | None = None) -> list[dict[str, Tensor]]:
        """following: what is wanted next, as far as is known."""
        made = self.ahead.get(wanted, following) if self.ahead else self._make(wanted)
        return [{key: value.to(self.peers.device, non_blocking=True) for key, value in batch.items()} for batch in made]

    def settle(self) -> None:
        """Nothing is under way after it."""
        if self.ahead:
            self.ahead.settle()

    def _make(self, wanted: Wanted) -> list[dict[str, Tensor]]:
        steps, accumulation = self.peers.steps, self.peers.train.accumulation
        made = [self._collate(wanted.active, [(wanted.t * steps(row) + wanted.k) * accumulation + micro for row in wanted.active])
                for micro in range(accumulation)]
        if self.peers.device.type != "cuda":
            return made
        # from where a GPU reads it while others compute
        return [{key: value.pin_memory() for key, value in batch.items()} for batch in made]

    def _collate(self, active: Sequence[int], numbers: list[int]) -> dict[str, Tensor]:
        streams, features = self.peers.streams, self.features
        chosen = [i for row, number in zip(active, numbers, strict=True) for i in streams[row].batch(number)]
        # of a packed row all of its examples
        rows = [self.task.pack([features[j] for j in i]) if isinstance(i, np.ndarray) else features[i] for i in chosen]
        return self.task.collate(rows)


class Ahead(Generic[Key, Made]):
    """What `make` gives, made before it is asked for. make: a function of its argument alone; all calls are made in one thread, one
    after the other, so that what it keeps needs no lock."""

    def __init__(self, make: Callable[[Key], Made]):
        self.make, self._pool = make, ThreadPoolExecutor(1, "dfl-ahead")
        self._next: tuple[Key, Future[Made]] | None = None

    def get(self, key: Key, following: Key | None) -> Made:
        """What belongs to `key`, or its error; `following` is begun."""
        found = self._next[1] if self._next is not None and self._next[0] == key else self._pool.submit(self.make, key)
        self._next = None
        made = found.result()
        if following is not None:
            self._next = following, self._pool.submit(self.make, following)
        return made

    def settle(self) -> None:
        """Wait for what is under way, and keep it; its error comes where it is asked for."""
        if self._next is not None:
            self._next[1].exception()


def pays(features: Sequence[Any], device: torch.device) -> bool:
    """Whether batches are worth a thread: where an example is read, decoded or tokenised when it is asked for, or where a GPU
    computes meanwhile. What lies ready takes a third of a millisecond a batch, which a second thread would only delay."""
    return device.type == "cuda" or not isinstance(features, list)
