"""Answers that models write themselves, to prompts of the evaluation examples: how many are right, and a few to be read.

Perplexity and the metrics of tokens are of the given text, one token at a time. Here a model goes on by itself, greedily, from
where the last response of an example begins; of a plain text, from its middle.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows
from dfl.metrics.base import IGNORED
from dfl.training.executors import Sequential

Measure = Callable[[list[str], list[str]], float | Mapping[str, float]]


class Answers:
    """The first `num` examples of a split as prompts, with what should be said to them.

    measure: of all answers and references, a number or several by name; None: none beside `answer_match`.
    """

    def __init__(self, adapted: Adapted, split: Any, processor: Any, num: int, max_new_tokens: int, measure: Measure | None = None,
                 batch_size: int = 16, autocast: bool = False):
        self.adapted, self.processor, self.measure, self.autocast = adapted, processor, measure, autocast
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        pairs = [prompt_and_answer(split.features[i]) for i in range(min(num, len(split)))]
        # a prompt too long for the model loses its beginning, and at most half of what there is room for
        most = positions(adapted.model)
        self.prompts = [prompt[-(most - min(max_new_tokens, most // 2)):] for prompt, _ in pairs]
        self.references = [self.text(answer) for _, answer in pairs]

    def text(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids), skip_special_tokens=True).strip()

    def of(self, rows: Rows, index: int, halted: Callable[[], bool] = lambda: False) -> list[str]:
        """What the model `index` of `rows` answers; given up, with fewer, once `halted()`."""
        model, found = self.adapted.model.eval(), []
        with torch.no_grad(), Sequential().bound(self.adapted, rows, None, [index]):
            for start in range(0, len(self.prompts), self.batch_size):
                if halted():
                    break
                found += self._batch(model, self.prompts[start:start + self.batch_size])
        return found

    def _batch(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
        ids, mask = left_padded(prompts, self.processor.pad_token_id)
        device = next(model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            said = continued(model, self.processor, ids.to(device), mask.to(device), self.max_new_tokens)
        return [self.text(row) for row in said.tolist()]

    def scores(self, answers: list[str]) -> dict[str, float]:
        """answer_match: the share of answers that are the reference, but for blanks around it; and what the user measures."""
        right = sum(answer == reference for answer, reference in zip(answers, self.references, strict=True))
        found = {"answer_match": right / len(answers)}
        if self.measure is not None:
            said = self.measure(list(answers), list(self.references))
            named = said if isinstance(said, Mapping) else {"score": said}
            found |= {f"answer_{name}": float(value) for name, value in named.items()}
        return found

    def samples(self, shown: int, by_model: Mapping[str, list[str]]) -> list[dict[str, str]]:
        """A few of them to be read: the prompt, what should be said, and what each model says."""
        told = {"reference": self.references, **by_model}
        return [{"prompt": self.text(self.prompts[k]), **{name: said[k] for name, said in told.items()}}
                for k in range(min(shown, len(self.prompts)))]


def prompt_and_answer(feature: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Up to the last response of an example, and it; of a plain text its halves."""
    ids, learnt = np.asarray(feature["input_ids"]), np.asarray(feature["labels"]) != IGNORED
    if learnt.all() or not learnt.any():
        half = max(1, len(ids) // 2)
        return ids[:half].tolist(), ids[half:].tolist()
    stop = int(np.flatnonzero(learnt)[-1]) + 1
    before = np.flatnonzero(~learnt[:stop])
    start = int(before[-1]) + 1 if len(before) else max(1, stop // 2)
    return ids[:start].tolist(), ids[start:stop].tolist()


def left_padded(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """(B, L) ids and what of them is real: a model goes on at the right end."""
    width = max(map(len, rows))
    ids = torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def positions(model: Any) -> int:
    """How many tokens the model takes; very many where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9


def continued(model: Any, processor: Any, ids: Tensor, mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """(B, N) new tokens, greedily unless `options` of generate say otherwise; everything behind the end is padding.

    N is at most max_new_tokens, and what the model has positions for behind the longest prompt, which is shorter than those.
    """
    from transformers import GenerationConfig
    max_new_tokens = min(max_new_tokens, positions(model) - ids.shape[1])
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None) or processor.eos_token_id
    chosen = GenerationConfig(**{"do_sample": False, "num_beams": 1} | options, max_new_tokens=max_new_tokens,
                              pad_token_id=processor.pad_token_id, eos_token_id=ends)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=chosen)[:, ids.shape[1]:]


def load_measure(reference: str | None) -> Measure | None:
    """The function `package.module:name`. ValueError for what is none."""
    if reference is None:
        return None
    module, _, name = reference.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m dfl` has it, the command `dfl` has not
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever somebody's module does when it is read
        raise ValueError(f"eval.generate.metric = {reference!r} cannot be imported: {type(error).__name__}: {error}; allowed: "
                         "package.module:function") from error
    if not callable(found):
        raise ValueError(f"eval.generate.metric = {reference!r} is no function of answers and references")
    return found
