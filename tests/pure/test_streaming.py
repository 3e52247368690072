"""Training examples that stay on disk: the same as those in memory, at a memory that does not grow with the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from test_packing import text_config, write_text
from tiny_runs import adapter_digests

from dfl import tasks
from dfl.config import DataConfig, ModelConfig
from dfl.run import build
from dfl.run import train as running
from dfl.store.records import read_lines
from dfl.tasks import streamed

pytest.importorskip("datasets", reason="the extra `data` is not installed")

# what is freed goes back to the system, so that what is held is what is needed
FRUGAL = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536",
          "MALLOC_MMAP_THRESHOLD_": "65536"}
WATCHED = """
import sys, threading, time
from dfl import tasks
from dfl.config import DataConfig, ModelConfig

def held():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while not done:
        most.append(held())
        time.sleep(0.005)

import datasets, pyarrow, pandas  # what they take is not the file's
folder, path, streaming = sys.argv[1:]
def read(path):
    data = DataConfig(source="file", train=path, max_valid=20, max_length=8, streaming=streaming == "yes")
    return tasks.prepare(ModelConfig(name=folder, task="causal_lm"), data)
read(path.replace("large", "few").replace("small", "few"))
most, done, before = [], False, held()
thread = threading.Thread(target=watch)
thread.start()
found = read(path)
done = True
thread.join()
print(len(found.train), max(most) - before)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    return tiny_models.save(tmp_path / "llama", "llama", layers=2)


def prepared(model, **fields):
    data = DataConfig(**{"source": "file", "max_valid": 10, "max_length": 64} | fields)
    return tasks.prepare(ModelConfig(name=str(model), task="causal_lm"), data)


def write(folder, name, rows):
    path = folder / name
    if name.endswith("parquet"):
        import datasets
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "," if name.endswith("csv") else "\t"
        path.write_text("\n".join([separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]) + "\n")
    return str(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet"])
def test_rows_on_disk_are_those_in_memory(tmp_path, model, name):
    words = tiny_models.WORDS
    rows = [{"text": f"{words[k % 22]} {words[k // 22]} nan" + " film" * (k % 9), "number": str(k)} for k in range(400)]
    train, valid = write(tmp_path, name, rows), write(tmp_path, f"valid-{name}", rows[:30])
    held, kept = (prepared(model, train=train, valid=valid, max_valid=None, max_length=6, streaming=on) for on in (False, True))
    assert isinstance(kept.train.features, streamed.Rows) and len(kept.train) == 400
    for one, other in zip(held.train.features, kept.train.features, strict=True):
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() and one[key].dtype == other[key].dtype for key in one)
    assert held.train.cut == kept.train.cut and held.train.cut["text"] > 100
    assert (held.train.lengths() == kept.train.lengths()).all() and kept.train.columns["number"] == [row["number"] for row in rows]
    assert [f["input_ids"].tolist() for f in held.valid.features] == [f["input_ids"].tolist() for f in kept.valid.features]


def test_conversations_stream(tmp_path, model):
    rows = [{"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": "good " * (k + 1)}]} for k in range(30)]
    path = write(tmp_path, "talk.jsonl", rows)
    fields = {"train": path, "valid": path, "messages": "messages", "template": "plain", "max_valid": None}
    held, kept = (prepared(model, streaming=on, **fields) for on in (False, True))
    for one, other in zip(held.train.features, kept.train.features, strict=True):
        assert all((one[key] == other[key]).all() for key in one)


def test_the_second_time_nothing_is_tokenised(tmp_path, model, monkeypatch):
    path = write(tmp_path, "rows.jsonl", [{"text": f"how {word}"} for word in tiny_models.WORDS])
    first = prepared(model, train=path, streaming=True, max_valid=2)
    monkeypatch.setattr(streamed, "_as_columns", lambda found: pytest.fail("tokenised again"))
    again = prepared(model, train=path, streaming=True, max_valid=2)
    assert again.train.features.digest == first.train.features.digest
    monkeypatch.undo()
    assert prepared(model, train=path, streaming=True, max_valid=2, max_length=9).train.features.digest != first.train.features.digest


