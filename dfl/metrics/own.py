"""How good a model is on each peer's own distribution, from one pass over the validation examples that all peers share.

Every example is of a group: its label, or its value in the column by which the data were divided. A peer's own metric
counts each validation example with

    w_i(c) = q_i(c) / n_c,    q_i(c) the share of group c among peer i's training examples, n_c its validation examples,

so that the groups weigh at the peer what they weigh in its shard: the accuracy within each group, averaged over the
peer's groups (importance weights for label shift; Lipton, Wang, Smola, 2018, arXiv 1802.03916, with known shares). It is
unbiased where peers differ only in how often they see which group. Groups without a validation example are left out and
the others weigh more; `covered` says how much of each shard is left. Nothing is estimated where there are no groups: a
held-back part of each shard would be taken from training, and be evaluated in a second pass.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# more groups than this are not counted: every metric has its sums for each of them
MAX_GROUPS = 1000


class Own(NamedTuple):
    """`groups` (n,): the group of each validation example. `weights` (N, C): of an example of each group, at each peer.

    `covered` (N,): the share of a peer's training examples whose group has a validation example. `by`: what a group is.
    """

    groups: Tensor
    weights: Tensor
    covered: list[float]
    by: str

    @property
    def num_groups(self) -> int:
        return self.weights.shape[1]

    def facts(self) -> dict[str, Any]:
        return {"by": self.by, "groups": self.num_groups, "covered": self.covered}


def own_distributions(train: Any, valid: Any, parts: list[np.ndarray], column: str | None) -> Own | str:
    """The distributions of the shards `parts` of the training split; or, in a sentence, why there is none.

    column: that by which the data were divided, or None.
    """
    if column is not None and column in train.columns and column in valid.columns:
        by, names, values = f"column {column}", None, (train.columns[column], valid.columns[column])
    elif train.label_names:
        by, names, values = "label", len(train.label_names), (train.labels, valid.labels)
    else:
        return "the task has no labels, and the partition is by no column that the validation examples have"
    (of_train, of_valid), found = _numbered(values, names)
    if found > MAX_GROUPS:
        return f"{found} groups by {by} are more than {MAX_GROUPS}"
    shares = np.stack([np.bincount(of_train[part], minlength=found) / len(part) for part in parts])
    counts = np.bincount(of_valid, minlength=found)
    covered = (shares * (counts > 0)).sum(1)
    weights = np.where(counts > 0, shares / np.maximum(counts, 1), 0) / np.where(covered > 0, covered, np.nan)[:, None]
    return Own(torch.from_numpy(of_valid), torch.from_numpy(weights), covered.tolist(), by)


def _numbered(values: tuple, num: int | None) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Both columns as numbers from 0, and how many there are: labels as they are, other values ordered as texts."""
    if num is not None:
        return values, num
    texts = [np.array([str(value) for value in column]) for column in values]
    names, index = np.unique(np.concatenate(texts), return_inverse=True)
    return (index[:len(texts[0])], index[len(texts[0]):]), len(names)
