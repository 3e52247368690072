"""Seeds for everything random, derived by name: no stream depends on how much another one consumed."""

import hashlib

import numpy as np


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed from the run's seed and any names: `derive(seed, "local", peer, t)`."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def permutation(n: int, seed: int, *names: object) -> np.ndarray:
    """A permutation of range(n)."""
    return np.random.Generator(np.random.Philox(derive(seed, *names))).permutation(n)
