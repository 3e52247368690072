"""Batches that are made while the model works on the one before: the same bits, in one thread, and errors where they belong."""

import json
import threading

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch

from dfl.run.train import train
from dfl.training import batches
from dfl.training.batches import Ahead, pays


def test_the_next_is_begun_before_it_is_asked_for_and_all_in_one_thread():
    begun, threads = {k: threading.Event() for k in range(5)}, set()

    def make(k: int) -> int:
        begun[k].set()
        threads.add(threading.get_ident())
        return k * k

    ahead = Ahead(make)
    for k in range(4):
        assert ahead.get(k, k + 1) == k * k
        assert begun[k + 1].wait(10)  # while this one is worked on
    assert ahead.get(4, None) == 16 and len(threads) == 1 and threading.get_ident() not in threads


def test_what_was_not_foreseen_is_made_then():
    made = []
    ahead = Ahead(lambda k: made.append(k) or k)
    assert ahead.get(0, 7) == 0
    ahead.settle()
    assert made == [0, 7]
    assert ahead.get(1, None) == 1 and ahead.get(7, None) == 7 and made == [0, 7, 1, 7]


def test_an_error_comes_where_the_batch_is_asked_for():
    ahead = Ahead(lambda k: 1 // (2 - k))
    assert ahead.get(1, 2) == 1
    ahead.settle()
    with pytest.raises(ZeroDivisionError):
        ahead.get(2, None)
    assert ahead.get(3, None) == -1


def test_what_lies_ready_needs_no_thread():
    assert not pays([{}], torch.device("cpu"))
    assert pays([{}], torch.device("cuda")) and pays(range(3), torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    image, folder = pytest.importorskip("PIL.Image"), tmp_path_factory.mktemp("batches")
    rng = np.random.default_rng(0)
    for k in range(16):
        image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    (folder / "images.jsonl").write_text("\n".join(json.dumps({"image": f"{k}.png", "label": "ab"[k % 2]}) for k in range(16)))
    tiny_models.save(folder / "vit", "vit")
    return folder


def make(root, output, data="images.jsonl", **fields):
    given = {"model__task": "image_classification", "train__rounds": 2, "train__accumulation": 2, "train__local_steps": 3,
             "lora__targets": ["q_proj", "v_proj"]}
    return tiny_runs.make_config(root / "vit", root / data, output, **given | fields)


def test_a_run_that_makes_them_ahead_ends_in_the_same_bits(root, tmp_path, monkeypatch):
    taken = []
    get = Ahead.get
    monkeypatch.setattr(Ahead, "get", lambda self, key, following: taken.append((key, following)) or get(self, key, following))
    assert train(make(root, tmp_path / "ahead")) == 0
    foreseen = [following for _, following in taken if following]
    assert 3 * len(foreseen) == 2 * len(taken) > 0 and set(foreseen) <= {key for key, _ in taken}  # all but the first of a round
    taken.clear()
    monkeypatch.setattr(batches, "pays", lambda *_: False)
    assert train(make(root, tmp_path / "then")) == 0 and not taken
    assert tiny_runs.adapter_digests(tmp_path / "ahead") == tiny_runs.adapter_digests(tmp_path / "then")


def test_a_run_that_is_stopped_between_two_steps_goes_on_to_the_same_bits(root, tmp_path, monkeypatch):
    tiny_runs.assert_goes_on(lambda folder, name: make(root, folder / name, train__rounds=4), tmp_path, monkeypatch, 2)


def test_a_picture_that_cannot_be_read_is_named(root, tmp_path):
    lines = (root / "images.jsonl").read_text().replace('"3.png', '"text.png')
    (root / "broken.jsonl").write_text(lines)
    (root / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="line 4 of .*broken.jsonl: the image cannot be read"):
        train(make(root, tmp_path / "run", data="broken.jsonl"))
