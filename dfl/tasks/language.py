"""The next token: of plain text, of the response to a prompt, of what the assistant says in a conversation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dfl.config import DataConfig
from dfl.metrics.base import IGNORED, Outcome, blocks
from dfl.tasks import chat
from dfl.tasks.base import Encoded, pad, without_labels
from dfl.tasks.tables import Table, column, texts


@dataclass(frozen=True)
class CausalLM:
    """The next token of plain text, of a response given its prompt, or of conversations."""

    pad_id: int

    name = "causal_lm"
    predicts = "token"
    metrics = ("perplexity", "loss")
    auto_class = "AutoModelForCausalLM"
    modality = "text"
    labelled = False

    @classmethod
    def build(cls, processor: Any) -> "CausalLM":
        return cls(processor.pad_token_id)

    @staticmethod
    def talks(table: Table, data: DataConfig) -> bool:
        """Whether the rows are conversations, which go through the chat template."""
        return data.messages is not None or (data.prompt is not None and chat.holds_messages(table, data.prompt))

    @staticmethod
    def check(table: Table, data: DataConfig) -> None:
        """ValueError for columns that are not there or hold no text, and for a prompt without a response."""
        if (data.prompt is None) != (data.response is None):
            raise ValueError(f"data.prompt = {data.prompt!r} and data.response = {data.response!r}: give both of them, "
                             "or neither for plain text")
        if data.messages is not None and data.prompt is not None:
            raise ValueError(f"data.messages = {data.messages!r} and data.prompt = {data.prompt!r}: a row is a conversation, or a "
                             "prompt and its response; give one of them")
        chat.check_fields(table, data, CausalLM.talks(table, data))
        if data.messages is not None:
            chat.conversations(table, "messages", data.messages)
        elif data.prompt is not None and chat.holds_messages(table, data.prompt):
            chat.conversations(table, "prompt", data.prompt)
            column(table, "response", data.response)
        else:
            for key in ("text",) if data.prompt is None else ("prompt", "response"):
                texts(table, key, getattr(data, key))

    @staticmethod
    def encode(table: Table, labels: np.ndarray, data: DataConfig, processor: Any) -> Encoded:
        """A feature per row: input_ids and labels, at most data.max_length tokens; of a prompt, and of what others say in a
        conversation, masked.

        ValueError where no row has a token to predict, and for a conversation that the chat template does not take.
        """
        end, limit = end_of(processor), data.max_length
        if CausalLM.talks(table, data):
            talks = _conversations(table, data, chat.Renderer(processor, data))
            rows = [(ids[:limit], targets[:limit]) for ids, targets in talks]
            cut = {"text": sum(len(ids) > limit for ids, _ in talks)}
        elif data.prompt is None:
            given = token_ids(processor, texts(table, "text", data.text))
            rows = [plain(ids, end, limit) for ids in given]
            cut = {"text": sum(len(ids) > limit for ids in given)}
        else:
            prompts = token_ids(processor, texts(table, "prompt", data.prompt))
            responses = token_ids(processor, texts(table, "response", data.response), add_special_tokens=False)
            rows = [answer(p, r, end, limit) for p, r in zip(prompts, responses, strict=True)]
            cut = _lost(rows, prompts, responses, end)
        cut["nothing"] = _num_without_target(rows, table)
        # a model needs a token to read, also where it has none to predict
        return Encoded([{"input_ids": np.array(ids or [processor.pad_token_id], dtype=np.int32),
                         "labels": np.array(targets or [IGNORED], dtype=np.int32)} for ids, targets in rows], cut)

    @staticmethod
    def pack(features: Sequence[dict]) -> dict[str, np.ndarray]:
        """Several examples as one row. position_ids begin anew with each, by which models keep them apart; the first token of an
        example is nobody's to predict."""
        labels = [np.concatenate([[IGNORED], f["labels"][1:]]).astype(np.int32) for f in features]
        return {"input_ids": np.concatenate([f["input_ids"] for f in features]), "labels": np.concatenate(labels),
                "position_ids": np.concatenate([np.arange(len(f["input_ids"]), dtype=np.int32) for f in features])}

    @staticmethod
    def inputs(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the forward pass takes; of packed rows no mask, as the models make one of the positions, and no cache, which would
        keep them from it."""
        given = without_labels(batch)
        return given | {"use_cache": False} if "position_ids" in batch else given

    def collate(self, features: Sequence[dict], pad_to_multiple: int | None = None) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels (B, L), padded to the longest of the list; labels with -100. Of packed rows
        position_ids in place of the mask: padding is one more example, which nobody is asked about."""
        ids, mask = pad([f["input_ids"] for f in features], self.pad_id, pad_to_multiple)
        labels, _ = pad([f["labels"] for f in features], IGNORED, pad_to_multiple)
        if "position_ids" not in features[0]:
            return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        rows = [np.concatenate([f["position_ids"], np.arange(ids.shape[1] - len(f["position_ids"]))]) for f in features]
        return {"input_ids": ids, "position_ids": torch.from_numpy(np.stack(rows).astype(np.int64)), "labels": labels}

    def weights(self, batch: dict[str, torch.Tensor], num_groups: int) -> torch.Tensor:
        """(G,) float32: how many tokens of each block the loss is the mean over; so much it counts among those of a step."""
        return blocks((batch["labels"][:, 1:] != IGNORED).float(), num_groups).sum(1)

    def losses(self, output: Any, batch: dict[str, torch.Tensor], num_groups: int) -> torch.Tensor:
        """(G,) float32: the mean cross-entropy of each block over its unmasked tokens."""
        loss, counted, _ = self._tokens(output, batch)
        return blocks(loss, num_groups).sum(1) / blocks(counted, num_groups).sum(1).clamp(min=1)

    def outcome(self, output: Any, batch: dict[str, torch.Tensor]) -> Outcome:
        """T = L - 1 items of each row: position l predicts token l + 1."""
        loss, counted, targets = self._tokens(output, batch)
        # a loss that is not a number comes of logits that are not
        return Outcome(loss, counted, targets, lambda: output.logits[:, :-1].argmax(-1).masked_fill(loss.isnan(), -1))

    def answers(self, output: Any, batch: dict[str, torch.Tensor]) -> list[dict[str, float]]:
        """How well the model foresees each row: its mean loss, over how many tokens, and how many of them it names."""
        outcome = self.outcome(output, batch)
        rows = zip(*(value.sum(1).tolist() for value in (outcome.losses, outcome.correct, outcome.counted)), strict=True)
        return [{"loss": loss / count if count else math.nan, "tokens": count, "correct": correct} for loss, correct, count in rows]

    @staticmethod
    def _tokens(output: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss (0 where masked), what counts, and targets, (B, L - 1) each: position l predicts token l + 1."""
        targets = batch["labels"][:, 1:]
        logits = output.logits[:, :-1].float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none",
                               ignore_index=IGNORED)
        return loss.view(targets.shape), targets != IGNORED, targets


def plain(ids: list[int], end: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Tokens and targets of a plain text, with the end-of-text token where the text is whole."""
    ids = (ids + end if ids[-1:] != end else ids)[:limit]
    return ids, ids


def answer(prompt: list[int], response: list[int], end: list[int], limit: int) -> tuple[list[int], list[int]]:
    """Tokens and targets of a prompt and its response; a long prompt loses its beginning, and at most half the room."""
    prompt = opened(prompt, end)
    response = (response + end)[:max(limit - len(prompt), limit // 2)]
    prompt = prompt[max(0, len(prompt) + len(response) - limit):]
    return prompt + response, [IGNORED] * len(prompt) + response


def opened(ids: list[int], end: list[int]) -> list[int]:
    """Without the end-of-text token, with which some tokenizers close every text."""
    return ids[:-1] if end and ids[-1:] == end else ids


def end_of(processor: Any) -> list[int]:
    return [] if processor.eos_token_id is None else [processor.eos_token_id]


def token_ids(processor: Any, rows: list[str], **options: Any) -> list[list[int]]:
    return processor(rows, return_attention_mask=False, verbose=False, **options)["input_ids"]


def _conversations(table: Table, data: DataConfig, renderer: chat.Renderer) -> list[chat.Tokens]:
    """Every row through the chat template: a conversation, or a prompt of messages with its response."""
    where = [f"line {line} of {table.where}" for line in table.lines]
    if data.messages is not None:
        told = [(messages, 0) for messages in chat.conversations(table, "messages", data.messages)]
    else:
        prompts = chat.conversations(table, "prompt", data.prompt)
        responses = [chat.said_by("assistant", value, place) for value, place in zip(table.columns[data.response], where, strict=True)]
        told = [(prompt + response, len(prompt)) for prompt, response in zip(prompts, responses, strict=True)]
    found = []
    for (messages, first), place, tool in zip(told, where, chat.tools_of(table, data), strict=True):
        whole = chat.with_system(messages, data)
        found.append(renderer.tokens(whole, place, tool, first and first + len(whole) - len(messages)))
    return found


def _lost(rows: Sequence, prompts: list[list[int]], responses: list[list[int]], end: list[int]) -> dict[str, int]:
    """Rows of `answer` whose prompt, and whose response, is not all there."""
    kept = [sum(target == IGNORED for target in targets) for _, targets in rows]
    whole = [len(prompt) - bool(end and prompt[-1:] == end) for prompt in prompts]
    answered = [len(ids) - k for (ids, _), k in zip(rows, kept, strict=True)]
    return {"prompt": sum(k < n for k, n in zip(kept, whole, strict=True)),
            "response": sum(n < len(response) for n, response in zip(answered, responses, strict=True))}


def _num_without_target(rows: Sequence, table: Table) -> int:
    """Rows that leave no token to predict. ValueError where all of them do, which names the first."""
    without = [i for i, (_, targets) in enumerate(rows) if all(target == IGNORED for target in targets[1:])]
    if len(without) == len(rows):
        raise ValueError(f"no row of {table.where} leaves a token to predict (line {table.lines[0]}: an empty text?)")
    return len(without)
