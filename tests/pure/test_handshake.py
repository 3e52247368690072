"""What the processes of a run compare before they work together."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import topologies
from dfl.config import from_dict
from dfl.tasks.base import Split
from dfl.transport import InProcess, agreement, handshake

CONFIG = {"peers": 4, "method": {"name": "tad", "T": 5}, "train": {"lr": 0.01}}


class Seen(InProcess):
    """A process that is told `others` (functions of what this one gives) beside its own words."""

    def __init__(self, *others, rank=0):
        self.others, self.rank, self.size = others, rank, 1 + len(others)

    def agree(self, value):
        return max(value, *(bool(other(b"")) for other in self.others))

    def share(self, data):
        return [data, *(other(data) for other in self.others)] if self.rank == 0 else [*(o(data) for o in self.others), data]


def changed(**fields):
    return lambda data: json.dumps(json.loads(data) | fields).encode()


def test_equal_processes_belong_together():
    fields = handshake.settings(from_dict(CONFIG), resume=True)
    handshake.check_settings(Seen(changed(), changed()), fields)


@pytest.mark.parametrize("field, value, said", [
    ("train.lr", 0.02, "train.lr = 0.02, but 0.01 on process 0"), ("method.T", 7, "method.T = 7, but 5 on"),
    ("version", "0.0.1", "version = '0.0.1', but"), ("topology_seed", 3, "topology_seed = 3, but 0 on"),
    ("--resume", False, "--resume = False, but True"), ("method.extra", 1, "method.extra = 1, but None on")])
def test_the_field_that_differs_is_named_with_both_values(field, value, said):
    fields = handshake.settings(from_dict(CONFIG), resume=True)
    with pytest.raises(ValueError) as refused:
        handshake.check_settings(Seen(changed(), changed(**{field: value})), fields)
    assert str(refused.value).startswith("process 2 does not belong to this run: ") and said in str(refused.value)


@pytest.mark.parametrize("tree", [{"device": "cpu"}, {"threads": 3}, {"processes": 2}, {"output": "elsewhere"}, {"timeout": 5.0},
                                  {"topology_seed": 0}, {"model": {"name": "/copy/of/the/model"}},
                                  {"data": {"train": "/copy/train.csv"}}])
def test_what_may_differ_does_not_count(tree):
    assert handshake.settings(from_dict(CONFIG | tree)) == handshake.settings(from_dict(CONFIG))


def split(seed=0, num=40):
    rng = np.random.default_rng(seed)
    return Split([{"input_ids": rng.integers(0, 9, 5).tolist()} for _ in range(num)], rng.integers(0, 2, num), ["no", "yes"], {})


def contents(**changes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).requires_grad_(False)
    given = {"model": model, "train": split(), "valid": split(1), "parts": [np.arange(20), np.arange(20, 40)],
             "topology": topologies.build("erdos_renyi", 6, p=0.5, seed=0)} | changes
    return handshake.contents(**given)


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
    ("training examples", lambda: {"train": split(2)}), ("training labels", lambda: {"train": relabelled()}),
    ("number of training examples", lambda: {"train": split(num=41)}), ("evaluation examples", lambda: {"valid": split(3)}),
    ("label names", lambda: {"train": dataclasses.replace(split(), label_names=["yes", "no"])}),
    ("partition", lambda: {"parts": [np.arange(19), np.arange(19, 40)]}),
    ("topology", lambda: {"topology": topologies.build("erdos_renyi", 6, p=0.5, seed=1)})])
def test_a_digest_tells_what_was_read_from_something_else(field, changes):
    here, there = contents(), contents(**changes())
    assert here == contents() and here[field] != there[field]
    with pytest.raises(ValueError, match=f"process 1 does not belong to this run: {field} = "):
        handshake.check_settings(Seen(lambda _: json.dumps(there).encode()), here)


@pytest.mark.parametrize("index", [0, 1, 2047, 2048, 4095])
def test_one_weight_and_one_token_are_noticed_wherever_they_are(index):
    model = other_model(0)
    with torch.no_grad():
        model[0].weight.view(-1)[index] += 1e-6
    assert contents(model=model)["base model"] != contents(model=other_model(0))["base model"]
    many = split(num=4096)
    before = handshake.examples_digest(many)
    many.features[index]["input_ids"][2] += 1
    assert handshake.examples_digest(many) != before


def test_a_token_that_moves_to_the_next_example_is_noticed():
    one, other = ([{"input_ids": ids} for ids in lists] for lists in ([[1, 2], [3]], [[1], [2, 3]]))
    digests = [handshake.examples_digest(dataclasses.replace(split(), features=features)) for features in (one, other)]
    assert digests[0] != digests[1]


def test_images_are_told_by_their_files(tmp_path):
    pytest.importorskip("PIL.Image")
    from dfl.tasks.images import ImageFeatures
    from dfl.tasks.tables import Table
    for k in range(6):
        (tmp_path / f"{k}.png").write_bytes(bytes([k] * 100))
    names = [f"{k}.png" for k in range(6)]
    features = ImageFeatures(names, np.zeros(6, np.int64), Table({}, "t", list(range(6)), tmp_path), None)
    before = handshake.examples_digest(dataclasses.replace(split(), features=features))
    sample = list(features.sources(200))
    assert len(sample) == 6 + 2 and len(list(features.sources(600))) == 12  # the size of all, and as many bytes as allowed
    (tmp_path / "4.png").write_bytes(bytes([4] * 99 + [5]))
    assert handshake.examples_digest(dataclasses.replace(split(), features=features)) != before


def test_what_changed_since_a_run_was_begun_is_named_with_its_place_and_both_digests():
    here, there = contents(), contents(train=relabelled())
    config = from_dict(CONFIG | {"data": {"source": "file", "train": "mine.csv"}})
    handshake.check_contents(here, here, config, "runs/a")
    handshake.check_contents({}, here, config, "runs/a")  # none were saved
    with pytest.raises(ValueError) as refused:
        handshake.check_contents(here, there, config, "runs/a")
    name = "training labels"
    assert str(refused.value).startswith(f"changed since 'runs/a' was begun: {name} of data.train = 'mine.csv' ({there[name]!r} now, "
                                         f"{here[name]!r} then); ")


def fail(error):
    raise error


def test_an_error_of_another_process_is_raised_here():
    for kind, raised in (("ValueError", ValueError), ("OSError", OSError)):
        with pytest.raises(raised, match="process 1: data.train = 'x' is not a file"):
            agreement.together(Seen(lambda _, kind=kind: f"{kind} data.train = 'x' is not a file".encode()), lambda: 1)
    assert agreement.together(Seen(lambda _: b""), lambda: 7) == 7
    with pytest.raises(UnicodeError) as mine:  # one's own is raised as it was
        agreement.together(Seen(lambda _: b""), lambda: fail(UnicodeError("bad")))
    assert str(mine.value) == "bad"
