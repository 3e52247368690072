"""What is measured of a round and of a model: disagreement, cross term, layers, and the metrics of an evaluation.

A metric is a row of a table from name to factory, `METRICS[name](num_classes, **parameters) -> Metric`; num_classes: of the
data, 0 where there are none.
"""

from collections.abc import Callable

from dfl.metrics.base import Metric
from dfl.metrics.classes import macro_f1, matthews
from dfl.metrics.items import accuracy, exact_match, loss, margin, perplexity
from dfl.metrics.numbers import pearson, spearman

METRICS: dict[str, Callable[..., Metric]] = {"accuracy": accuracy, "macro_f1": macro_f1, "matthews": matthews,
                                             "perplexity": perplexity, "exact_match": exact_match, "pearson": pearson,
                                             "spearman": spearman, "margin": margin, "loss": loss}
