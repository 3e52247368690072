"""The same classifier with fewer operations: padding is left out, and the last layer is computed for the first token
alone.

A plug-in of the recipes of this study (`plugins: [benchmarks.evidence.packed]`): it replaces the forward pass of BERT's
classifier by one that gives the same logits up to rounding (`tests/pure/test_evidence.py`), at less than half the time
on a CPU. Half of a batch of short questions is padding, and of the last layer a classifier reads the first token only.
Not for training with dropout inside the layers, and not for models other than BERT.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput


def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None,
            **_ignored) -> SequenceClassifierOutput:
    """Logits (N, C) of token ids (N, L) with a mask of ones, then zeros."""
    num, width = input_ids.shape
    kept = attention_mask.flatten().nonzero().squeeze(1)  # (T,) the real tokens of the flattened batch
    positions = torch.arange(width).expand(num, width).flatten()[kept]
    types = torch.zeros_like(kept) if token_type_ids is None else token_type_ids.flatten()[kept]
    hidden = self.bert.embeddings(input_ids=input_ids.flatten()[kept][None], token_type_ids=types[None],
                                  position_ids=positions[None])[0]
    first = attention_mask.sum(1).cumsum(0) - attention_mask.sum(1)  # where each text begins among the kept
    visible = attention_mask.bool()[:, None, None]
    *layers, last = self.bert.encoder.layer
    for layer in layers:
        hidden = _layer(layer, hidden, None, kept, (num, width), visible)
    hidden = _layer(last, hidden, first, kept, (num, width), visible)
    pooled = self.bert.pooler(hidden[:, None])  # the first and only token of each text
    return SequenceClassifierOutput(logits=self.classifier(self.dropout(pooled)))


def _layer(layer, hidden: Tensor, only: Tensor | None, kept: Tensor, shape: tuple[int, int], visible: Tensor) -> Tensor:
    """A layer on the tokens (T, D); its output at all of them, or at the tokens `only` (N,), one a text."""
    attention, (num, width) = layer.attention.self, shape
    heads, size = attention.num_attention_heads, attention.attention_head_size
    wanted = hidden if only is None else hidden[only]

    def spread(tokens: Tensor) -> Tensor:
        padded = tokens.new_zeros(num * width, heads * size).index_copy(0, kept, tokens)
        return padded.view(num, width, heads, size).transpose(1, 2)

    query = attention.query(wanted)
    query = spread(query) if only is None else query.view(num, 1, heads, size).transpose(1, 2)
    key, value = spread(attention.key(hidden)), spread(attention.value(hidden))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    mixed = mixed.transpose(1, 2).reshape(-1, heads * size)
    attended = layer.attention.output(mixed[kept] if only is None else mixed, wanted)
    return layer.output(layer.intermediate(attended), attended)


BertForSequenceClassification.forward = forward
