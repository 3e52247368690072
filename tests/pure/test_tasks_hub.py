"""Data sets in the formats of the library datasets, from folders: no network is asked."""

import json

import numpy as np
import pytest
import tiny_models

from dfl.config import DataConfig, ModelConfig
from dfl.tasks import hub, load
from dfl.tasks.tables import encode_labels, label_names

datasets = pytest.importorskip("datasets")
TEXTS = ["good film", "bad film", "not good", "not bad", "the graph", "a peer"] * 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved(tmp_path):
    """A folder written by save_to_disk, whose labels are named in an order of their own; one is unknown."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    train = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 9}, features=features)
    test = datasets.Dataset.from_dict({"text": TEXTS[:4], "label": [0, 1, -1, 0]}, features=features)
    datasets.DatasetDict({"train": train, "valid": train.select(range(4)), "test": test}).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_declared_labels_keep_their_order(saved, tmp_path, capfd):
    model = ModelConfig(name=str(tiny_models.save(tmp_path / "bert", "bert")))
    capfd.readouterr()
    loaded = load(model, DataConfig(source="hub", name=saved, valid="valid", max_length=16), seed=0)
    assert loaded.train.label_names == ["pos", "neg"]
    assert loaded.train.labels.tolist() == [0, 1] * 9 and len(loaded.valid) == 4
    assert loaded.train.columns["label"][:2] == ["pos", "neg"]
    assert capfd.readouterr() == ("", "")


def test_a_folder_of_files_and_a_split_taken_off(tmp_path, capfd):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(TEXTS)))
    train, valid, _ = hub.load(DataConfig(source="hub", name=str(folder)))
    assert valid is None and train.columns["text"] == TEXTS
    assert label_names(train, "label") == ["0", "1"]
    assert encode_labels(train, "label", ["0", "1"]).tolist() == [0, 1] * 9
    assert capfd.readouterr() == ("", "")


def test_a_single_saved_split(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    train, _, _ = hub.load(DataConfig(source="hub", name=str(tmp_path / "one")))
    assert len(train) == 18


def test_images_stay_encoded(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pictures = [image.fromarray(np.full((8, 8, 3), 20 * i, dtype=np.uint8)) for i in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [i // 6 for i in range(12)]}, features=features)
    rows.save_to_disk(tmp_path / "pictures")
    model = ModelConfig(name=str(tiny_models.save(tmp_path / "vit", "vit")), task="image_classification")
    loaded = load(model, DataConfig(source="hub", name=str(tmp_path / "pictures")), seed=0)
    assert isinstance(loaded.train.columns["image"][0], dict)
    assert loaded.task.collate(loaded.train.features)["pixel_values"].shape == (11, 3, 16, 16)


@pytest.mark.parametrize("fields, message", [
    ({}, "data.name is missing"),
    ({"name": "no-such/set"}, "data.name = 'no-such/set' cannot be loaded: .*; allowed: the name of a data set on the hub"),
    ({"name": "SAVED", "train": "trian"}, "data.train = 'trian': .* has no such split; it has: train, valid, test"),
    ({"name": "SAVED", "valid": "dev"}, "data.valid = 'dev': .* has no such split"),
    ({"name": "EMPTY"}, "cannot be loaded")])
def test_what_is_no_data_set_is_one_line(saved, tmp_path, fields, message):
    (tmp_path / "empty").mkdir()
    names = {"SAVED": saved, "EMPTY": str(tmp_path / "empty")}
    fields = {key: names.get(value, value) for key, value in fields.items()}
    with pytest.raises(ValueError, match=message) as caught:
        hub.load(DataConfig(source="hub", **fields))
    assert "\n" not in str(caught.value)


def test_rows_without_a_label_are_named(saved):
    _, test, _ = hub.load(DataConfig(source="hub", name=saved, valid="test"))
    with pytest.raises(ValueError, match="data.label = 'label': line 3 of .*saved .test. has no label"):
        encode_labels(test, "label", ["pos", "neg"])


CHATS = [[{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]
         for word in ("good", "bad", "film", "graph") * 4]
PAIRS = {"prompt": [chat[:1] for chat in CHATS], "chosen": [chat[1:] for chat in CHATS],
         "rejected": [[{"role": "assistant", "content": "no"}] for _ in CHATS]}


@pytest.mark.parametrize("task, columns, words", [
    ("causal_lm", {"messages": CHATS}, {"messages": "messages"}),
    ("causal_lm", {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"]}, {"prompt": "prompt", "response": "completion"}),
    ("preference", PAIRS, {"prompt": "prompt"})], ids=["messages", "prompt and completion", "preferences"])
def test_conversations_are_those_of_a_file_of_lines(tmp_path, task, columns, words):
    """Lists of structures come from a set as from JSON: the same tokens, and the same of them learnt."""
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ModelConfig(name=str(tiny_models.save(tmp_path / "gpt2", "gpt2")), task=task)
    words = words | {"template": "plain", "max_length": 64}
    saved = load(model, DataConfig(source="hub", name=str(tmp_path / "saved"), **words), seed=0)
    lines = load(model, DataConfig(source="file", train=str(tmp_path / "rows.jsonl"), **words), seed=0)
    read = [[{name: list(part) for name, part in feature.items()} for feature in one.train.features] for one in (saved, lines)]
    assert read[0] == read[1] and len(read[0]) > 10
