"""Who holds which example: disjoint, deterministic shards, in plain numpy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dfl.partition.examples import Examples, Part
from dfl.partition.recipes import majority, proportions
from dfl.partition.report import table
from dfl.partition.simple import column, dirichlet, iid, quantity, shards
from dfl.plugins import check_parameters, first_line, lookup

__all__ = ["PARTITIONS", "build", "describe", "table"]

PARTITIONS: dict[str, Callable[..., Part]] = {
    f.__name__: f for f in (iid, dirichlet, proportions, majority, shards, quantity, column)}


def build(name: str, labels: np.ndarray, num_peers: int, *, seed: int = 0, columns: Mapping[str, Sequence] | None = None,
          label_names: Sequence[str] | None = None, **params: Any) -> Part:
    """The examples of each peer, as ascending indices into `labels`: disjoint, none empty, the same for the same seed.

    ValueError for an unknown name or parameter, for a recipe that the data cannot fill, and for an empty shard.
    """
    factory = lookup("partition.name", PARTITIONS, name)
    check_parameters("partition", name, factory, params)
    labels = np.asarray(labels, dtype=np.int64)
    if not 1 <= num_peers <= len(labels):
        raise ValueError(f"peers = {num_peers} cannot share {len(labels)} training examples; "
                         f"allowed: 1 to {len(labels)}")
    names = list(label_names) if label_names else [str(c) for c in range(int(labels.max()) + 1)]
    examples = Examples(labels, names, columns or {})
    parts = [np.sort(np.asarray(part, dtype=np.int64))
             for part in factory(examples, num_peers, np.random.default_rng(seed), **params)]
    for peer, part in enumerate(parts):
        if not len(part):
            raise ValueError(f"partition.name = {name!r}{_given(params)} leaves peer {peer} without an example; "
                             "take fewer peers, a less skewed partition or another data_seed")
    assert len(parts) == num_peers and len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
    return parts


def _given(params: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{key} = {value}' for key, value in params.items())})" if params else ""


def describe() -> dict[str, str]:
    """A line for each partition."""
    return {name: first_line(factory) for name, factory in PARTITIONS.items()}
