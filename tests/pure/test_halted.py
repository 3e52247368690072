"""Stopped in the middle of a round, or of an evaluation, and gone on with: the same bits and records as never stopped."""

from pathlib import Path

import pytest
import tiny_runs
from test_checkpoint import CARRIED, RESUMED, assert_same_run

from dfl.metrics.evaluator import Evaluator
from dfl.run import checkpoint, saving
from dfl.run import train as running
from dfl.store.records import read_lines

CASES = {name: RESUMED[name] for name in ("adf, moments across rounds", "tad, moments across a switch", "rolora with a local head",
                                          "sgd with momentum", "schedule", "dropout", "random graph, epochs", "stacked")} | {
    "fresh sgd with momentum": {"method": "lora", "train__optimizer": "sgd", "train__momentum": 0.9},
    "accumulation": {"method": "lora", "train__accumulation": 2},
    "masks": {"method": "plora", **CARRIED}, "masks, fresh": {"method": "plora"},
    "stretched steps": {"method": "{name: salf, speed: poisson, deadline: 1}"},
    "a residual": {"method": "fedex_choco", **CARRIED},
    "ahead": {"method": "decaf", "delay": 1}, "ahead, differences": {"method": "lora", "delay": 1, "codec": "sign"},
    "cores": {"method": "fed_sb", "lora__adapter": "sb"},
    "stacked, epochs": RESUMED["random graph, epochs"] | {"train__executor": "stacked"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("halted"))


def make_config(root, output, **fields):
    return tiny_runs.make_config(root / "bert", root / "data.csv", output, **{"train__rounds": 3, "eval__every": 2,
                                 "train__local_steps": 3, "lora__targets": "[query,value]"} | fields)


def halt(monkeypatch, config, rounds, steps, resume):
    with monkeypatch.context() as patch:
        tiny_runs.stop_after(running, rounds, steps, patch.setattr)
        assert running.train(config, resume=resume) == running.STOPPED


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_in_the_middle_of_rounds(root, tmp_path, monkeypatch, case, capsys):
    """Before the first step, in the steps of the first peer and of a later one, twice in one round, and in its last."""
    straight, halted = (make_config(root, tmp_path / name, **CASES[case]) for name in ("straight", "halted"))
    assert running.train(straight) == 0
    stops = [(1, 0), (1, 1), (1, 1), (2, 2)] if "stacked" in case else [(1, 0), (1, 1), (1, 4), (2, 8)]
    for number, (rounds, steps) in enumerate(stops):
        halt(monkeypatch, halted, rounds, steps, number > 0)
        assert "in the middle of the next; the state is saved" in capsys.readouterr().err
    assert checkpoint.latest(Path(halted.output)).name == "round-00001"
    assert running.train(halted, resume=True) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "halted")


@pytest.mark.long
def test_what_is_kept_of_a_round_is_needed(root, tmp_path, monkeypatch):
    """Else the cases above would show nothing: without the generators, the moments and the losses it ends in other bits."""
    case = CASES["dropout"] | CARRIED
    assert running.train(make_config(root, tmp_path / "straight", **case)) == 0
    for lost in ("generator.", "moments.", "part.1.losses"):
        config = make_config(root, tmp_path / lost, **case)
        halt(monkeypatch, config, 2, 4, False)
        read = saving.read_state
        with monkeypatch.context() as patch:
            patch.setattr(saving, "read_state", lambda folder, ids, lost=lost, read=read: {
                name: value * 0 if name == lost == "part.1.losses" else value for name, value in read(folder, ids).items()
                if not name.startswith(lost) or lost == "part.1.losses"})
            assert running.train(config, resume=True) == 0
        with pytest.raises(AssertionError):
            assert_same_run(tmp_path / "straight", tmp_path / lost)


def broken_off(monkeypatch, config, number, resume):
    """A signal that comes in evaluation `number` (from 1) of a start, between two of its batches."""
    stop, calls, over_batches = tiny_runs.StopAfter(99), [0], Evaluator._pass

    def counting(self, *given):
        calls[0] += 1
        if calls[0] == number:
            stop.received = 1
        return over_batches(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(running, "StopSignal", lambda: stop)
        patch.setattr(running, "Halt", stop.halt)
        patch.setattr(Evaluator, "_pass", counting)
        assert running.train(config, resume=resume) == running.STOPPED


@pytest.mark.long
@pytest.mark.parametrize("number, done", [(1, -1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_in_an_evaluation(root, tmp_path, monkeypatch, number, done, capsys):
    """At the start, of the peers, of the consensus, in the middle and at the end: given up, and done again."""
    straight, halted = (make_config(root, tmp_path / name) for name in ("straight", "halted"))
    assert running.train(straight) == 0
    broken_off(monkeypatch, halted, number, False)
    assert ("before the first round" if number == 1 else "before its evaluation; the state is saved") in capsys.readouterr().err
    assert (checkpoint.latest(Path(halted.output)) is None) == (number == 1)
    assert [line["round"] for line in read_lines(tmp_path / "halted" / "metrics.jsonl")] == list(range(done + 1))
    if number > 1:  # and once more in the same
        broken_off(monkeypatch, halted, 1, True)
    assert running.train(halted, resume=True) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "halted")


@pytest.mark.long
def test_in_the_baseline(root, tmp_path, monkeypatch):
    """The run is finished; the baseline stops in a step and in its first evaluation, and goes on."""
    straight, halted = (make_config(root, tmp_path / name, baseline="local") for name in ("straight", "halted"))
    assert running.train(straight) == 0
    halt(monkeypatch, halted, 4, 2, False)
    broken_off(monkeypatch, halted, 1, True)
    assert running.train(halted, resume=True) == 0
    for folder in (".", "baseline-local"):
        assert_same_run(tmp_path / "straight" / folder, tmp_path / "halted" / folder)


def test_a_peer_that_diverges_after_a_stop_goes_back_to_the_start_of_the_round(root, tmp_path, monkeypatch):
    fields = {"method": "lora", "train__lr": 1e30, "lora__head": "mixed", **CARRIED, "train__local_steps": 4}
    found = []
    for name in ("straight", "halted"):
        config = make_config(root, tmp_path / name, **fields)
        if name == "halted":
            halt(monkeypatch, config, 1, 1, False)
        with pytest.raises(FloatingPointError) as failed:
            running.train(config, resume=name == "halted")
        found.append(str(failed.value))
    assert found[0] == found[1]
    assert_same_run(tmp_path / "straight", tmp_path / "halted")
