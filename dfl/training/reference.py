"""What the base model says to a batch, for tasks that measure against it: a pass with the adapters off."""

from typing import Any

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, adapters_off


def with_reference(task: Any, adapted: Adapted, batch: dict[str, Tensor], autocast: bool = False) -> dict[str, Tensor]:
    """The batch, with `reference`, the task's scores of the base model, where the task needs them; once is enough.

    The base model is the one whose adapters add nothing, without dropout, whatever the adapters are bound to at the moment.
    """
    if not getattr(task, "needs_reference", False) or "reference" in batch:
        return batch
    model, device = adapted.model, next(iter(batch.values())).device
    training = model.training
    model.eval()
    with torch.no_grad(), adapters_off(adapted), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output = model(**task.inputs(batch))
    model.train(training)
    return {**batch, "reference": task.score(output, batch)}
