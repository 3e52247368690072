"""Files of every format become the same splits, and whatever is wrong with one is named in a line."""

import gzip
import json

import numpy as np
import pytest

from dfl.config import DataConfig, ModelConfig
from dfl.tasks import divide, files, load, read_data
from dfl.tasks.classification import SequenceClassification
from dfl.tasks.tables import encode_labels, label_names

ROWS = [("a good film", "yes"), ('a "bad one', "no"), ("naïve, and good", "yes"), ("not good", "no")]
CSV = "text,label\na good film,yes\n\"a \"\"bad one\",no\n\"naïve, and good\",yes\n\nnot good,no\n"
TSV = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)
JSON = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)


def write(path, content):
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def table(path, content, **fields):
    """What a user gets for a file: the table, checked for a classification."""
    return read_data(SequenceClassification, DataConfig(source="file", train=write(path, content), **fields), 0)[0]


@pytest.mark.parametrize("name, content", [
    ("a.csv", CSV), ("a.csv.gz", CSV), ("a.tsv", TSV), ("a.tsv.gz", TSV), ("a.TSV", TSV.replace("\n", "\r\n")),
    ("a.jsonl", JSON), ("a.ndjson", "\n" + JSON), ("a.json", JSON), ("a.jsonl.gz", JSON),
    ("a.csv", b"\xef\xbb\xbf" + CSV.encode())])
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    got = table(tmp_path / name, content)
    assert list(zip(got.columns["text"], got.columns["label"], strict=True)) == ROWS


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow
    parquet.write_table(pyarrow.table({"text": [t for t, _ in ROWS], "label": [0, 1, 0, 1]}), tmp_path / "a.parquet")
    got = files.read(str(tmp_path / "a.parquet"), "train")
    assert got.columns["text"] == [t for t, _ in ROWS]
    assert label_names(got, "label") == ["0", "1"]
    (tmp_path / "b.parquet").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="b.parquet is not a Parquet file"):
        files.read(str(tmp_path / "b.parquet"), "train")


@pytest.mark.parametrize("name, content, message", [
    ("a.csv", "", "a.csv' is empty"),
    ("a.csv", "text,label\n", "a.csv' is empty"),
    ("a.jsonl", "\n\n", "is empty"),
    ("a.csv", "text,label\nx,1\ny\n", "line 3 of .* has 1 fields, the first line has 2: text, label"),
    ("a.csv", 'text,label\n"x"y,1\n', "line 2 of .*expected after"),
    ("a.csv", "text,text\nx,1\n", "names a column twice"),
    ("a.tsv", b"text\tlabel\nx\t1\n\xff\t2\n", "line 3 of .* is not UTF-8 .byte 0xff"),
    ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2 of .* is not JSON"),
    ("a.jsonl", '{"text": "x"}\n[1]\n', "line 2 of .* is not a JSON object"),
    ("a.txt", "x", "unknown extension; allowed: .csv, .tsv"),
    ("a.tsv.zip", "x", "unknown extension"),
    ("a.csv", "sentence,label\nx,1\n", "data.text = 'text': no such column in .*a.csv; it has: sentence, label"),
    ("a.jsonl", '{"text": "x"}\n{"text": 3}\n', "line 2 of .* holds 3, not a text"),
    ("a.jsonl", '{"text": "x", "label": 1}\n{"label": 2}\n', "line 2 of .* holds None, not a text")])
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        table(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_a_gz_that_is_none_and_missing_files(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(b"text,label\n")
    with pytest.raises(ValueError, match="cannot be read"):
        files.read(str(tmp_path / "a.csv.gz"), "train")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(CSV.encode())[:-12])
    with pytest.raises(ValueError, match="cannot be read"):
        files.read(str(tmp_path / "b.csv.gz"), "train")
    with pytest.raises(ValueError, match="data.valid = 'nowhere.csv' is not a file"):
        files.read("nowhere.csv", "valid")
    with pytest.raises(ValueError, match="data.train is missing"):
        files.load(DataConfig(source="file"))


@pytest.mark.parametrize("labels, names", [(["2", "10", "1"], ["1", "2", "10"]), (["b", "a", "10"], ["10", "a", "b"]),
                                           (["-1", "0.5", "0"], ["-1", "0", "0.5"]),
                                           (["1.0", "2", "1", "01"], ["01", "1", "1.0", "2"]),
                                           (["nan", "inf", "2", "10"], ["10", "2", "inf", "nan"])])
def test_label_names_are_sorted_as_numbers_where_they_are_numbers(tmp_path, labels, names):
    got = table(tmp_path / "a.csv", "text,label\n" + "".join(f"x,{label}\n" for label in labels))
    assert label_names(got, "label") == names
    assert encode_labels(got, "label", names).tolist() == [names.index(label) for label in labels]


@pytest.mark.parametrize("rows, message", [
    ("x,1\ny,\nz,2\n", "data.label = 'label': line 3 of .* has no label .found ''"),
    ("x,1\ny,  \nz,2\n", "line 3 of .* has no label"),
    ("x,1\ny,1\n", "every row of .* has the label '1'"),
    ("".join(f"x,text{i}\n" for i in range(30)), "each of the 30 rows .* has a label of its own")])
def test_labels_that_are_no_classes(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        label_names(table(tmp_path / "a.csv", "text,label\n" + rows), "label")


def test_a_label_that_only_the_validation_file_has(tmp_path):
    valid = write(tmp_path / "valid.csv", "text,label\nx,no\ny,maybe\n")
    data = DataConfig(source="file", train=write(tmp_path / "train.csv", CSV), valid=valid)
    with pytest.raises(ValueError, match="line 3 of .*valid.csv has the label 'maybe', which no training example has"):
        load(ModelConfig(), data, seed=0)


def test_splits_and_subsets_are_disjoint_deterministic_and_keep_their_order(tmp_path):
    content = "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(100))
    whole = table(tmp_path / "a.csv", content)
    data = DataConfig(valid_fraction=0.2, max_train=50, max_valid=10)
    train, valid = divide(whole, None, data, 0)
    assert (len(train), len(valid)) == (50, 10)
    assert not set(train.columns["text"]) & set(valid.columns["text"])
    assert train.lines == sorted(train.lines)
    again, _ = divide(whole, None, data, 0)
    other, _ = divide(whole, None, data, 1)
    assert again.columns == train.columns != other.columns
    with pytest.raises(ValueError, match="data.valid_fraction = 0.0 of the 100 rows .* no validation example"):
        divide(whole, None, DataConfig(valid_fraction=0.0), 0)
    with pytest.raises(ValueError, match="leaves no training example"):
        divide(whole.rows(np.arange(1)), None, DataConfig(), 0)


def test_names_that_are_not_in_a_table():
    with pytest.raises(ValueError, match="data.source = 'fiel' is not known .did you mean 'file'.*; allowed: docstrings"):
        load(ModelConfig(), DataConfig(source="fiel"), seed=0)
    with pytest.raises(ValueError, match="model.task = 'lm' is not known; allowed: sequence_classification, sequence_regression"):
        load(ModelConfig(task="lm"), DataConfig(), seed=0)


def test_data_problems_come_before_the_model_is_read(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="data.train"):
        load(ModelConfig(name=str(folder)), DataConfig(source="file", train="nowhere.csv"), seed=0)
