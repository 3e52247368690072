"""What the processes of a run compare before they work together."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import topologies
from dfl import company
from dfl.config import from_dict
from dfl.tasks.base import Split
from dfl.transport import InProcess

CONFIG = {"peers": 4, "rule": {"name": "tad", "T": 5}, "train": {"lr": 0.01}}


class Seen(InProcess):
    """A process that is told `others` (functions of what this one gives) beside its own words."""

    def __init__(self, *others, rank=0):
        self.others, self.rank, self.size = others, rank, 1 + len(others)

    def share(self, data):
        return [data, *(other(data) for other in self.others)] if self.rank == 0 else [*(o(data) for o in self.others), data]


def changed(**fields):
    return lambda data: json.dumps(json.loads(data) | fields).encode()


def test_equal_processes_belong_together():
    fields = company.settings(from_dict(CONFIG), resume=True)
    company.check_company(Seen(changed(), changed()), fields)


@pytest.mark.parametrize("field, value, said", [
    ("train.lr", 0.02, "train.lr = 0.02, but 0.01 on process 0"), ("rule.T", 7, "rule.T = 7, but 5 on"),
    ("version", "0.0.1", "version = '0.0.1', but"), ("topology_seed", 3, "topology_seed = 3, but 0 on"),
    ("--resume", False, "--resume = False, but True"), ("rule.extra", 1, "rule.extra = 1, but None on")])
def test_the_field_that_differs_is_named_with_both_values(field, value, said):
    fields = company.settings(from_dict(CONFIG), resume=True)
    with pytest.raises(ValueError) as refused:
        company.check_company(Seen(changed(), changed(**{field: value})), fields)
    assert str(refused.value).startswith("process 2 does not belong to this run: ") and said in str(refused.value)


@pytest.mark.parametrize("tree", [{"device": "cpu"}, {"threads": 3}, {"processes": 2}, {"output": "elsewhere"}, {"timeout": 5.0},
                                  {"topology_seed": 0}, {"model": {"name": "/copy/of/the/model"}},
                                  {"data": {"train": "/copy/train.csv"}}])
def test_what_may_differ_does_not_count(tree):
    assert company.settings(from_dict(CONFIG | tree)) == company.settings(from_dict(CONFIG))


def split(seed=0, num=40):
    rng = np.random.default_rng(seed)
    return Split([{"input_ids": rng.integers(0, 9, 5).tolist()} for _ in range(num)], rng.integers(0, 2, num), ["no", "yes"], {})


def contents(**changes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).requires_grad_(False)
    given = {"model": model, "train": split(), "valid": split(1), "parts": [np.arange(20), np.arange(20, 40)],
             "topology": topologies.build("erdos_renyi", 6, p=0.5, seed=0)} | changes
    return company.contents(**given)


def other_model(index, dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).requires_grad_(False).to(dtype)
    model[0].bias[index] += 1e-3
    return model


def relabelled():
    labels = split().labels.copy()
    labels[7] ^= 1
    return dataclasses.replace(split(), labels=labels)


@pytest.mark.parametrize("field, changes", [
    ("base model", lambda: {"model": other_model(5)}), ("base model", lambda: {"model": other_model(0, torch.bfloat16)}),
    ("training examples", lambda: {"train": split(2)}), ("training examples", lambda: {"train": relabelled()}),
    ("number of training examples", lambda: {"train": split(num=41)}), ("evaluation examples", lambda: {"valid": split(3)}),
    ("label names", lambda: {"train": dataclasses.replace(split(), label_names=["yes", "no"])}),
    ("partition", lambda: {"parts": [np.arange(19), np.arange(19, 40)]}),
    ("topology", lambda: {"topology": topologies.build("erdos_renyi", 6, p=0.5, seed=1)})])
def test_a_digest_tells_what_was_read_from_something_else(field, changes):
    here, there = contents(), contents(**changes())
    assert here == contents() and here[field] != there[field]
    with pytest.raises(ValueError, match=f"process 1 does not belong to this run: {field} = "):
        company.check_company(Seen(lambda _: json.dumps(there).encode()), here)


class Counted(list):
    """Examples that note which of them are read."""

    def __init__(self):
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return {"input_ids": [index]}


def test_the_digest_of_many_examples_reads_a_sample():
    features = Counted()
    company.examples_digest(Split(features, np.zeros(100_000, dtype=np.int64), ["a"], {}))
    assert company.EXAMPLE_SAMPLE <= len(features.read) <= company.EXAMPLE_SAMPLE + 1


def fail(error):
    raise error


def test_an_error_of_another_process_is_raised_here():
    for kind, raised in (("ValueError", ValueError), ("OSError", OSError)):
        with pytest.raises(raised, match="process 1: data.train = 'x' is not a file"):
            company.together(Seen(lambda _, kind=kind: f"{kind} data.train = 'x' is not a file".encode()), lambda: 1)
    assert company.together(Seen(lambda _: b""), lambda: 7) == 7
    with pytest.raises(UnicodeError) as mine:  # one's own is raised as it was
        company.together(Seen(lambda _: b""), lambda: fail(UnicodeError("bad")))
    assert str(mine.value) == "bad"
