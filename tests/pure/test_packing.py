"""Rows of several examples: nothing leaks from one to another, what is learnt is what is learnt alone, and who is packed with whom."""

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from tiny_runs import assert_goes_on, local_phase, make_config, make_run

from dfl.metrics.base import IGNORED
from dfl.run import build
from dfl.tasks.language import CausalLM
from dfl.training.executors import Sequential, Stacked
from dfl.training.stream import DataStream, GroupedStream, PackedStream, pack


def features(lengths, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for n in lengths:
        ids = rng.integers(5, 60, size=n).astype(np.int32)
        labels = ids.copy()
        labels[:n // 3] = IGNORED
        found.append({"input_ids": ids, "labels": labels})
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_packed_examples_are_those_alone(tmp_path, kind, attention):
    folder = tiny_models.save(tmp_path / kind, kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    task, examples = CausalLM(0), features([7, 3, 5, 9, 2])
    batch = task.collate([task.pack(examples[:3]), task.pack(examples[3:])])
    assert batch["input_ids"].shape == (2, 15) and "attention_mask" not in batch
    with torch.no_grad():
        packed = model(**task.inputs(batch)).logits
        for row, some in enumerate((examples[:3], examples[3:])):
            start = 0
            for one in some:
                alone = model(**task.inputs(task.collate([one]))).logits[0]
                torch.testing.assert_close(packed[row, start:start + len(alone)], alone, rtol=1e-4, atol=1e-5)
                start += len(alone)
        # with the mask of a plain row the second example would see the first
        leaking = model(input_ids=batch["input_ids"]).logits
    assert (leaking[0, 7:10] - packed[0, 7:10]).abs().max() > 1e-3


def test_what_is_learnt_of_a_packed_row_is_what_its_examples_have_to_learn(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models.save(tmp_path / "llama", "llama")).eval()
    task, examples = CausalLM(0), features([7, 3, 5])
    packed, apart = task.collate([task.pack(examples)]), task.collate(examples)
    with torch.no_grad():
        for batch, rows in ((packed, 1), (apart, 3)):
            assert task.weights(batch, 1).tolist() == [5 + 2 + 4], rows  # 7 - 2, 3 - 1 and 5 - 1
        losses = [task.losses(model(**task.inputs(batch)), batch, 1) for batch in (packed, apart)]
    torch.testing.assert_close(*losses)


def test_an_architecture_that_lets_examples_see_each_other_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(CausalLM, "inputs", staticmethod(lambda batch: {"input_ids": batch["input_ids"]}))
    with pytest.raises(ValueError, match="data.packing = True: the architecture 'llama' lets packed examples see each other"):
        make_run(text_config(tmp_path, data__packing=True))


@pytest.mark.parametrize("seed", range(5))
def test_every_example_is_in_one_row_and_rows_are_full(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 65, size=200)
    rows = pack(lengths, 64)
    assert sorted(np.concatenate(rows)) == list(range(200)) and all(lengths[row].sum() <= 64 for row in rows)
    assert len(rows) <= 11 / 9 * lengths.sum() / 64 + 1  # the bound of first fit decreasing, which best fit shares
    assert len(rows) == len(pack(rng.permutation(lengths), 64))


def test_a_packed_stream_has_random_access_and_new_rows_in_every_pass():
    indices, lengths = np.arange(10, 60), np.random.default_rng(0).integers(1, 20, size=100)
    stream = PackedStream(indices, 3, 5, 2, lengths, 32)
    rows = [row for number in range(3 * stream.num_rows) for row in stream.batch(number)][:3 * stream.num_rows]
    passes = [rows[k * stream.num_rows:(k + 1) * stream.num_rows] for k in range(3)]
    for one in passes:
        assert sorted(np.concatenate(one)) == list(indices)
    assert {tuple(row) for row in passes[0]} != {tuple(row) for row in passes[1]}
    again = PackedStream(indices, 3, 5, 2, lengths, 32)
    for number in (7, 0, 3):
        assert all((a == b).all() for a, b in zip(again.batch(number), stream.batch(number), strict=True))


def test_grouped_batches_hold_similar_lengths_and_everything_once_a_pass():
    indices, lengths = np.arange(400), np.random.default_rng(0).integers(1, 100, size=400)
    plain, grouped = DataStream(indices, 8, 1, 0), GroupedStream(indices, 8, 1, 0, lengths)
    batches = [[stream.batch(number) for number in range(50)] for stream in (plain, grouped)]
    for one in batches:
        assert sorted(np.concatenate(one)) == list(indices)
    spread = [np.mean([np.ptp(lengths[batch]) for batch in one]) for one in batches]
    assert spread[1] < 0.1 * spread[0]
    means = [lengths[batch].mean() for batch in batches[1]]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    assert (GroupedStream(indices, 8, 1, 0, lengths).batch(57) == grouped.batch(57)).all()


def write_text(folder):
    words, rng = tiny_models.WORDS, np.random.default_rng(0)
    lines = [" ".join(words[k] for k in rng.integers(0, len(words), size=n)) for n in rng.integers(2, 15, size=120)]
    (folder / "text.csv").write_text("\n".join(["text", *lines]) + "\n")
    return folder / "text.csv"


def text_config(tmp_path, output="run", **fields):
    model = tmp_path / "llama" if (tmp_path / "llama").exists() else tiny_models.save(tmp_path / "llama", "llama", layers=2)
    fields = {"data__max_length": 16, "train__batch_size": 2, "train__lr": 1e-2} | fields
    return make_config(model, write_text(tmp_path), tmp_path / output, model__task="causal_lm", **fields)


def test_stacked_is_looped_with_packed_rows(tmp_path):
    found = {}
    for name, executor in (("sequential", Sequential()), ("stacked", Stacked())):
        run, _ = make_run(text_config(tmp_path, data__packing=True, train__accumulation=2, train__executor=name))
        assert isinstance(run.peers.streams[0], PackedStream)
        losses = local_phase(run, executor=executor)
        found[name] = losses, run.peers.x.clone()
    torch.testing.assert_close(found["sequential"], found["stacked"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fields", [{"data__packing": True}, {"data__group_by_length": True}], ids=str)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, monkeypatch, fields):
    assert_goes_on(text_config, tmp_path, monkeypatch, 5, **fields)


def test_every_token_of_a_step_counts_alike(tmp_path):
    """Two batches of one make the step that one batch of two makes, also where one of them has few tokens."""
    found = []
    for accumulation in (1, 2):
        run, _ = make_run(text_config(tmp_path, train__accumulation=accumulation, train__batch_size=2 // accumulation,
                                      train__clip=None, train__optimizer="sgd", train__local_steps=1))
        losses = local_phase(run)
        found.append((losses, run.peers.x.clone()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.packing = True: rows of model.task = 'sequence_classification' are not.*causal_lm"):
        build.check(make_config(tmp_path, tmp_path, tmp_path / "run", data__packing=True))


@pytest.mark.parametrize("field", ["packing", "group_by_length"])
def test_examples_that_are_drawn_one_by_one_are_not_grouped(tmp_path, field):
    with pytest.raises(ValueError, match=f"data.{field} = True is not allowed; allowed: false with train.privacy"):
        text_config(tmp_path, **{f"data__{field}": True, "train__privacy__noise": 1.0})
