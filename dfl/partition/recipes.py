"""Equal shards with prescribed class shares, as large as the scarcest class allows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfl.partition.examples import Examples, Part, check_number, wrong


def proportions(examples: Examples, num_peers: int, rng: np.random.Generator, *, proportions: Sequence,
                per_client: int | None = None) -> Part:
    """Equal shards with given shares of each class: a row per peer, or groups [[count, row], ...].

    A row is a list with a share for each class in order, or a mapping from class name to share. Every peer gets
    `per_client` examples; by default as many as the scarcest class allows, min_c floor(N_c / demand_c) with demand_c
    the sum of the peers' shares of class c. Class counts are within one example of the recipe.
    """
    shares = share_matrix(examples, num_peers, proportions)
    return fill(examples, rng, shares, per_client)


def majority(examples: Examples, num_peers: int, rng: np.random.Generator, *, fraction: float = 0.9,
             peers_per_class: int | None = None, leave_out: int | Sequence[str] = 0,
             per_client: int | None = None) -> Part:
    """Every class is the majority of the same number of peers; the rest of a shard is as frequent as in the data.

    `leave_out` classes, a number of the rarest ones or their names, are nobody's majority. Equal shards, as `proportions`.
    """
    if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise wrong("fraction", fraction, "a number above 0, up to 1")
    if peers_per_class is not None:
        check_number("peers_per_class", peers_per_class, whole=True)
    counts = examples.counts()
    chosen = [c for c in range(len(counts)) if c not in left_out(examples, leave_out)]
    each = num_peers // max(len(chosen), 1) if peers_per_class is None else peers_per_class
    if not chosen or each * len(chosen) != num_peers:
        raise ValueError(f"partition.peers_per_class = {peers_per_class} with {len(chosen)} majority classes does not "
                         f"make {num_peers} peers; allowed: peers = peers_per_class x {len(chosen)}, or another leave_out")
    shares = np.empty((num_peers, len(counts)))
    for peer, label in enumerate(np.repeat(chosen, each)):
        others = np.where(np.arange(len(counts)) == label, 0, counts)
        shares[peer] = (1 - fraction) * others / max(others.sum(), 1)
        shares[peer, label] = fraction if others.sum() else 1
    return fill(examples, rng, shares, per_client)


def share_matrix(examples: Examples, num_peers: int, rows: Any) -> np.ndarray:
    """(N, C) class shares of each peer, from a row per peer or from groups [[count, row], ...]. ValueError otherwise."""
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise wrong("proportions", rows, "a row per peer, or groups [[count, row], ...]")
    if all(isinstance(row, Sequence) and len(row) == 2 and isinstance(row[1], (Mapping, Sequence)) for row in rows):
        for count, _ in rows:
            check_number("proportions", count, whole=True)
        rows = [row for count, row in rows for _ in range(count)]
    if len(rows) != num_peers:
        raise ValueError(f"partition.proportions describes {len(rows)} peers, but peers = {num_peers}")
    return np.array([_share_row(examples, row) for row in rows])


def _share_row(examples: Examples, row: Any) -> list[float]:
    names = examples.label_names
    if isinstance(row, Mapping):
        row = {str(key): value for key, value in row.items()}
        for key in row:
            if key not in names:
                raise wrong("proportions", key, ", ".join(names))
        row = [row.get(name, 0.0) for name in names]
    numbers = isinstance(row, Sequence) and all(isinstance(v, (int, float)) and v >= 0 for v in row)
    if not numbers or len(row) != len(names) or abs(sum(row) - 1) > 1e-6:
        raise wrong("proportions", row, f"{len(names)} shares that sum to 1, for {', '.join(names)}")
    return [float(v) for v in row]


def left_out(examples: Examples, chosen: int | Sequence[str]) -> set[int]:
    """The classes that `leave_out` means: that many of the rarest ones, or those with these names."""
    names = examples.label_names
    if isinstance(chosen, int) and not isinstance(chosen, bool) and 0 <= chosen < len(names):
        return set(np.argsort(examples.counts(), kind="stable")[:chosen].tolist())
    given = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(given, Sequence) or any(str(name) not in names for name in given):
        raise wrong("leave_out", chosen, f"a number below {len(names)}, or names among {', '.join(names)}")
    return {names.index(str(name)) for name in given}


def fill(examples: Examples, rng: np.random.Generator, shares: np.ndarray, per_client: int | None) -> Part:
    """Deal `per_client` examples to each peer in the given shares (N, C); the cap if None, ValueError above it."""
    supply = examples.counts()
    feasible = feasible_size(shares, supply)
    if feasible < 1:
        scarce = examples.label_names[int(np.argmin(supply / np.maximum(shares.sum(0), 1e-12)))]
        raise ValueError(f"the partition cannot give one example to each of {len(shares)} peers: class {scarce!r} has "
                         f"{supply[examples.label_names.index(scarce)]}; change the shares or take fewer peers")
    if per_client is not None:
        check_number("per_client", per_client, whole=True)
        if per_client > feasible:
            raise ValueError(f"partition.per_client = {per_client} is infeasible with disjoint shards of these shares; "
                             f"allowed: up to {feasible}")
    counts = class_counts(shares, per_client or feasible)
    pools = [np.split(pool, np.cumsum(counts[:, label])) for label, pool in enumerate(examples.pools(rng))]
    return [np.concatenate([pool[peer] for pool in pools]) for peer in range(len(shares))]


def feasible_size(shares: np.ndarray, supply: np.ndarray) -> int:
    """The largest equal shard: min_c floor(N_c / demand_c), less where rounding to whole examples asks for more."""
    demand = shares.sum(0)
    size = int(np.floor((supply[demand > 0] / demand[demand > 0]) * (1 + 1e-12)).min())
    while size and (class_counts(shares, size).sum(0) > supply).any():
        size -= 1
    return size


def class_counts(shares: np.ndarray, size: int) -> np.ndarray:
    """(N, C) whole numbers within one of `size * shares`, rows summing to `size`.

    What rounding takes from a class at one peer it gets back at a later one, so that totals stay near their shares too.
    """
    exact = shares * size
    counts = np.floor(exact + 1e-9).astype(int)
    owed = np.zeros(shares.shape[1])
    for peer, row in enumerate(exact):
        owed += row - counts[peer]
        open_ = np.where(row - counts[peer] > 1e-9, owed, -np.inf)
        chosen = np.argsort(-open_, kind="stable")[:size - counts[peer].sum()]
        counts[peer, chosen] += 1
        owed[chosen] -= 1
    return counts