@pytest.mark.parametrize("fields", [{}, {"data__packing": True}], ids=str)
def test_a_run_from_disk_is_defined_and_goes_on(tmp_path, fields):
    """The partition is that of so many rows, whatever holds them; two runs, and one that was continued, end alike."""
    fields = {"data__streaming": True, "data__max_valid": 20, "partition": "iid"} | fields
    for output in ("one", "two"):
        assert running.train(text_config(tmp_path, output, **fields)) == 0
    assert adapter_digests(tmp_path / "one") == adapter_digests(tmp_path / "two")
    assert running.train(text_config(tmp_path, "one", train__rounds=4, **fields), resume=True) == 0
    examples = build.read_examples(text_config(tmp_path, **fields))
    assert sorted(np.concatenate(examples.parts)) == list(range(100)) and len(examples.parts) == 4
    facts = json.loads((tmp_path / "one" / "run.json").read_text())["facts"]["data"]["train"]
    assert facts["rows"] == 100 and facts["tokens"]["max"] <= 16 and facts["cut"]["text"] >= 0
    assert read_lines(tmp_path / "one" / "metrics.jsonl")[-1]["round"] == 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
@pytest.mark.long
@pytest.mark.timeout(400)
def test_memory_does_not_grow_with_the_file(tmp_path, model):
    """Of a file four times as large no more is in memory than of the small one: what a piece needs. Read whole it is all there."""
    words, rng = tiny_models.WORDS, np.random.default_rng(0)
    for name, num in (("few", 50), ("small", 15_000), ("large", 60_000)):
        with open(tmp_path / f"{name}.jsonl", "w") as out:
            for k in range(num):
                text = " ".join(words[w] for w in rng.integers(0, 22, size=12))
                out.write(json.dumps({"text": text, "about": f"{k} " * 330}) + "\n")
    size = {name: (tmp_path / f"{name}.jsonl").stat().st_size / 2**20 for name in ("small", "large")}
    found = {}
    for name, streaming in (("small", "yes"), ("large", "yes"), ("large", "no")):
        done = subprocess.run([sys.executable, "-c", WATCHED, str(model), str(tmp_path / f"{name}.jsonl"), streaming],
                              capture_output=True, text=True, timeout=300, env=os.environ | FRUGAL)
        assert done.returncode == 0, done.stderr[-2000:]
        found[name, streaming] = float(done.stdout.split()[-1])
    grown = size["large"] - size["small"]
    assert grown > 80 and found["large", "yes"] - found["small", "yes"] < 0.35 * grown, (size, found)
    assert found["large", "no"] > 2 * size["large"] and found["large", "yes"] < 0.5 * found["large", "no"], (size, found)


@pytest.mark.parametrize("fields, said", [
    ({"max_valid": None}, "data.streaming = True reads validation examples into memory; give data.valid, or data.max_valid"),
    ({"train": None}, "data.streaming = True reads data.source = 'file'"),
    ({"train": "absent.jsonl"}, "data.train = 'absent.jsonl' is not a file of these kinds: .csv"),
    ({"max_valid": 500}, "data.max_valid = 500 of the 120 rows of .* leaves no training example"),
    ({"text": "txt"}, "data.text = 'txt': no such column")])
def test_what_cannot_be_streamed_is_refused(tmp_path, model, fields, said):
    with pytest.raises(ValueError, match=said):
        prepared(model, **{"train": str(write_text(tmp_path)), "streaming": True} | fields)


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.csv"])
def test_a_row_that_is_no_conversation_is_named_by_its_line(tmp_path, model, name):
    """Whichever rows are taken off for the evaluation."""
    talk = json.dumps([{"role": "user", "content": "how"}, {"role": "assistant", "content": "good"}])
    quoted = '"' + talk.replace('"', '""') + '"'
    rows = [{"messages": "no talk" if k == 16 else quoted if name.endswith("csv") else talk} for k in range(40)]
    path, line = write(tmp_path, name, rows), 18 if name.endswith("csv") else 17
    for seed in range(3):
        with pytest.raises(ValueError, match=f"line {line} of .*{name} holds a text that is no JSON"):
            tasks.prepare(ModelConfig(name=str(model), task="causal_lm"), DataConfig(
                source="file", train=path, max_valid=12, max_train=28, streaming=True, messages="messages", template="plain",
                max_length=64), data_seed=seed)


def test_a_damaged_file_is_one_line(tmp_path, model):
    (tmp_path / "bad.jsonl").write_text('{"text": "how"}\n{"text": \n')
    with pytest.raises(ValueError, match="data.train = '.*bad.jsonl' cannot be read piece by piece"):
        prepared(model, train=str(tmp_path / "bad.jsonl"), streaming=True)
