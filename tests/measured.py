"""The metrics of a task, of outcomes that a test makes itself."""

import torch

from dfl.config.schema import EvalConfig, Plugin
from dfl.metrics.choice import choose
from dfl.metrics.tally import Tally


def measured(task, outcomes, num_models: int = 1, num_classes: int = 2, metrics=None) -> list[dict[str, float]]:
    """Of the outcomes of all batches, each of equal blocks of rows for so many models; metrics: names, None for the task's own."""
    named = None if metrics is None else tuple(map(Plugin, metrics))
    num_examples = sum(len(one.losses) for one in outcomes) // num_models
    tally = Tally(choose(EvalConfig(metrics=named), task, num_classes), num_examples)
    added = sum(tally.of_batch(one, num_models, None) for one in outcomes)
    kept = [tally.of_examples(one, num_models) for one in outcomes if tally.kept]
    return tally.values(torch.cat([added, torch.cat(kept, 1).flatten(1)], 1) if kept else added)
