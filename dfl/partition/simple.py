"""Partitions that ask for no particular class shares."""

import numpy as np

from dfl.partition.examples import Examples, Part, check_number, cut, wrong


def iid(examples: Examples, num_peers: int, rng: np.random.Generator) -> Part:
    """Every peer draws from the same distribution; sizes differ by at most one."""
    return np.array_split(rng.permutation(len(examples)), num_peers)


def dirichlet(examples: Examples, num_peers: int, rng: np.random.Generator, *, alpha: float = 0.5,
              min_size: int = 1) -> Part:
    """Each class is dealt in proportions drawn from a Dirichlet distribution; small `alpha`, strong skew.

    Drawn again, up to 1,000 times, until every peer holds `min_size` examples. Hsu, Qi, Brown, 2019, arXiv 1909.06335.
    """
    check_number("alpha", alpha)
    check_number("min_size", min_size, whole=True)
    if min_size * num_peers > len(examples):
        raise ValueError(f"partition.min_size = {min_size} for {num_peers} peers needs {min_size * num_peers} examples, "
                         f"there are {len(examples)}; allowed: up to {len(examples) // num_peers}")
    pools = examples.pools(rng)
    for _ in range(1000):
        weights = rng.dirichlet([alpha] * num_peers, size=len(pools))
        pieces = [cut(pool, row) for pool, row in zip(pools, weights, strict=True)]
        if min(sum(map(len, shares)) for shares in zip(*pieces, strict=True)) >= min_size:
            return [np.concatenate(shares) for shares in zip(*pieces, strict=True)]
    raise ValueError(f"partition.alpha = {alpha} never gave each of {num_peers} peers {min_size} examples in 1,000 draws; "
                     "raise alpha, lower min_size or take fewer peers")


def shards(examples: Examples, num_peers: int, rng: np.random.Generator, *, shards_per_peer: int = 2) -> Part:
    """Examples sorted by class and cut into equal shards; every peer is dealt a few of them.

    McMahan et al., 2017, arXiv 1602.05629.
    """
    check_number("shards_per_peer", shards_per_peer, whole=True)
    total = num_peers * shards_per_peer
    if total > len(examples):
        raise wrong("shards_per_peer", shards_per_peer, f"up to {len(examples) // num_peers}")
    pieces = np.array_split(np.concatenate(examples.pools(rng)), total)
    return [np.concatenate([pieces[i] for i in hand]) for hand in rng.permutation(total).reshape(num_peers, -1)]


def quantity(examples: Examples, num_peers: int, rng: np.random.Generator, *, skew: float = 1.0) -> Part:
    """The same distribution for all, in unequal sizes: peer i holds a share proportional to (i + 1) ** -skew."""
    if not isinstance(skew, (int, float)) or not 0 <= skew < float("inf"):
        raise wrong("skew", skew, "0 (equal sizes) or more")
    weights = np.arange(1, num_peers + 1, dtype=float) ** -skew
    return cut(rng.permutation(len(examples)), weights / weights.sum())


def column(examples: Examples, num_peers: int, rng: np.random.Generator, *, column: str) -> Part:
    """All examples with the same value in a column belong to one peer; the largest groups are dealt first."""
    if not isinstance(column, str) or column not in examples.columns:
        raise wrong("column", column, ", ".join(examples.columns) or "nothing, the data has no columns")
    groups: dict[str, list[int]] = {}
    for i, value in enumerate(examples.columns[column]):
        groups.setdefault(str(value), []).append(i)
    if len(groups) < num_peers:
        raise ValueError(f"partition.column = {column!r} has {len(groups)} different values, too few for {num_peers} peers; "
                         "take fewer peers or another column")
    parts: list[list[int]] = [[] for _ in range(num_peers)]
    for value in sorted(groups, key=lambda value: (-len(groups[value]), value)):
        min(parts, key=len).extend(groups[value])
    return [np.array(part) for part in parts]
