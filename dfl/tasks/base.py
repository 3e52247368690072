"""What a task hands to the loop: splits of tokenised examples, a collate, losses by group, and what metrics are made from.

Shapes: B rows, L tokens, C labels, G groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from dfl.metrics.base import Outcome, blocks


@dataclass(frozen=True)
class Split:
    """Examples ready for `Task.collate`: `features[i]` is one, not padded; `labels` (n,) int64; `columns` as in the file,
    and the `lines` they come from. `cut`: as of `Encoded`."""

    features: Sequence[dict[str, Any]]
    labels: np.ndarray
    label_names: list[str]
    columns: Mapping[str, list]
    lines: Sequence[int] = ()
    cut: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        """(n,) int64: tokens of each example. ValueError where examples are no texts."""
        if hasattr(self.features, "lengths"):
            return self.features.lengths
        if "input_ids" not in self.features[0]:
            raise ValueError("data.packing and data.group_by_length need examples of tokens; allowed with images: false")
        return np.array([len(feature["input_ids"]) for feature in self.features], dtype=np.int64)


class Encoded(NamedTuple):
    """A feature per row, and how many rows lost what to data.max_length: the end of a `text` or `response`, the beginning
    of a `prompt`, or everything that there was to predict (`nothing`, also of an empty text)."""

    features: Sequence[dict[str, Any]]
    cut: Mapping[str, int] = {}


class Task(Protocol):
    """What the loop asks of a task. A batch is made of `num_groups` equal blocks of consecutive rows, one block a peer."""

    name: str
    predicts: str  # class, token or number (`dfl.metrics.base.PREDICTS`): which metrics suit it
    metrics: tuple[str, ...]  # evaluated where a recipe names none; the first is the primary one

    def collate(self, features: Sequence[dict], pad_to_multiple: int | None = None) -> dict[str, torch.Tensor]: ...

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    def losses(self, output: Any, batch: dict[str, torch.Tensor], num_groups: int) -> torch.Tensor: ...

    def outcome(self, output: Any, batch: dict[str, torch.Tensor]) -> Outcome: ...

    def answers(self, output: Any, batch: dict[str, torch.Tensor]) -> list[dict[str, float]]: ...


@dataclass(frozen=True)
class Bundle:
    """A model on the CPU, frozen and in evaluation mode, with its data and task."""

    model: torch.nn.Module
    processor: Any
    train: Split
    valid: Split
    task: Task
    head_modules: tuple[str, ...]
    base_name: str
    facts: dict[str, Any] = field(default_factory=dict)


def without_labels(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the forward pass takes: a model given labels would compute a loss of its own."""
    return {key: value for key, value in batch.items() if key != "labels"}


def pad(rows: Sequence[Sequence[int]], value: int, multiple: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as one (B, L) int64 tensor, filled up on the right with `value`, and what is real."""
    lengths = np.array([len(row) for row in rows])
    width = max(int(lengths.max()), 1)
    if multiple:
        width = -(-width // multiple) * multiple
    mask = np.arange(width) < lengths[:, None]
    padded = np.full(mask.shape, value, dtype=np.int64)
    padded[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return torch.from_numpy(padded), torch.from_numpy(mask)


class LabelLoss:
    """Losses and predictions of one label per example, from `output.logits` (B, C)."""

    predicts = "class"
    metrics = ("accuracy", "loss")
    inputs = staticmethod(without_labels)

    def losses(self, output: Any, batch: dict[str, torch.Tensor], num_groups: int) -> torch.Tensor:
        """(G,) float32: the mean cross-entropy of each block."""
        return blocks(self._row_losses(output, batch), num_groups).mean(1)

    def outcome(self, output: Any, batch: dict[str, torch.Tensor]) -> Outcome:
        losses = self._row_losses(output, batch)[:, None]

        def predict() -> torch.Tensor:
            # argmax takes NaN for the largest: a model that has diverged would get credit for one class
            return output.logits.argmax(-1).masked_fill(output.logits.isnan().any(-1), -1)[:, None]

        return Outcome(losses, torch.ones_like(losses, dtype=torch.bool), batch["labels"][:, None], predict)

    def answers(self, output: Any, batch: dict[str, torch.Tensor]) -> list[dict[str, float]]:
        """What the model says to each row: the index of its label, and the probability it gives it."""
        top = output.logits.float().softmax(-1).max(-1)
        return [{"prediction": int(k), "probability": float(p)} for k, p in zip(top.indices, top.values, strict=True)]

    @staticmethod
    def _row_losses(output: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(output.logits.float(), batch["labels"], reduction="none")
