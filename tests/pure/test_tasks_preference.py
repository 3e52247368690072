"""Direct preference optimisation: pairs as tokens, the loss against an independent computation, and the base model as reference."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from tiny_runs import local_phase, make_config, make_run
from transformers import LlamaConfig, LlamaForCausalLM

from dfl.config import DataConfig
from dfl.metrics.base import IGNORED
from dfl.run.build import check
from dfl.run.train import train
from dfl.store.records import read_lines
from dfl.tasks import chat
from dfl.tasks.preference import Preference
from dfl.tasks.tables import Table
from dfl.training.executors import Sequential, Stacked
from dfl.training.reference import with_reference


def encoded(rows, **fields):
    data = DataConfig(**{"prompt": "prompt"} | fields)
    words = tiny_models.tokenizer(encoder=False)
    chat.use_template(words, data)
    table = Table(rows, "pairs.jsonl", range(1, len(rows["chosen"]) + 1))
    Preference.check(table, data)
    return words, Preference.encode(table, np.zeros(len(table)), data, words)


def numpy_loss(logits, ids, labels, reference, beta, smoothing):
    """By log-softmax and sums over the response, one row at a time, in float64."""
    scores = []
    for row, row_ids, row_labels in zip(logits.astype(np.float64), ids, labels, strict=True):
        total = 0.0
        for place in range(len(row_ids) - 1):
            if row_labels[place + 1] != IGNORED:
                z = row[place] - row[place].max()
                total += z[row_ids[place + 1]] - np.log(np.exp(z).sum())
        scores.append(total)
    change = np.array(scores) - reference
    margins = beta * (change[0::2] - change[1::2])
    return margins, (1 - smoothing) * np.log1p(np.exp(-margins)) + smoothing * np.log1p(np.exp(margins))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_the_paper(smoothing):
    words, found = encoded({"prompt": ["how good", "what", "the"], "chosen": ["the film", "a graph of tensor", "node"],
                            "rejected": ["bad", "not the model", "array and array"]})
    task = Preference.build(words, beta=0.3, label_smoothing=smoothing)
    batch, generator = task.collate(found.features), torch.Generator().manual_seed(0)
    logits = torch.randn(6, batch["input_ids"].shape[1], 64, generator=generator)
    batch["reference"] = torch.randn(6, generator=generator)
    output = SimpleNamespace(logits=logits)
    margins, losses = numpy_loss(logits.numpy(), batch["input_ids"].numpy(), batch["labels"].numpy(), batch["reference"].numpy(), 0.3,
                                 smoothing)
    np.testing.assert_allclose(task.losses(output, batch, 3), losses, rtol=1e-5)
    np.testing.assert_allclose(task.losses(output, batch, 1), losses.mean(keepdims=True), rtol=1e-5)
    outcome = task.outcome(output, batch)
    np.testing.assert_allclose(outcome.margins[:, 0], margins, rtol=1e-4, atol=1e-5)
    assert outcome.correct[:, 0].tolist() == (margins > 0).tolist()


def test_the_loss_is_that_of_trl(tmp_path):
    """What DPOTrainer computes of the same model, reference and pairs."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = {"prompt": ["how good", "what"], "chosen": [" the film", " a graph of tensor"], "rejected": [" bad", " not the model"]}
    words, found = encoded(rows)
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model, base = (LlamaForCausalLM(LlamaConfig(**size)).eval() for _ in range(2))
    task = Preference.build(words, beta=0.3)
    batch = task.collate(found.features)
    with torch.no_grad():
        batch["reference"] = task.score(base(**task.inputs(batch)), batch)
        ours = task.losses(model(**task.inputs(batch)), batch, 1)
    args = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=2)
    trainer = trl.DPOTrainer(model, base, args=args, train_dataset=datasets.Dataset.from_dict(rows), processing_class=words)
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model.eval(), next(iter(trainer.get_train_dataloader())))
    assert abs(float(ours) - math.log(2)) > 1e-4
    torch.testing.assert_close(ours[0], theirs, rtol=1e-5, atol=1e-6)


def test_both_responses_stand_behind_the_same_prompt():
    words, found = encoded({"prompt": ["how good is the film", "what"], "chosen": ["a graph", "the"],
                            "rejected": ["not", "bad " * 20]}, max_length=6)
    for feature in found.features:
        assert len(feature["input_ids"]) <= 6 and len(feature["rejected_ids"]) <= 6
        for ids, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels")):
            learnt = feature[labels] != IGNORED
            assert (feature[ids][learnt] == feature[labels][learnt]).all()
        prompts = [[int(i) for i, label in zip(feature[ids], feature[labels], strict=True) if label == IGNORED]
                   for ids, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))]
        assert prompts[0] == prompts[1] and prompts[0]
    assert found.cut == {"prompt": 1, "response": 1, "nothing": 0}
    batch = Preference.build(words).collate(found.features)
    assert batch["input_ids"].shape == (4, 6) and words.decode(batch["input_ids"][1]).split()[-1] == "[PAD]"


