"""Where the numbers of an evaluation lie: what a batch adds to a model's row, and what the row says in the end.

A row is (W + n K,) float64. W: the sums of every metric over all examples, then those of each of C groups. n K: what is
kept of each of n examples, 0 where another process evaluates it. Rows of two parts of the batches add up to the row of
both; sums in the order of the batches are the same bits however the batches are divided among processes.

Shapes: M models, P of them in a pass, B examples of a batch, C groups, S sums of a metric, K numbers kept of an example.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dfl.metrics.base import Metric, Outcome
from dfl.metrics.own import Own

# more numbers of a metric than this are not kept by group: the consensus model has as many for every batch, on all processes
MAX_BY_GROUP = 2**17


class Tally:
    """metrics by name, in the order in which they are told. own: by which groups sums are kept as well; None: there are none."""

    def __init__(self, metrics: Mapping[str, Metric], num_examples: int, own: Own | None = None):
        self.metrics, self.num_examples, self.own = metrics, num_examples, own
        self.num_groups = own.num_groups if own else 0
        self.added = {name: metric for name, metric in metrics.items() if not metric.per_example}
        self.kept = {name: metric for name, metric in metrics.items() if metric.per_example}
        self.grouped = {name: metric for name, metric in self.added.items()
                        if 0 < metric.size * self.num_groups <= MAX_BY_GROUP}
        self.width = _size(self.added) + self.num_groups * _size(self.grouped)
        self.kept_width = _size(self.kept)

    def of_batch(self, outcome: Outcome, num: int, groups: Tensor | None) -> Tensor:
        """(P, W) float64: what a batch adds, `num` blocks of the same examples. groups (B,): of each, where there are any."""
        found = []
        for name, metric in self.added.items():
            if name in self.grouped:
                # of every example; summed up along what lies together, as without groups
                rows = _sums(name, metric, outcome, num * len(groups)).view(num, len(groups), metric.size)
                found.append((rows.mT.contiguous().sum(2).double(), rows.double()))
            else:
                found.append((_sums(name, metric, outcome, num).double(), None))
        parts = [total for total, _ in found]
        by_example = [rows for _, rows in found if rows is not None]
        if by_example:
            sums = parts[0].new_zeros(num, self.num_groups, _size(self.grouped))
            parts.append(sums.index_add_(1, groups, torch.cat(by_example, 2)).flatten(1))
        return torch.cat(parts, 1)

    def of_examples(self, outcome: Outcome, num: int) -> Tensor:
        """(P, B, K) float64: what is kept of the examples of a batch."""
        num_rows = len(outcome.losses)
        found = [_sums(name, metric, outcome, num_rows).double() for name, metric in self.kept.items()]
        return torch.cat(found, 1).view(num, num_rows // num, self.kept_width)

    def values(self, rows: Tensor) -> list[dict[str, float]]:
        """The metrics of each model on all examples, of rows (M, W + n K)."""
        ones = torch.ones(self.num_examples, dtype=torch.float64)
        found = {name: [metric.value(sums) for sums in part] for name, metric, part in _parts(self.added, rows)}
        found |= {name: [metric.value(kept, ones) for kept in part] for name, metric, part in _parts(self.kept, self._kept(rows))}
        return self._by_model(found, len(rows))

    def on_own(self, rows: Tensor, peers: Sequence[int] | None = None) -> list[dict[str, float]]:
        """The metrics of the model of each of `peers` (P, ...), or of all peers, on its own distribution.

        Of a single row: of one model on all of their distributions.
        """
        weights, start = self.own.weights if peers is None else self.own.weights[list(peers)], _size(self.added)
        by_group = rows[:, start:self.width].view(len(rows), self.num_groups, -1)
        found = {name: [metric.value(sums) for sums in (part * weights[:, :, None]).sum(1)]
                 for name, metric, part in _parts(self.grouped, by_group)}
        of_examples = weights[:, self.own.groups]
        found |= {name: [metric.value(kept, one) for kept, one in zip(part.expand(len(weights), -1, -1), of_examples, strict=True)]
                  for name, metric, part in _parts(self.kept, self._kept(rows))}
        return self._by_model(found, len(weights))

    def _kept(self, rows: Tensor) -> Tensor:
        return rows[:, self.width:].view(len(rows), self.num_examples, self.kept_width)

    def _by_model(self, found: Mapping[str, Sequence[float]], num: int) -> list[dict[str, float]]:
        return [{name: found[name][k] for name in self.metrics if name in found} for k in range(num)]


def _sums(name: str, metric: Metric, outcome: Outcome, num: int) -> Tensor:
    """ValueError for a metric from outside whose sums have another shape than it says."""
    found = metric.sums(outcome, num)
    if found.shape != (num, metric.size):
        raise ValueError(f"metric {name!r}: the sums of {num} blocks are of shape {tuple(found.shape)}; "
                         f"allowed: ({num}, {metric.size})")
    return found


def _size(metrics: Mapping[str, Metric]) -> int:
    return sum(metric.size for metric in metrics.values())


def _parts(metrics: Mapping[str, Metric], rows: Tensor) -> Iterator[tuple[str, Metric, Tensor]]:
    """Each metric with its part of the last dimension of `rows`."""
    end = 0
    for name, metric in metrics.items():
        begin, end = end, end + metric.size
        yield name, metric, rows[..., begin:end]
