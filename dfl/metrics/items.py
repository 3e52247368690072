"""Metrics of labels and tokens that are means over items or examples: loss, perplexity, accuracy, exact match."""

import math

from torch import Tensor

from dfl.metrics.base import Metric, Outcome, block_sums, ratio


def accuracy(num_classes: int) -> Metric:
    """Share of the labels, or of the tokens to predict, that are right; of pairs, those whose chosen response gained."""
    return Metric(lambda outcome, num: block_sums(num, outcome.correct, outcome.counted), ratio, size=2,
                  suits=("class", "token", "preference"))


def loss(num_classes: int) -> Metric:
    """What training minimises: mean cross-entropy, or mean squared error."""
    return Metric(_losses, ratio, size=2, higher_is_better=False)


def perplexity(num_classes: int) -> Metric:
    """exp of the mean cross-entropy of a token."""
    return Metric(_losses, lambda sums: _exp(ratio(sums)), size=2, higher_is_better=False, suits=("token",))


def exact_match(num_classes: int) -> Metric:
    """Share of the responses of which every token is right.

    Each token is predicted from the right ones before it. All of them are right exactly where greedy decoding would give
    the whole response, end included.
    """
    def sums(outcome: Outcome, num: int) -> Tensor:
        counted = outcome.counted.any(1)
        return block_sums(num, (outcome.correct == outcome.counted).all(1) & counted, counted)

    return Metric(sums, ratio, size=2, suits=("token",))


def margin(num_classes: int) -> Metric:
    """Mean margin of the chosen response over the rejected one, in units of the loss."""
    def sums(outcome: Outcome, num: int) -> Tensor:
        assert outcome.margins is not None
        return block_sums(num, outcome.margins, outcome.counted)

    return Metric(sums, ratio, size=2, suits=("preference",))


def _losses(outcome: Outcome, num: int) -> Tensor:
    return block_sums(num, outcome.losses, outcome.counted)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
