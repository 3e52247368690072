"""Docstrings of installed packages: balanced, masked, disjoint, the same every time."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dfl.config import DataConfig
from dfl.tasks import docstrings

read = docstrings.docstrings


@pytest.fixture(scope="module", autouse=True)
def parsed_once():
    """All loads read the same files: each is parsed once."""
    kept = cache(lambda path: tuple(read(path)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "docstrings", kept)
        yield


@pytest.fixture(scope="module")
def tables():
    return docstrings.load(DataConfig(), masked=True)


def beginnings(table):
    return {re.sub(r"[^a-z]", "", text.replace("[name]", "").lower())[:100] for text in table.columns["text"]}


@pytest.mark.long
def test_both_splits_are_balanced_and_large(tables):
    train, valid, facts = tables
    for table, least in ((train, 2000), (valid, 200)):
        names, counts = np.unique(table.columns["label"], return_counts=True)
        assert names.tolist() == sorted(docstrings.PACKAGES) == list(facts["packages"]) and len(set(counts)) == 1
        assert len(table) >= least
    assert len(set(train.columns["label"][:20])) > 2  # shuffled


def test_no_docstring_is_in_both_splits_or_twice(tables):
    train, valid, _ = tables
    assert len(beginnings(train)) == len(train) and len(beginnings(valid)) == len(valid)
    assert not beginnings(train) & beginnings(valid)


def test_no_name_gives_the_answer_away(tables):
    for table in tables[:2]:
        for text in table.columns["text"]:
            assert not re.search(r"(?i)numpy|networkx|torch|transformers|huggingface|peft|\bnp\.|\bnx\.", text)


@pytest.mark.parametrize("text, masked", [
    ("np.array and nx.Graph", "[name].array and [name].Graph"), ("use PyTorch's torch_dtype", "use [name]'s [name]_dtype"),
    ("PeftModel of 🤗 PEFT", "[name]Model of 🤗 [name]"), ("a Hugging Face model", "a [name] model"),
    ("input and a transformer for context", "input and a transformer for context"), ("from_np_array", "from_[name]_array")])
def test_names_go_and_words_stay(text, masked):
    assert docstrings.NAMES.sub("[name]", text) == masked


def test_the_same_again_and_another_split_with_another_seed():
    once, again, other = (docstrings.load(DataConfig(max_train=500), masked=True, data_seed=seed) for seed in (0, 0, 1))
    assert [t.columns for t in again[:2]] == [t.columns for t in once[:2]]
    assert beginnings(other[1]) != beginnings(once[1]) and not beginnings(other[0]) & beginnings(other[1])


@pytest.mark.parametrize("fields, sizes", [({"max_train": 100, "max_valid": 50}, (100, 50)), ({"max_train": 103}, (100, 10)),
                                           ({"max_train": 50, "valid_fraction": 0.5}, (50, 50))])
def test_sizes_are_what_is_asked_for(fields, sizes):
    train, valid, _ = docstrings.load(DataConfig(**fields), masked=True)
    assert (len(train), len(valid)) == sizes


def test_sizes_that_leave_nothing(monkeypatch):
    with pytest.raises(ValueError, match="data.valid_fraction = 0.0 leaves no validation example"):
        docstrings.load(DataConfig(valid_fraction=0.0), masked=True)
    with pytest.raises(ValueError, match="data.max_train = 4 is less than one docstring of each package; allowed: 5 or more"):
        docstrings.load(DataConfig(max_train=4), masked=True)
    monkeypatch.setattr(docstrings, "PACKAGES", ("peft",))
    with pytest.raises(ValueError, match="data.max_valid = 99999 leaves no docstring to train on; allowed: up to"):
        docstrings.load(DataConfig(max_valid=99999), masked=True)


def test_plain_text_keeps_the_names():
    train, _, _ = docstrings.load(DataConfig(max_train=500), masked=False)
    masked, _, _ = docstrings.load(DataConfig(max_train=500), masked=True)
    assert any("numpy" in text for text in train.columns["text"])
    assert train.columns["label"] == masked.columns["label"] and train.columns["text"] != masked.columns["text"]


@pytest.mark.long
def test_packages_are_read_and_not_imported():
    program = ("import sys; from dfl.config import DataConfig; from dfl.tasks import docstrings; before = set(sys.modules); "
               "docstrings.load(DataConfig(max_train=100), masked=True); new = set(sys.modules) - before; "
               "assert not {'peft', 'transformers', 'networkx'} & new, new")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


NESTED = '''
"""Module."""
try:
    def a():
        """A."""
        with open("x") as f:
            class B:
                """B."""
except OSError:
    def c(): "C."
else:
    for _ in []:
        def d():
            """D."""
    else:
        while True:
            async def e():
                """E."""
finally:
    match 1:
        case 1:
            def f():
                """F."""
        case _:
            if (lambda: "G.")():
                def h():
                    """H."""
            elif 2:
                def i():
                    """I."""
def j(k=lambda: 0):
    """J."""
'''


@pytest.mark.parametrize("source", ["nested", "torch/nn/functional.py", "numpy/__init__.py"])
def test_docstrings_come_in_the_order_of_a_walk_over_all_nodes(tmp_path, source):
    path = Path(np.__file__).parents[1] / source
    if source == "nested":
        path = tmp_path / "nested.py"
        path.write_text(NESTED)
    defined = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, defined)]
    expected = [text for node in nodes if (text := ast.get_docstring(node))]
    assert list(read(path)) == expected and len(expected) > (9 if source == "nested" else 2)


def test_files_that_do_not_parse_have_no_docstrings(tmp_path):
    path = tmp_path / "a.py"
    for content in (b"def f(:\n", b"\xff\xfe", b"x = 1\0", b""):
        path.write_bytes(content)
        assert list(read(path)) == []
    path.write_text('"""One."""\nclass A:\n    """Two.\n\n    Three."""\n    async def f(self):\n        "Four."\n')
    assert list(read(path)) == ["One.", "Two.\n\nThree.", "Four."]


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("no_such_package",))
    with pytest.raises(ValueError, match="needs the package no_such_package, which is not installed"):
        docstrings.load(DataConfig(), masked=True)
