"""Which of two responses people prefer: direct preference optimisation, against the base model with its adapter off.

Not here: the passes through the base model, which whoever trains or evaluates makes (`dfl.training.reference`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfl.config import DataConfig
from dfl.metrics.base import IGNORED, Outcome, blocks
from dfl.plugins import check_fraction, check_positive
from dfl.tasks import chat
from dfl.tasks.base import Encoded, pad
from dfl.tasks.language import answer, end_of, opened, token_ids
from dfl.tasks.tables import Table, column, texts


@dataclass(frozen=True)
class Preference:
    """Which of two responses is preferred (DPO: Rafailov et al. 2023, arXiv 2305.18290); parameters beta, label_smoothing.

    With m = beta ((log p(chosen) - log p(rejected)) - the same of the base model), each summed over the tokens of the response, a
    pair's loss is -(1 - e) log sigmoid(m) - e log sigmoid(-m), where e is the share of pairs that are labelled the wrong way round
    (cDPO: Mitchell 2023; 0 is DPO). Rows of a batch: the chosen and the rejected response of each pair, one after the other.
    """

    pad_id: int
    beta: float = 0.1
    label_smoothing: float = 0.0

    name = "preference"
    predicts = "preference"
    metrics = ("accuracy", "margin", "loss")
    auto_class = "AutoModelForCausalLM"
    modality = "text"
    labelled = False
    needs_reference = True

    @classmethod
    def build(cls, processor: Any, *, beta: float = 0.1, label_smoothing: float = 0.0) -> "Preference":
        check_positive("model.task.beta", beta)
        check_fraction("model.task.label_smoothing", label_smoothing)
        return cls(processor.pad_token_id, beta, label_smoothing)

    @staticmethod
    def talks(table: Table, data: DataConfig) -> bool:
        """Whether the rows are conversations, which go through the chat template."""
        return chat.holds_messages(table, data.chosen)

    @staticmethod
    def check(table: Table, data: DataConfig) -> None:
        """ValueError for columns that are not there, or hold neither texts nor conversations."""
        chat.check_fields(table, data, Preference.talks(table, data))
        pair = (("chosen", data.chosen), ("rejected", data.rejected))
        if Preference.talks(table, data):
            for key, name in pair:
                chat.conversations(table, key, name)
            if data.prompt is not None:
                column(table, "prompt", data.prompt)
            return
        if data.prompt is None:
            column(table, "chosen", data.chosen)
            raise ValueError(f"data.prompt = None: column {data.chosen!r} of {table.where} holds texts, responses to a prompt; name "
                             f"its column; it has: {', '.join(table.columns)}")
        for key, name in (("prompt", data.prompt), *pair):
            texts(table, key, name)

    @staticmethod
    def encode(table: Table, labels: np.ndarray, data: DataConfig, processor: Any) -> Encoded:
        """A feature per pair: input_ids and labels of the chosen response behind its prompt, rejected_ids and rejected_labels."""
        end, limit = end_of(processor), data.max_length
        if Preference.talks(table, data):
            told, end = _conversations(table, data, chat.Renderer(processor, data)), []
        else:
            prompts = token_ids(processor, texts(table, "prompt", data.prompt))
            both = [token_ids(processor, texts(table, key, getattr(data, key)), add_special_tokens=False)
                    for key in ("chosen", "rejected")]
            told = list(zip(prompts, *both, strict=True))
        features, cut = [], {"prompt": 0, "response": 0, "nothing": 0}
        for prompt, *responses in told:
            rows = _fitted(prompt, responses, end, limit)
            kept = [sum(target == IGNORED for target in targets) for _, targets in rows]
            cut["prompt"] += kept[0] < len(opened(prompt, end))
            cut["response"] += any(len(ids) - k < len(response) for (ids, _), k, response in zip(rows, kept, responses, strict=True))
            cut["nothing"] += any(k in (0, len(ids)) for (ids, _), k in zip(rows, kept, strict=True))
            (a, a_targets), (b, b_targets) = [(np.array(ids or [processor.pad_token_id], dtype=np.int32),
                                               np.array(targets or [IGNORED], dtype=np.int32)) for ids, targets in rows]
            features.append({"input_ids": a, "labels": a_targets, "rejected_ids": b, "rejected_labels": b_targets})
        if cut["nothing"] == len(features):
            raise ValueError(f"no row of {table.where} leaves a prompt and two responses (line {table.lines[0]}: empty texts?)")
        return Encoded(features, cut)

    def collate(self, features: Sequence[dict], pad_to_multiple: int | None = None) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels (2 B, L): chosen and rejected of every pair."""
        ids, mask = pad([ids for f in features for ids in (f["input_ids"], f["rejected_ids"])], self.pad_id, pad_to_multiple)
        labels, _ = pad([ids for f in features for ids in (f["labels"], f["rejected_labels"])], IGNORED, pad_to_multiple)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    @staticmethod
    def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    @staticmethod
    def score(output: Any, batch: dict[str, Tensor]) -> Tensor:
        """(2 B,) float32: the log-probability of each response, summed over its tokens."""
        targets, logits = batch["labels"][:, 1:], output.logits[:, :-1].float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none", ignore_index=IGNORED)
        return -loss.view(targets.shape).sum(1)

    def losses(self, output: Any, batch: dict[str, Tensor], num_groups: int) -> Tensor:
        """(G,) float32: the mean loss of the pairs of each block. batch["reference"] (2 B,): the base model's scores."""
        return blocks(self._of_pairs(output, batch)[1], num_groups).mean(1)

    def outcome(self, output: Any, batch: dict[str, Tensor]) -> Outcome:
        """One item for each pair, which is right where the margin is above 0."""
        margins, losses = (values[:, None] for values in self._of_pairs(output, batch))
        ones = torch.ones_like(margins, dtype=torch.int64)
        return Outcome(losses, ones.bool(), ones, lambda: (margins > 0).long().masked_fill(margins.isnan(), -1), margins)

    def answers(self, output: Any, batch: dict[str, Tensor]) -> list[dict[str, float]]:
        """How much the model prefers the chosen response of each pair."""
        return [{"margin": float(margin)} for margin in self._of_pairs(output, batch)[0]]

    def _of_pairs(self, output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Margin and loss (B,) of each pair."""
        change = (self.score(output, batch) - batch["reference"]).view(-1, 2)
        margin = self.beta * (change[:, 0] - change[:, 1])
        loss = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        return margin, loss


def _fitted(prompt: list[int], responses: Sequence[list[int]], end: list[int], limit: int) -> list[chat.Tokens]:
    """Tokens and targets of both responses behind as much of the prompt as fits with the longer one."""
    kept = opened(prompt, end)
    longest = max(len(response + end) for response in responses)
    room = limit - min(longest, max(limit - len(kept), limit // 2))
    kept = kept[max(0, len(kept) - room):]
    return [answer(kept, response, end, limit) for response in responses]


def _conversations(table: Table, data: DataConfig, renderer: chat.Renderer) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected response of each row. Without data.prompt it is what both conversations begin with."""
    both = [chat.conversations(table, key, getattr(data, key)) for key in ("chosen", "rejected")]
    prompts = _prompts(table, data, both)
    found = []
    for line, prompt, chosen, rejected, tool in zip(table.lines, prompts, *both, chat.tools_of(table, data), strict=True):
        where, first = f"line {line} of {table.where}", chat.with_system(prompt, data)
        parts = [chat.split_at_answer(renderer.tokens(first + rest, where, tool, len(first)))
                 for rest in (chosen, rejected)]
        found.append((parts[0][0], parts[0][1], parts[1][1]))
    return found


def _prompts(table: Table, data: DataConfig, both: list[list[list[dict]]]) -> list[list[dict]]:
    """Takes what a pair has in common off both, where no column says what the prompt is."""
    if data.prompt is not None:
        return [chat.said_by("user", value, f"data.prompt = {data.prompt!r}: line {line} of {table.where}")
                for line, value in zip(table.lines, table.columns[data.prompt], strict=True)]
    prompts = []
    for k, (chosen, rejected) in enumerate(zip(*both, strict=True)):
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        if not same:
            raise ValueError(f"data.chosen = {data.chosen!r}: line {table.lines[k]} of {table.where}: the two conversations have no "
                             "beginning in common, and data.prompt names no prompt")
        prompts.append(chosen[:same])
        both[0][k], both[1][k] = chosen[same:], rejected[same:]
    return prompts
