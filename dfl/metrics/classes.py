"""Metrics of class predictions that weigh rare classes: macro-F1 and Matthews' correlation.

Both follow from three counts of each class c, which are the margins and the diagonal of the confusion matrix: how often it
is predicted rightly (r_c), predicted (p_c), and the target (t_c). A model that has diverged predicts no class.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfl.metrics.base import Metric, Outcome, blocks


def macro_f1(num_classes: int) -> Metric:
    """Mean over classes of F1 = 2 r / (p + t), of those that are predicted or a target at all."""
    def value(sums: Tensor) -> float:
        right, predicted, target = sums.view(3, -1)
        there = predicted + target > 0
        return float((2 * right[there] / (predicted + target)[there]).mean())

    return Metric(_counts(num_classes), value, size=3 * num_classes, suits=("class",))


def matthews(num_classes: int) -> Metric:
    """Matthews' correlation of predicted and true classes, from -1 to 1; 0 where one of them does not vary.

    Of several classes, R_K (Gorodkin, 2004): (r n - p·t) / sqrt((n² - p·p) (n² - t·t)), r and n the sums of r_c and t_c.
    """
    def value(sums: Tensor) -> float:
        right, predicted, target = sums.view(3, -1)
        num = float(target.sum())
        none = num - float(predicted.sum())  # predictions of no class
        covariance = float(right.sum()) * num - float(predicted @ target)
        spreads = num**2 - float(predicted @ predicted) - none**2, num**2 - float(target @ target)
        # what rounding leaves of weighted counts is no spread
        return math.nan if not num > 0 else covariance / math.sqrt(math.prod(spreads)) if min(spreads) > 1e-12 * num**2 else 0.0

    return Metric(_counts(num_classes), value, size=3 * num_classes, suits=("class",))


def _counts(num_classes: int):
    def sums(outcome: Outcome, num: int) -> Tensor:
        known = outcome.predictions >= 0
        target = F.one_hot(outcome.targets, num_classes)
        predicted = F.one_hot(outcome.predictions.clamp(min=0), num_classes) * known[..., None]
        rows = torch.cat([predicted * target, predicted, target], -1)  # (B, 1, 3 C)
        return blocks(rows, num).view(num, -1, 3 * num_classes).sum(1).float()

    return sums
