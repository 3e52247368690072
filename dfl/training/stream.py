"""The batches of a peer, by number: nothing has to be remembered to go on."""

import math

import numpy as np

from dfl.seeds import permutation


class DataStream:
    """The batches of one peer, random access: batch number s is a function of (seed, peer, s) alone.

    Every pass over the shard is a new permutation; a batch that meets the end of one goes on in the next.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, peer: int):
        self.indices, self.batch_size, self.seed, self.peer = indices, batch_size, seed, peer
        self._epoch, self._order = -1, indices

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def batch(self, number: int) -> np.ndarray:
        """Example indices (batch_size,) of batch `number`."""
        positions = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.indices))
        return np.concatenate([self._shuffled(e)[offsets[epochs == e]] for e in np.unique(epochs)])

    def _shuffled(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._order = self.indices[permutation(len(self.indices), self.seed, "data", self.peer, epoch)]
            self._epoch = epoch
        return self._order
