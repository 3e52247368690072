"""The summary of the data before a run: counts, and a sentence with field and remedy for what one would want to know."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
import tiny_runs

import dfl
from dfl import tasks
from dfl.cli import main
from dfl.report.build import write_report
from dfl.tasks import summarise, summary_lines
from dfl.tasks.base import Split


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    return {kind: tiny_models.save(folder / kind, kind, 1) for kind in ("bert", "gpt2")}


def sentences(num, label):
    """Rows that nothing is wrong with, no two alike."""
    words = tiny_models.WORDS
    return [f"film {words[k % len(words)]} {words[k // len(words)]} {label},{label}" for k in range(num)]


def loaded(models, tmp_path, train, valid=None, kind="bert", head="text,label", **fields):
    """The bundle of these rows, and the configuration of its data."""
    (tmp_path / "train.csv").write_text("\n".join([head, *train]) + "\n")
    if valid is not None:
        (tmp_path / "valid.csv").write_text("\n".join([head, *valid]) + "\n")
        fields["data__valid"] = tmp_path / "valid.csv"
    config = tiny_runs.make_config(models[kind], tmp_path / "train.csv", tmp_path / "run", **fields)
    return tasks.load(config.model, config.data, seed=0), config.data


def warnings(*args, **fields):
    bundle, data = loaded(*args, **fields)
    return summarise(bundle.task.name, bundle.train, bundle.valid, data)["warnings"]


GOOD = [*sentences(20, "no"), *sentences(20, "yes")]
UNSEEN = ["bad no no,no", "bad yes yes,yes", "bad peer,no", "bad graph,yes"]


def test_good_data_give_no_warning(models, tmp_path):
    bundle, data = loaded(models, tmp_path, GOOD, UNSEEN)
    found = summarise(bundle.task.name, bundle.train, bundle.valid, data)
    assert found["warnings"] == []
    lengths = sorted(len(f["input_ids"]) for f in bundle.train.features)
    assert found["train"]["rows"] == 40 and found["train"]["tokens"]["max"] == lengths[-1]
    assert found["train"]["tokens"]["p50"] == lengths[20] and found["train"]["cut"] == {"text": 0}
    first, second = summary_lines(found)
    assert re.match(r"training data: 40 rows; 50 % of them have at most \d+ tokens, 90 % \d+, 99 % \d+, the longest \d+; 0 cut$",
                    first)
    assert second.startswith("evaluation data: 4 rows; ")


def test_a_stray_label_is_named_with_its_line(models, tmp_path):
    """Of one row in forty-one nobody learns a class, and accuracy on it is zero or is not measured."""
    said = warnings(models, tmp_path, [*GOOD, "a film,mabye"], UNSEEN)
    assert len(said) == 2
    assert said[0] == ("data.label = 'label': fewer than 10 training rows have the class 'mabye' (1) (the first is on line 42 of "
                       "the training data); a stray label? correct it, or remove these rows")
    assert said[1].startswith("data.label = 'label': no validation row has the class 'mabye', so nothing tells")


def test_a_class_that_only_the_validation_rows_have(models, tmp_path):
    """A split or data.max_train may leave a class out of training."""
    bundle, data = loaded(models, tmp_path, GOOD, UNSEEN)
    names = [*bundle.train.label_names, "never", "rare"]
    labels = bundle.valid.labels.copy()
    labels[0] = 3
    bundle = replace(bundle, train=replace(bundle.train, label_names=names), valid=replace(bundle.valid, labels=labels))
    (said,) = summarise(bundle.task.name, bundle.train, bundle.valid, data)["warnings"]
    assert said.startswith("data.label = 'label': no training row has the class 'never', 'rare', 1 validation rows do; give more")


def test_empty_texts_and_texts_that_were_missing_values(models, tmp_path):
    said = warnings(models, tmp_path, [*GOOD, ",no", "   ,yes", "NaN,no"], [*UNSEEN, '"",no', "null,yes"])
    assert said[0] == ("data.text = 'text': 2 training and 1 validation rows are empty or blank (the first is on line 42 of the "
                       "training data); fill or remove them")
    assert said[1].startswith("data.text = 'text': 1 training and 1 validation rows hold only 'nan' or the like, a missing")
    assert "line 44 of the training data" in said[1] and len(said) == 2


def test_rows_that_are_there_twice(models, tmp_path):
    again = GOOD[:5]
    said = warnings(models, tmp_path, [*GOOD, *again], [*UNSEEN, GOOD[3]])
    assert said[0] == (f"data.valid = {str(tmp_path / 'valid.csv')!r}: 1 of 5 validation rows are training rows too, and tell only "
                       "what was learned by heart; remove them from one of the two")
    assert said[1].startswith(f"data.train = {str(tmp_path / 'train.csv')!r}: 5 of 45 rows repeat an earlier one")
    assert len(said) == 2
    (said,) = warnings(models, tmp_path, [*GOOD, "film good,no", "film good,yes"], UNSEEN)
    assert said.startswith("data.label = 'label': 1 times the same text has another label")
    said = warnings(models, tmp_path, [row for row in GOOD for _ in range(2)], data__valid_fraction=0.25)
    assert any(re.match(r"data.valid_fraction = 0.25: \d+ of 20 validation rows are training rows too", text) for text in said)


def test_pairs_are_the_same_where_both_texts_are(models, tmp_path):
    rows = [row.replace(",", ",the film,") for row in GOOD]
    rows += [rows[0].replace("the film", "a film"), rows[1].replace("the film", "")]
    said = warnings(models, tmp_path, rows, ["bad no,the film,no", "bad yes,the film,yes"], head="text,other,label",
                    data__pair="other")
    assert said == ["data.pair = 'other': 1 training and 0 validation rows are empty or blank (the first is on line 43 of the "
                    "training data); fill or remove them"]


def test_rows_that_max_length_cuts(models, tmp_path):
    """Against a count of the tokens of every text, whole."""
    bundle, data = loaded(models, tmp_path, GOOD, UNSEEN, data__max_length=5)
    whole = [len(bundle.processor(text)["input_ids"]) for text in bundle.train.columns["text"]]
    found = summarise(bundle.task.name, bundle.train, bundle.valid, data)
    assert found["train"]["cut"]["text"] == sum(length > 5 for length in whole) > 5
    assert found["warnings"][0].startswith(f"data.max_length = 5: {found['train']['cut']['text']} of 40 training and ")
    assert "validation rows lose their end; raise it" in found["warnings"][0]
    exact = max(whole)
    bundle, data = loaded(models, tmp_path, GOOD, UNSEEN, data__max_length=exact)
    assert summarise(bundle.task.name, bundle.train, bundle.valid, data)["train"]["cut"]["text"] == 0


def test_responses_that_max_length_cuts(models, tmp_path):
    rows = ["how what,the graph is a peer", *[f"how {word},a peer" for word in tiny_models.WORDS], "how,"]
    given = {"kind": "gpt2", "head": "prompt,response", "model__task": "causal_lm", "data__prompt": "prompt",
             "data__response": "response", "data__max_length": 6}
    said = warnings(models, tmp_path, rows, ["what,a peer"], **given)
    assert any(text.startswith("data.response = 'response': 1 training and 0 validation rows are empty") for text in said)
    assert any("data.max_length = 6: 1 of " in text and "lose the end of their response" in text for text in said)
    rows = ['{"text": "the graph"}', '{"text": ""}', '{"text": "a peer"}']
    (tmp_path / "it.jsonl").write_text("\n".join(rows) + "\n")
    config = tiny_runs.make_config(models["gpt2"], tmp_path / "it.jsonl", tmp_path / "run", model__task="causal_lm",
                                   data__valid=tmp_path / "it.jsonl")
    bundle = tasks.load(config.model, config.data, seed=0)
    said = summarise(bundle.task.name, bundle.train, bundle.valid, config.data)["warnings"]
    assert any("1 of 3 training and 1 of 3 validation rows are left with nothing to predict, and train nothing (the first is on line "
               "2 of the training data); fill or remove them" in text for text in said)


def test_it_is_printed_once_and_recorded(models, tmp_path, capsys):
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *GOOD, *UNSEEN, "a film,mabye", "the film,mabye"]) + "\n")
    words = tiny_runs.arguments(models["bert"], tmp_path / "data.csv", tmp_path / "run", baseline="local", train__rounds=2)
    assert main(["train", *words]) == 0
    said = capsys.readouterr().err
    assert said.count("training data: ") == 1 and said.count("dfl: WARNING: data.label = 'label': fewer than 10") == 1
    found = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["data"]
    assert found["train"]["rows"] + found["valid"]["rows"] == 46 and "mabye" in found["warnings"][0]
    assert json.loads((tmp_path / "run" / "baseline-local" / "run.json").read_text())["facts"]["data"] == found
    page, text = (path.read_text() for path in write_report([tmp_path / "run"], None, None))
    assert "mabye" in page and found["warnings"][0] in text.replace("\\", "")
    assert main(["train", *words, "--train.rounds=3", "--resume"]) == 0
    assert "training data: " not in capsys.readouterr().err


@pytest.mark.long
def test_empty_texts_train_with_a_warning_and_finite_numbers(models, tmp_path):
    """Also under a decoder, which has no token of its own around nothing."""
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *GOOD, ",no", ",yes", ",no", *UNSEEN]) + "\n")
    for kind, task in (("gpt2", "sequence_classification"), ("bert", "sequence_classification"), ("gpt2", "causal_lm")):
        config = tiny_runs.make_config(models[kind], tmp_path / "data.csv", tmp_path / f"{kind}-{task}", model__task=task)
        last = dfl.train(config).metrics[-1]
        assert np.isfinite(last["train_loss_peers"]).all() and np.isfinite(last["eval"]["peers"]["loss"]).all()


def test_many_classes_are_named_in_part():
    names = [f"c{k}" for k in range(50)]
    split = Split([], np.arange(50), names, {}, range(2, 52))
    from dfl.tasks.summary import _about_classes
    said = _about_classes(split, replace(split, labels=np.zeros(3, dtype=np.int64)), tasks.DataConfig())
    assert "'c0' (1), 'c1' (1), 'c2' (1), 'c3' (1), 'c4' (1) and 45 more" in said[0]
    assert Counter(text.split(":")[0] for text in said) == {"data.label = 'label'": 2} and max(map(len, said)) < 400
