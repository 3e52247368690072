"""Collate, losses and scores: what Hugging Face computes alone, here for every peer's block of a batch at once."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from measured import measured

from dfl.config import DataConfig
from dfl.metrics.base import Outcome
from dfl.tasks import SOURCES, TASKS, describe
from dfl.tasks.classification import SequenceClassification
from dfl.tasks.language import IGNORED, CausalLM, answer, plain
from dfl.tasks.tables import Table


def rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 60, size=n).astype(np.int32) for n in lengths]


def test_collate_pads_on_the_right_to_the_longest():
    features = [{"input_ids": ids, "token_type_ids": np.ones_like(ids), "labels": i} for i, ids in enumerate(rows([3, 5, 1]))]
    batch = SequenceClassification(4).collate(features)
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]
    assert torch.equal(batch["token_type_ids"], batch["attention_mask"]) and batch["labels"].tolist() == [0, 1, 2]
    for ids, padded in zip(rows([3, 5, 1]), batch["input_ids"], strict=True):
        assert padded.tolist() == ids.tolist() + [4] * (5 - len(ids))
    assert SequenceClassification(4).collate(features, pad_to_multiple=8)["input_ids"].shape == (3, 8)
    assert SequenceClassification(4).collate(features[1:2], pad_to_multiple=5)["input_ids"].shape == (1, 5)


def test_a_language_batch_pads_its_labels_with_what_no_loss_counts():
    features = [{"input_ids": ids, "labels": ids} for ids in rows([2, 4])]
    batch = CausalLM(0).collate(features)
    assert batch["labels"][0].tolist()[2:] == [IGNORED] * 2 and batch["input_ids"][0].tolist()[2:] == [0] * 2
    assert list(CausalLM(0).inputs(batch)) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classification_losses_are_those_of_each_block(dtype):
    task, logits = SequenceClassification(0), torch.randn(12, 5, dtype=dtype)
    batch = {"labels": torch.randint(0, 5, (12,))}
    output = SimpleNamespace(logits=logits)
    losses, found = task.losses(output, batch, 3), measured(task, [task.outcome(output, batch)], 3, 5)
    assert losses.dtype == torch.float32
    for g in range(3):
        part = slice(4 * g, 4 * g + 4)
        torch.testing.assert_close(losses[g], torch.nn.functional.cross_entropy(logits[part].float(), batch["labels"][part]))
        assert found[g] == {"accuracy": (logits[part].argmax(-1) == batch["labels"][part]).sum() / 4,
                            "loss": pytest.approx(losses[g].item())}
    (total,) = measured(task, [task.outcome(output, batch)], 1, 5)
    assert total == {"accuracy": pytest.approx(sum(one["accuracy"] for one in found) / 3), "loss": pytest.approx(losses.mean().item())}
    with pytest.raises(AssertionError, match="12 rows are not 5 equal blocks"):
        task.losses(output, batch, 5)


def test_language_losses_are_those_of_hugging_face(tmp_path):
    from transformers import LlamaForCausalLM
    model = LlamaForCausalLM.from_pretrained(tiny_models.save(tmp_path / "llama", "llama")).eval()
    features = [{"input_ids": ids, "labels": ids} for ids in rows([7, 3, 5, 9])]
    features[2]["labels"] = np.where(np.arange(5) < 3, IGNORED, features[2]["labels"])
    task = CausalLM(4)
    batch = task.collate(features)
    with torch.no_grad():
        output = model(**task.inputs(batch))
        for groups in (1, 2, 4):
            losses, outcome = task.losses(output, batch, groups), task.outcome(output, batch)
            for g, ours in enumerate(losses):
                part = {key: value[g * 4 // groups:(g + 1) * 4 // groups] for key, value in batch.items()}
                torch.testing.assert_close(ours, model(**part).loss)
            assert outcome.counted.sum() == 6 + 2 + 2 + 8
            for found, loss in zip(measured(task, [outcome], groups), losses.tolist(), strict=True):
                assert found == {"perplexity": pytest.approx(math.exp(loss)), "loss": pytest.approx(loss)}


def test_gradients_of_a_block_do_not_depend_on_the_others():
    task, labels = CausalLM(0), torch.randint(0, 9, (4, 6))
    logits = torch.randn(4, 6, 9, requires_grad=True)
    task.losses(SimpleNamespace(logits=logits), {"labels": labels}, 2).sum().backward()
    alone = logits.detach()[:2].requires_grad_()
    task.losses(SimpleNamespace(logits=alone), {"labels": labels[:2]}, 1).sum().backward()
    torch.testing.assert_close(logits.grad[:2], alone.grad)


def test_metrics_of_nothing_and_of_a_diverged_model():
    def language(losses):
        losses = torch.tensor([losses])
        return CausalLM(0), [Outcome(losses, losses != 0, torch.zeros(losses.shape, dtype=torch.int64), lambda: losses * 0)]

    labels = torch.empty(0, dtype=torch.int64)
    nothing = SequenceClassification(0).outcome(SimpleNamespace(logits=torch.empty(0, 2)), {"labels": labels})
    assert all(map(math.isnan, measured(SequenceClassification(0), [nothing])[0].values()))
    assert math.isnan(measured(*language([0.0, 0.0]))[0]["perplexity"])
    assert measured(*language([9e9, 9e9]))[0]["perplexity"] == math.inf
    assert math.isnan(measured(*language([math.nan, 1.0]))[0]["perplexity"])


def test_a_model_that_has_diverged_predicts_nothing():
    """Else argmax, which takes NaN for the largest, would give it credit for one class, or token."""
    logits = torch.tensor([[math.nan, 0.0], [0.0, 1.0], [math.nan, math.nan]])
    outcome = SequenceClassification(0).outcome(SimpleNamespace(logits=logits), {"labels": torch.tensor([0, 1, 0])})
    assert outcome.predictions.tolist() == [[-1], [1], [-1]] and outcome.correct.tolist() == [[False], [True], [False]]
    tokens = CausalLM(0).outcome(SimpleNamespace(logits=logits[None]), {"labels": torch.tensor([[5, 0, 1]])})
    assert tokens.predictions.tolist() == [[-1, 1]] and tokens.correct.tolist() == [[False, True]]


def test_only_the_response_is_a_target():
    assert answer([1, 7, 8], [9, 10], [2], 16) == ([1, 7, 8, 9, 10, 2], [IGNORED] * 3 + [9, 10, 2])
    assert answer([1, 7, 8, 2], [9], [2], 16)[0] == [1, 7, 8, 9, 2]  # a tokenizer that closes every text
    assert answer([1, 7, 8], [9, 10], [2], 5) == ([1, 7, 8, 9, 10], [IGNORED] * 3 + [9, 10])  # no end where it was cut
    ids, targets = answer(list(range(20, 40)), list(range(5)), [2], 8)  # a long prompt leaves half the room
    assert ids == [36, 37, 38, 39, 0, 1, 2, 3] and targets == [IGNORED] * 4 + [0, 1, 2, 3]
    assert plain([1, 7], [2], 16) == ([1, 7, 2], [1, 7, 2]) and plain([1, 7, 2], [2], 16)[0] == [1, 7, 2]
    assert plain([1, 7, 8], [2], 3)[0] == [1, 7, 8]


def test_prompts_and_responses_from_a_table():
    table = Table({"ask": ["how what", "who"], "say": ["the graph", "a peer"]}, "it.csv", [2, 3])
    data = DataConfig(prompt="ask", response="say", max_length=8)
    CausalLM.check(table, data)
    tokenizer = tiny_models.tokenizer(encoder=False)
    (first, second), cut = CausalLM.encode(table, np.zeros(2), data, tokenizer)
    assert cut == {"prompt": 0, "response": 0, "nothing": 0}
    assert tokenizer.decode(first["input_ids"]) == "how what the graph </s>"
    assert first["labels"].tolist()[:2] == [IGNORED] * 2 and (first["labels"][2:] == first["input_ids"][2:]).all()
    assert len(second["input_ids"]) == 4


@pytest.mark.parametrize("fields, message", [
    ({"prompt": "ask"}, "data.prompt = 'ask' and data.response = None: give both of them"),
    ({"prompt": "ask", "response": "sya"}, "data.response = 'sya': no such column in it.csv .did you mean 'say'.*; it has: ask"),
    ({}, "data.text = 'text': no such column")])
def test_columns_of_a_language_task(fields, message):
    table = Table({"ask": ["how"], "say": ["a peer"]}, "it.csv", [2])
    with pytest.raises(ValueError, match=message):
        CausalLM.check(table, DataConfig(**fields))


def test_an_empty_text_has_nothing_to_predict():
    """One among others trains nothing, and is counted; where there is nothing else, nothing would be trained at all."""
    table, tokenizer = Table({"text": ["the graph", ""]}, "it.csv", [2, 3]), tiny_models.tokenizer(encoder=False)
    features, cut = CausalLM.encode(table, np.zeros(2), DataConfig(), tokenizer)
    assert len(features[1]["input_ids"]) == 1 and cut == {"text": 0, "nothing": 1}
    with pytest.raises(ValueError, match="no row of it.csv leaves a token to predict .line 3"):
        CausalLM.encode(table.rows(np.array([1])), np.zeros(1), DataConfig(), tokenizer)


def test_what_max_length_takes_away_is_counted():
    asked = {"ask": ["how what who", "how what who", "how"], "say": ["the graph is a peer", "a", "b"]}
    table, tokenizer = Table(asked, "it.csv", [2, 3, 4]), tiny_models.tokenizer(encoder=False)
    data = {limit: DataConfig(prompt="ask", response="say", max_length=limit) for limit in (16, 6, 4)}
    rows = {limit: CausalLM.encode(table, np.zeros(3), given, tokenizer) for limit, given in data.items()}
    assert [(r.cut["prompt"], r.cut["response"], r.cut["nothing"]) for r in rows.values()] == [(0, 0, 0), (0, 1, 0), (2, 1, 0)]
    table = Table({"text": ["how what who", "how"]}, "it.csv", [2, 3])
    plain_text = CausalLM.encode(table, np.zeros(2), DataConfig(max_length=2), tokenizer)
    assert plain_text.cut == {"text": 1, "nothing": 0}


def test_every_task_and_source_has_a_line():
    assert list(describe()) == ["sequence_classification", "sequence_regression", "causal_lm", "preference",
                                "image_classification"] == list(TASKS)
    assert list(describe(SOURCES)) == ["docstrings", "file", "hub"]
    assert all(line.endswith(".") for line in (describe() | describe(SOURCES)).values())
