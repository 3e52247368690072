"""Label flip as an option of a recipe: whose labels are flipped, in training alone, and what is refused."""

import numpy as np
import pytest
from tiny_runs import local_phase, make_config, make_folder, make_run

from dfl.partition.poison import FlippedLabels
from dfl.run.build import load
from dfl.run.runtime import start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("flipped"))


def config_of(folder, output, **fields):
    return make_config(folder / "bert", folder / "data.csv", output, **fields)


def test_the_examples_named_have_the_class_from_the_other_end():
    features = [{"labels": c, "input_ids": [c]} for c in (0, 1, 2, 3)]
    found = FlippedLabels(features, {0, 2}, 4)
    assert [feature["labels"] for feature in found] == [3, 1, 1, 3] and [f["labels"] for f in features] == [0, 1, 2, 3]
    assert found[-2]["labels"] == 1 and [f["labels"] for f in found[1:3]] == [1, 1] and len(found) == 4


def test_a_peer_s_training_labels_are_flipped_and_nothing_else(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", data__flipped="[1, 3]")
    flipped = load(config, start(config).device)
    plain = load(config_of(folder, tmp_path / "run"), start(config).device)
    mine = set(np.concatenate([flipped.parts[1], flipped.parts[3]]).tolist())
    for i in range(len(plain.bundle.train)):
        honest, told = plain.bundle.train.features[i]["labels"], flipped.bundle.train.features[i]["labels"]
        assert told == (1 - honest if i in mine else honest)
    assert [f["labels"] for f in flipped.bundle.valid.features] == [f["labels"] for f in plain.bundle.valid.features]
    assert np.array_equal(flipped.bundle.train.labels, plain.bundle.train.labels)


def test_the_flipped_peer_alone_learns_otherwise(folder, tmp_path):
    ends = []
    for fields in ({}, {"data__flipped": "[2]"}):
        run, _ = make_run(config_of(folder, tmp_path / "run", lora__head="mixed", **fields))
        local_phase(run)
        ends.append(run.peers.x.clone())
    assert [bool((one == other).all()) for one, other in zip(*ends, strict=True)] == [True, True, False, True]


def test_peers_that_are_none_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data.flipped = \[4\]"):
        config_of(folder, tmp_path / "run", data__flipped="[4]")
