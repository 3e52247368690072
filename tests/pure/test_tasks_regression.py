"""Regression: the losses of Hugging Face, columns of numbers, and a run from its data to an exported model."""

import json
import re

import numpy as np
import pytest
import scipy.stats
import tiny_models
import tiny_runs
import torch
import transformers

from dfl.cli import main
from dfl.config import DataConfig
from dfl.run.train import train
from dfl.store.records import read_lines
from dfl.tasks.regression import SequenceRegression
from dfl.tasks.tables import Table

SCORES = {"good": 3.0, "bad": -1.5, "not": -0.25, "film": 0.5}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tiny_runs.make_folder(tmp_path_factory.mktemp("regression"))
    rng, words = np.random.default_rng(0), tiny_models.WORDS
    texts = [" ".join(rng.choice(words, size=6)) for _ in range(64)]
    rows = [f"{text},{sum(SCORES.get(word, 0.0) for word in text.split())},{'ab'[k % 2]}" for k, text in enumerate(texts)]
    (folder / "scores.csv").write_text("\n".join(["text,score,who", *rows]) + "\n")
    return folder


def words(root, output, **fields):
    given = {"model__task": "sequence_regression", "data__label": "score", "lora__head": "mixed", "train__lr": 0.03,
             "partition": "{name: column, column: who}", "peers": 2, "train__rounds": 8, "train__local_steps": 6, "eval__every": 4}
    return tiny_runs.arguments(root / "bert", root / "scores.csv", output, **given | fields)


def make_config(root, output, **fields):
    from dfl import config as configuration
    return configuration.load(None, words(root, output, **fields))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_losses_are_those_of_hugging_face(tmp_path, kind):
    folder = tiny_models.save(tmp_path / kind, kind, 1)
    config = transformers.AutoConfig.from_pretrained(folder, num_labels=1, problem_type="regression", pad_token_id=4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    table = Table({"text": ["good film", "bad", "not the film", "a"], "label": ["1.5", "-2", "3e-1", " 0"]}, "it.csv", [2, 3, 4, 5])
    tokenizer = tiny_models.tokenizer(encoder=kind == "bert")
    encoded = SequenceRegression.encode(table, np.zeros(4), DataConfig(), tokenizer)
    task = SequenceRegression(4)
    batch = task.collate(encoded.features)
    assert batch["labels"].tolist() == [1.5, -2.0, pytest.approx(0.3), 0.0] and batch["labels"].dtype == torch.float32
    with torch.no_grad():
        output = model(**task.inputs(batch))
        losses, whole = task.losses(output, batch, 2), model(**batch).loss
    torch.testing.assert_close(losses.mean(), whole)
    for g in range(2):
        torch.testing.assert_close(losses[g], (output.logits[2 * g:2 * g + 2, 0] - batch["labels"][2 * g:2 * g + 2]).square().mean())


@pytest.mark.parametrize("value", ["", "many", "nan", "inf", None, True])
def test_a_line_without_a_number_is_named(value):
    table = Table({"text": ["good", "bad"], "label": ["1", value]}, "it.csv", [2, 3])
    with pytest.raises(ValueError, match=r"data.label = 'label': line 3 of it.csv holds .*, not a finite number"):
        SequenceRegression.check(table, DataConfig())


def test_a_run_learns_numbers_and_says_what_it_measured(root, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *words(root, run)]) == 0
    assert "pearson on the evaluation examples" in capsys.readouterr().out
    first, *_, last = [line["eval"] for line in read_lines(run / "metrics.jsonl") if "eval" in line]
    assert last["loss"]["max"] < first["loss"]["min"] and last["pearson"]["min"] > max(0.4, first["pearson"]["max"])
    assert set(last["own"]["peers"]) == {"pearson", "spearman", "loss"}
    facts = json.loads((run / "run.json").read_text())["facts"]
    assert facts["better"] == {"pearson": "higher", "spearman": "higher", "loss": "lower"} and facts["label_names"] == []
    assert main(["eval", str(run), "--peer", "0", "--predictions", str(tmp_path / "said.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    predicted, targets = ([row[key] for row in said] for key in ("prediction", "label"))
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(predicted, targets).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(predicted, targets).statistic, abs=1e-6)
    assert found["spearman"] == pytest.approx(last["peers"]["spearman"][0], abs=1e-6)
    assert said[0]["text"] and said[0]["error"] == pytest.approx(predicted[0] - targets[0])
    assert main(["eval", str(run), "--eval.metrics", "spearman", "--eval.primary", "spearman"]) == 0
    assert set(json.loads(capsys.readouterr().out)["peers"]) == {"spearman", "loss"}


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_an_exported_model_of_numbers_is_what_was_evaluated(root, tmp_path, capsys, monkeypatch, merged):
    assert train(make_config(root, tmp_path / "run", train__rounds=2, eval__metrics="[spearman]")) == 0
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--output", str(out), *["--merge"] * merged]) == 0
    card = (out / "README.md").read_text()
    assert "print(float(logits))" in card and "| spearman | higher | " in card and "id2label" not in card
    assert ("ignore_mismatched_sizes" in card) != merged
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], {})
    assert -10 < float(capsys.readouterr().out) < 10
    recorded = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["eval"]["consensus"]
    capsys.readouterr()
    assert main(["eval", str(out), "--data", str(root / "scores.csv")]) == 0  # with the run's metrics
    assert set(json.loads(capsys.readouterr().out)) >= {"spearman", "loss"}
    assert main(["eval", str(out), "--run", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: found[name] for name in recorded} == pytest.approx(recorded, rel=1e-4)
    if merged:  # as it would lie on a hub, without what we say beside it
        (out / "dfl.json").unlink()
        assert main(["eval", str(out), "--data", str(root / "scores.csv"), "--data.label", "score", "--data.max_length", "16"]) == 0
        assert set(json.loads(capsys.readouterr().out)) >= {"pearson", "spearman", "loss"}


def test_changed_numbers_are_noticed_when_a_run_goes_on(root, tmp_path):
    (tmp_path / "scores.csv").write_text((root / "scores.csv").read_text())
    config = {"data__train": tmp_path / "scores.csv", "train__rounds": 2}
    assert train(make_config(root, tmp_path / "run", **config)) == 0
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    text, _, who = lines[1].split(",")
    (tmp_path / "scores.csv").write_text("\n".join([lines[0], f"{text},9.5,{who}", *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match="changed since .*: .*examples"):
        train(make_config(root, tmp_path / "run", **config | {"train__rounds": 3}), resume=True)


def test_labels_that_are_words_are_no_numbers(root, tmp_path, capsys):
    assert main(["train", *words(root, tmp_path / "run", data__train=root / "data.csv", data__label="label", partition="iid")]) == 2
    assert "data.label = 'label': line 2 of" in capsys.readouterr().err
