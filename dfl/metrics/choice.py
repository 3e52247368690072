"""Which metrics a run evaluates: those that its recipe names, or the task's own."""

from collections.abc import Mapping
from typing import Any

from dfl.config.schema import EvalConfig, Plugin
from dfl.metrics import METRICS
from dfl.metrics.base import Metric
from dfl.plugins import check_parameters, first_line, lookup, parameters

# what a record has beside the metrics of an evaluation
RESERVED = ("peers", "consensus", "own", "gap", "samples", "answer_match")


def choose(config: EvalConfig, task: Any, num_classes: int) -> dict[str, Metric]:
    """The metrics by name, the primary one first, the loss always among them. task: an instance of a task, or its class.

    ValueError for a name or parameter that is not known, and for a metric of what the task does not predict.
    """
    named = [Plugin(name) for name in task.metrics] if config.metrics is None else list(config.metrics)
    known = {one.name: one.params for one in named}
    if len(known) < len(named):
        twice = next(one.name for k, one in enumerate(named) if one.name in [other.name for other in named[:k]])
        raise ValueError(f"eval.metrics names {twice!r} twice; a record has one value of that name")
    own = task.metrics[0]
    primary = config.primary or (own if own in known or not named else named[0].name)
    found = {name: _build("eval.metrics", name, params, task, num_classes) for name, params in known.items()}
    if primary not in found:
        found[primary] = _build("eval.primary", primary, {}, task, num_classes)
    if "loss" not in found:
        found["loss"] = METRICS["loss"](num_classes)
    return {primary: found.pop(primary), **found}


def _build(field: str, name: str, params: Mapping[str, Any], task: Any, num_classes: int) -> Metric:
    factory = lookup(field, METRICS, name)
    check_parameters(field, name, factory, params)
    if name in RESERVED:
        raise ValueError(f"{field} = {name!r}: a record has something else of that name; allowed: a metric of another name")
    metric = factory(num_classes, **params)
    if not suits(metric, task):
        others = [other for other, make in METRICS.items() if not _needs(make) and suits(make(2), task)]
        raise ValueError(f"{field} = {name!r} is of a predicted {' or '.join(metric.suits)}, but model.task = {task.name!r} predicts "
                         f"a {task.predicts}; allowed with it: {', '.join(others)}")
    return metric


def suits(metric: Metric, task: Any) -> bool:
    return metric.suits is None or task.predicts in metric.suits


def describe() -> dict[str, str]:
    """A line for each metric: what it is, what it is of, and which way it gets better."""
    return {name: f"{first_line(factory)}{_kind(factory)}" for name, factory in METRICS.items()}


def _needs(factory) -> bool:
    return any(one.default is one.empty for one in parameters(factory).values())


def _kind(factory) -> str:
    if _needs(factory):
        return ""
    metric = factory(2)
    what = "any task" if metric.suits is None else f"a predicted {' or '.join(metric.suits)}"
    return f" Of {what}; {'higher' if metric.higher_is_better else 'lower'} is better."
