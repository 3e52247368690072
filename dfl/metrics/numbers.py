"""Metrics of predicted numbers: the correlations of Pearson and of Spearman with the targets."""

import math

import torch
from torch import Tensor

from dfl.metrics.base import Metric, Outcome, block_sums


def pearson(num_classes: int) -> Metric:
    """Pearson's correlation of predicted numbers and targets; none where one of them does not vary.

    From six sums: how many there are, both, their squares and their product. About half of the digits of float64 are left
    where a number's mean is ten thousand times its spread.
    """
    def sums(outcome: Outcome, num: int) -> Tensor:
        x, y = outcome.predictions.double(), outcome.targets.double()
        return block_sums(num, torch.ones_like(x), x, y, x * x, y * y, x * y)

    return Metric(sums, _correlation, size=6, suits=("number",))


def spearman(num_classes: int) -> Metric:
    """Spearman's correlation: Pearson's of the ranks of predicted numbers and targets.

    Equal numbers share the mean of their ranks. A weight counts an example as if it were there so many times.
    """
    def value(kept: Tensor, weights: Tensor) -> float:
        if not (kept.isfinite().all() and weights.isfinite().all()):
            return math.nan
        x, y = (_ranks(column, weights) for column in kept.T)
        ones = torch.ones_like(x)
        return _correlation(torch.stack([ones, x, y, x * x, y * y, x * y]) @ weights)

    return Metric(lambda outcome, num: block_sums(num, outcome.predictions.double(), outcome.targets.double()), value, size=2,
                  suits=("number",), per_example=True)


def _correlation(sums: Tensor) -> float:
    num, x, y, xx, yy, xy = sums.tolist()
    if not num > 0:
        return math.nan
    spread_x, spread_y = xx - x * x / num, yy - y * y / num
    # what rounding leaves of a number that does not vary is no spread
    if not (spread_x > 1e-14 * xx and spread_y > 1e-14 * yy):
        return math.nan
    return max(-1.0, min(1.0, (xy - x * y / num) / math.sqrt(spread_x * spread_y)))


def _ranks(values: Tensor, weights: Tensor) -> Tensor:
    """(n,) ranks around 0, of equal values the middle one; ranks and their differences count weights."""
    _, group = values.unique(return_inverse=True)
    of_group = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, weights)
    ranks = (of_group.cumsum(0) - of_group / 2)[group]
    return ranks - (ranks @ weights) / weights.sum()
