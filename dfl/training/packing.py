"""Whether a model keeps packed examples apart, found out before a run: not every architecture makes its mask of the positions."""

from typing import Any

import numpy as np
import torch

from dfl.adapters.attach import Adapted, adapters_off

# of the largest logit; rounding of a row of another length stays far below it, a leak far above
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


@torch.no_grad()
def check_packing(adapted: Adapted, task: Any) -> None:
    """ValueError for a base model that sees one packed example from another: its logits then differ from those alone."""
    model = adapted.model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)
    features = [{"input_ids": ids, "labels": ids} for ids in (rng.integers(0, vocabulary, size=n).astype(np.int32) for n in (5, 7, 4))]
    device = next(model.parameters()).device
    with adapters_off(adapted):
        together = _logits(model, task, [task.pack(features)], device)[0]
        alone = torch.cat([_logits(model, task, [feature], device)[0] for feature in features])
    difference, largest = float((together - alone).abs().max()), float(alone.abs().max())
    if not difference <= _TOLERANCE.get(next(model.parameters()).dtype, 1e-1) * max(largest, 1e-3):
        raise ValueError(f"data.packing = True: the architecture {model.config.model_type!r} lets packed examples see each other "
                         f"(their logits differ by {difference:.2g}, the largest is {largest:.2g}); allowed with it: false")


def _logits(model: torch.nn.Module, task: Any, features: list[dict], device: torch.device) -> torch.Tensor:
    batch = {key: value.to(device) for key, value in task.collate(features).items()}
    return model(**task.inputs(batch)).logits.float()
