"""The batches of a peer, by number: nothing has to be remembered to go on."""

import math
from bisect import bisect_left, insort
from typing import Any

import numpy as np

from dfl.config import DataConfig, TrainConfig
from dfl.seeds import permutation

# batches of similar length are sorted out of so many batches at once, as transformers does: more would leave less to chance
_WINDOW = 50


class DataStream:
    """The batches of one peer, random access: batch number s is a function of (seed, peer, s) alone.

    Every pass over the shard is a new permutation; a batch that meets the end of one goes on in the next.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, peer: int):
        self.indices, self.batch_size, self.seed, self.peer = indices, batch_size, seed, peer
        self._epoch, self._order = -1, indices

    @property
    def num_rows(self) -> int:
        """Rows of a pass."""
        return len(self.indices)

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    def batch(self, number: int) -> Any:
        """Example indices (batch_size,) of batch `number`."""
        epochs, offsets = self._places(number)
        return np.concatenate([self._shuffled(e)[offsets[epochs == e]] for e in np.unique(epochs)])

    def _places(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of a batch its pass, and its place in there."""
        return np.divmod(np.arange(number * self.batch_size, (number + 1) * self.batch_size), self.num_rows)

    def _shuffled(self, epoch: int) -> Any:
        if epoch != self._epoch:
            self._order, self._epoch = self._arranged(epoch), epoch
        return self._order

    def _arranged(self, epoch: int) -> Any:
        """The rows of pass `epoch`, in their order."""
        return self.indices[self._permutation(len(self.indices), epoch)]

    def _permutation(self, num: int, epoch: int, *more: str) -> np.ndarray:
        return permutation(num, self.seed, "data", self.peer, epoch, *more)


class GroupedStream(DataStream):
    """Batches of examples of similar length. lengths: of all examples, of whichever peer.

    Of every _WINDOW batches of a permutation the examples are sorted by length, and the batches drawn in random order.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, peer: int, lengths: np.ndarray):
        super().__init__(indices, batch_size, seed, peer)
        self.lengths = lengths

    def _arranged(self, epoch: int) -> Any:
        order, window = super()._arranged(epoch), self.batch_size * _WINDOW
        batches = []
        for start in range(0, len(order), window):
            part = order[start:start + window]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches += [part[k:k + self.batch_size] for k in range(0, len(part), self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        mixed = [whole[k] for k in self._permutation(len(whole), epoch, "grouped")]
        return np.concatenate([*mixed, *(batch for batch in batches if len(batch) < self.batch_size)])


class PackedStream(DataStream):
    """Rows of several examples each, of `room` tokens at most. lengths: of all examples.

    Examples go, the longest first, into the row that has the least room left for them (best fit decreasing), so that the number of
    rows depends on the lengths alone, and the row of an example on the permutation of the pass.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, peer: int, lengths: np.ndarray, room: int):
        super().__init__(indices, batch_size, seed, peer)
        self.lengths, self.room = lengths, room
        self._num_rows = len(pack(lengths[indices], room))

    @property
    def num_rows(self) -> int:
        return self._num_rows

    def batch(self, number: int) -> Any:
        """batch_size arrays, the indices of the examples of a row."""
        return [self._shuffled(epoch)[place] for epoch, place in zip(*self._places(number), strict=True)]

    def _arranged(self, epoch: int) -> Any:
        order = super()._arranged(epoch)
        rows = pack(self.lengths[order], self.room)
        return [order[rows[k]] for k in self._permutation(len(rows), epoch, "packed")]


def num_steps(train: TrainConfig, batches_per_epoch: int) -> int:
    """Optimiser steps of a round."""
    if train.local_steps is not None:
        return train.local_steps
    return max(1, math.ceil(train.local_epochs * batches_per_epoch / train.accumulation))


def make_stream(data: DataConfig, indices: np.ndarray, batch_size: int, seed: int, peer: int,
                lengths: np.ndarray | None) -> DataStream:
    """As data.packing and data.group_by_length say; lengths: of all examples, where one of them does."""
    if data.packing:
        return PackedStream(indices, batch_size, seed, peer, lengths, data.max_length)
    if data.group_by_length:
        return GroupedStream(indices, batch_size, seed, peer, lengths)
    return DataStream(indices, batch_size, seed, peer)


def pack(lengths: np.ndarray, room: int) -> list[np.ndarray]:
    """Which of the lengths (n,), each at most `room`, lie in a row together: best fit decreasing."""
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, row), sorted
    for k in np.argsort(-np.asarray(lengths), kind="stable"):
        place = bisect_left(left, (int(lengths[k]), -1))
        if place == len(left):
            rows.append([])
            free, row = room, len(rows) - 1
        else:
            free, row = left.pop(place)
        rows[row].append(int(k))
        insort(left, (free - int(lengths[k]), row))
    return [np.array(row) for row in rows]