def test_pairs_of_conversations_with_and_without_a_prompt():
    """What both begin with is the prompt where no column says it."""
    ask, good, bad = ({"role": "user", "content": "how"}, {"role": "assistant", "content": "the film"},
                      {"role": "assistant", "content": "bad"})
    template = ("{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
                "{% if add_generation_prompt %}assistant {% endif %}")
    whole = encoded({"chosen": [[ask, good]], "rejected": [[ask, bad]]}, prompt=None, template=template)[1].features[0]
    split = encoded({"prompt": [[ask]], "chosen": [[good]], "rejected": [[bad]]}, template=template)[1].features[0]
    text = encoded({"prompt": ["how"], "chosen": [[good]], "rejected": [[bad]]}, template=template)[1].features[0]
    assert all((whole[key] == split[key]).all() and (whole[key] == text[key]).all() for key in whole)
    with pytest.raises(ValueError, match="line 1 of pairs.jsonl: the two conversations have no beginning in common"):
        encoded({"chosen": [[good, ask]], "rejected": [[bad, ask]]}, prompt=None, template=template)
    with pytest.raises(ValueError, match="data.prompt = None: column 'chosen' .* holds texts, responses to a prompt"):
        encoded({"chosen": ["a"], "rejected": ["b"]}, prompt=None)


def write_pairs(folder, copies=12):
    words = tiny_models.WORDS
    lines = ["prompt,chosen,rejected", *(f"what is {words[k % len(words)]} {words[k // 5]},good film {words[k % 7]},bad node"
                                         for k in range(copies * 3))]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def config(tmp_path, kind="llama", **fields):
    model = tiny_models.save(tmp_path / kind, kind, layers=2) if not (tmp_path / kind).exists() else tmp_path / kind
    return make_config(model, write_pairs(tmp_path), tmp_path / "run", model__task="{name: preference, beta: 0.5}",
                       data__prompt="prompt", train__lr=1e-2, lora__alpha=8, **fields)


@pytest.mark.parametrize("executor", ["sequential", "stacked"])
@pytest.mark.parametrize("lora", [{}, {"lora__start": "pissa", "lora__dropout": 0.3}])
def test_the_reference_is_the_base_model(tmp_path, executor, lora):
    """Whatever the adapters have become; at the start all margins are zero."""
    run, loaded = make_run(config(tmp_path, train__executor=executor, **lora))
    task, adapted = run.task, loaded.adapted
    batch = task.collate(run.split.features[:3])
    with torch.no_grad(), adapted.model.disable_adapter():
        base = task.score(adapted.model.eval()(**task.inputs(batch)), batch)
    made = Stacked() if executor == "stacked" else Sequential()
    losses = local_phase(run, executor=made)
    assert losses.shape == (4,) and run.peers.x.std() > 0
    rows = run.rows()
    index = list(range(4)) if executor == "stacked" else [2]
    with torch.no_grad(), made.bound(run.peers.adapted, rows, None, index) as forward:
        repeated = {key: value.repeat(len(index), 1) for key, value in batch.items()}
        found = with_reference(task, run.peers.adapted, repeated)
        torch.testing.assert_close(found["reference"], base.repeat(len(index)))
        changed = task.outcome(forward(task.inputs(found), index), found)
    assert changed.margins.abs().max() > 1e-4


def test_stacked_is_looped(tmp_path):
    found = {}
    for executor in ("sequential", "stacked"):
        run, _ = make_run(config(tmp_path, train__executor=executor, train__accumulation=2))
        local_phase(run)
        found[executor] = run.peers.x.clone()
    torch.testing.assert_close(found["sequential"], found["stacked"], rtol=1e-4, atol=1e-6)


def test_a_run_learns_what_is_preferred(tmp_path):
    chosen = config(tmp_path, train__rounds=6, train__local_steps=5, eval__every=3)
    assert train(chosen) == 0
    first, *_, last = [line["eval"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval" in line]
    assert first["margin"]["mean"] == 0.0 and first["loss"]["mean"] == pytest.approx(np.log(2))
    assert last["consensus"]["accuracy"] > 0.9 and last["consensus"]["loss"] < 0.6 and last["consensus"]["margin"] > 0.1


def test_a_wrong_parameter_is_named(tmp_path):
    with pytest.raises(ValueError, match="model.task.betta = 1.*'preference' has no such parameter.*did you mean 'beta'"):
        check(make_config(tmp_path, tmp_path, tmp_path / "run", model__task="{name: preference, betta: 1}"))
