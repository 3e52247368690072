"""One label for a text or a pair of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dfl.config import DataConfig
from dfl.tasks.base import Encoded, LabelLoss, pad
from dfl.tasks.tables import Table, texts


@dataclass(frozen=True)
class SequenceClassification(LabelLoss):
    """One label for each text, or pair of texts; encoders and decoders."""

    pad_id: int

    name = "sequence_classification"
    auto_class = "AutoModelForSequenceClassification"
    modality = "text"
    labelled = True

    @classmethod
    def build(cls, processor: Any) -> "SequenceClassification":
        return cls(processor.pad_token_id)

    @staticmethod
    def check(table: Table, data: DataConfig) -> None:
        """ValueError for columns that are not there or hold no text."""
        texts(table, "text", data.text)
        if data.pair is not None:
            texts(table, "pair", data.pair)

    @staticmethod
    def encode(table: Table, labels: np.ndarray, data: DataConfig, processor: Any) -> Encoded:
        """A feature per row: input_ids, token_type_ids where the tokenizer has them, labels; cut to data.max_length.

        ValueError where no row has a token.
        """
        pairs = None if data.pair is None else texts(table, "pair", data.pair)
        encoded = processor(texts(table, "text", data.text), pairs, truncation=True, max_length=data.max_length,
                            return_attention_mask=False)
        if not any(encoded["input_ids"]):
            raise ValueError(f"data.text = {data.text!r}: no row of {table.where} has a token (only empty texts?)")
        # an encoder puts its own tokens around nothing, a decoder does not: a model needs one
        instead = {"input_ids": [processor.pad_token_id], "token_type_ids": [0]}
        keys = [key for key in instead if key in encoded]
        features = [{key: np.array(encoded[key][i] or instead[key], dtype=np.int32) for key in keys} | {"labels": int(label)}
                    for i, label in enumerate(labels)]
        return Encoded(features, {"text": _num_cut(encoded, data.max_length)})

    def collate(self, features: Sequence[dict], pad_to_multiple: int | None = None) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and token_type_ids (B, L), labels (B,), padded to the longest of the list."""
        ids, mask = pad([f["input_ids"] for f in features], self.pad_id, pad_to_multiple)
        batch = {"input_ids": ids, "attention_mask": mask.long()}
        if "token_type_ids" in features[0]:
            batch["token_type_ids"] = pad([f["token_type_ids"] for f in features], 0, pad_to_multiple)[0]
        batch["labels"] = torch.tensor([f["labels"] for f in features])
        return batch


def _num_cut(encoded: Any, limit: int) -> int:
    """Rows that were longer than data.max_length; of a tokenizer that does not say, those that are as long."""
    if encoded.encodings is None:
        return sum(len(ids) >= limit for ids in encoded["input_ids"])
    return sum(bool(one.overflowing) for one in encoded.encodings)
