"""Randomness that is a pure function of (seed, t): no state, no order of calls, random access.

Two sources, both keyed through numpy's ``SeedSequence``:

* ``generator``: a Philox generator for everything that needs a whole vector of draws;
* ``uniform``: a counter hash for draws that belong to *one* thing (a link, a peer), so that a peer can look
  at its own links without drawing everybody else's. A link's coin depends on (seed, t, i, j) alone: the same
  link gets the same coin on every base graph, and the links kept at p = 0.1 are among those kept at 0.2.
"""

from __future__ import annotations

import numpy as np

# One stream per purpose, so that two sequences with one seed are independent of each other.
STREAMS = {"links": 1, "order": 2, "matching": 3, "shift": 4, "coins": 5, "walk": 6, "graph": 7, "peers": 8, "sample": 9}

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _entropy(seed: int, t: int, stream: str) -> np.random.SeedSequence:
    if seed < 0 or t < 0:
        raise ValueError(f"seed and round must be non-negative integers, got seed={seed}, t={t}")
    return np.random.SeedSequence(entropy=int(seed), spawn_key=(STREAMS[stream], int(t)))


def generator(seed: int, t: int, stream: str) -> np.random.Generator:
    """A fresh Philox generator for the given purpose in round ``t``."""
    return np.random.Generator(np.random.Philox(_entropy(seed, t, stream)))


def key(seed: int, t: int, stream: str) -> np.uint64:
    """A 64-bit key for ``uniform`` and ``Shuffle``."""
    return _entropy(seed, t, stream).generate_state(1, np.uint64)[0]


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that looks random."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        for shift, factor in ((np.uint64(30), _MIX_1), (np.uint64(27), _MIX_2)):
            x ^= x >> shift
            x *= factor
        x ^= x >> np.uint64(31)
        return x


def uniform(key: np.uint64, i, j) -> np.ndarray:
    """Uniform numbers in [0, 1) for the unordered pairs {i, j}; arrays in, an array of the same shape out."""
    i, j = np.asarray(i), np.asarray(j)
    low, high = np.minimum(i, j).astype(np.uint64), np.maximum(i, j).astype(np.uint64)
    words = mix(mix(low ^ key) ^ high)
    return (words >> np.uint64(11)) * 2.0**-53


class Shuffle:
    """A random permutation of 0..n-1 that can be asked for one position: O(log n) time, no memory.

    The swap-or-not shuffle (Hoang, Morris, Rogaway 2012): in every pass each pair {x, K - x mod n} is swapped on the
    toss of its coin. Six passes per bit bring it close to uniform. A pass undoes itself, so the inverse is the passes
    in reverse order.

    >>> shuffle = Shuffle(key(0, 0, "matching"), 5)
    >>> sorted(int(shuffle(i)) for i in range(5))
    [0, 1, 2, 3, 4]
    >>> [int(shuffle.inverse(shuffle(i))) for i in range(5)]
    [0, 1, 2, 3, 4]
    """

    def __init__(self, key: np.uint64, n: int):
        self.n = n
        passes = np.arange(12 + 6 * max(1, n - 1).bit_length(), dtype=np.uint64)
        self.coin_keys = mix(passes ^ mix(key))
        self.pivots = (mix(self.coin_keys) % np.uint64(n)).astype(np.int64)

    def __call__(self, x) -> np.ndarray:
        return self._walk(x, zip(self.pivots, self.coin_keys, strict=True))

    def inverse(self, x) -> np.ndarray:
        return self._walk(x, zip(self.pivots[::-1], self.coin_keys[::-1], strict=True))

    def _walk(self, x, passes) -> np.ndarray:
        x = np.asarray(x, dtype=np.int64)
        for pivot, coin_key in passes:
            mirror = (pivot - x) % self.n
            swapped = mix(np.maximum(x, mirror).astype(np.uint64) ^ coin_key) >> np.uint64(63)
            x = np.where(swapped == 1, mirror, x)
        return x
