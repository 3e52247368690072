"""A number for a text or a pair of texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dfl.config import DataConfig
from dfl.metrics.base import Outcome, blocks
from dfl.tasks.base import Encoded
from dfl.tasks.classification import SequenceClassification
from dfl.tasks.tables import Table, numbers


@dataclass(frozen=True)
class SequenceRegression(SequenceClassification):
    """A number for each text, or pair of texts, by its squared error; encoders and decoders.

    The numbers are taken as they stand in the column: a new head begins near 0, so that targets far from it take long.
    """

    name = "sequence_regression"
    labelled = False  # by classes
    predicts = "number"
    metrics = ("pearson", "spearman", "loss")

    @staticmethod
    def check(table: Table, data: DataConfig) -> None:
        """ValueError for columns that are not there, hold no text, or hold no number."""
        SequenceClassification.check(table, data)
        numbers(table, "label", data.label)

    @staticmethod
    def encode(table: Table, labels: np.ndarray, data: DataConfig, processor: Any) -> Encoded:
        """As of a classification; labels (1,) float32: the numbers, which the digest of the examples covers."""
        encoded = SequenceClassification.encode(table, labels, data, processor)
        targets = np.array(numbers(table, "label", data.label), dtype=np.float32)[:, None]
        return Encoded([one | {"labels": target} for one, target in zip(encoded.features, targets, strict=True)], encoded.cut)

    def collate(self, features: Sequence[dict], pad_to_multiple: int | None = None) -> dict[str, torch.Tensor]:
        """As of a classification; labels (B,) float32."""
        batch = super().collate([one | {"labels": 0} for one in features], pad_to_multiple)
        return batch | {"labels": torch.from_numpy(np.concatenate([one["labels"] for one in features]))}

    def losses(self, output: Any, batch: dict[str, torch.Tensor], num_groups: int) -> torch.Tensor:
        """(G,) float32: the mean squared error of each block."""
        return blocks((_said(output) - batch["labels"]).square(), num_groups).mean(1)

    def outcome(self, output: Any, batch: dict[str, torch.Tensor]) -> Outcome:
        said, targets = _said(output)[:, None], batch["labels"][:, None]
        return Outcome((said - targets).square(), torch.ones_like(said, dtype=torch.bool), targets, lambda: said)

    def answers(self, output: Any, batch: dict[str, torch.Tensor]) -> list[dict[str, float]]:
        """What the model says to each row, and what it should."""
        rows = zip(batch["labels"].tolist(), _said(output).tolist(), strict=True)
        return [{"label": target, "prediction": said, "error": said - target if math.isfinite(said) else math.nan}
                for target, said in rows]


def _said(output: Any) -> torch.Tensor:
    """(B,) float32 of `output.logits` (B, 1)."""
    return output.logits.float().squeeze(-1)
