"""Figures of the benchmarks on text: their tables are those of the committed results, a study's own clock is the framework's."""

import importlib.util
import json
import sys
from pathlib import Path

import documents
import pytest
import torch

import topologies
from dfl import simulate
from dfl.methods import Choice

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))


def study(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stragglers, many_tasks, to_accuracy = study("stragglers"), study("many_tasks"), study("to_accuracy")
triggers, guards = study("triggers_on_text"), study("guards_on_text")


@pytest.mark.parametrize("made", [stragglers, many_tasks, to_accuracy, triggers, guards], ids=lambda made: made.__name__)
def test_the_tables_are_of_the_committed_results(made):
    assert made.table() in documents.text("benchmarks/README.md")


def test_who_trains_alone_has_a_curve_and_saves_nothing():
    records = [{"round": t, "ledger": {"seconds": float(t)}, "eval": {"accuracy": {"mean": 0.1 * t, "min": 0.0},
                "consensus": {"accuracy": 0.2}}} for t in (0, 4)]
    found = triggers.summary(records)
    assert found["saved"] == 0 and to_accuracy.reached(found["curve"], 0.2) == {"rounds": 2.0, "seconds": 2.0, "MB": 0.0}


def test_another_machine_goes_on_from_the_committed_cells(tmp_path, monkeypatch):
    to_accuracy.restore(tmp_path)
    kept = {}
    monkeypatch.setattr(to_accuracy, "write", lambda name, about, results: kept.update(results))
    to_accuracy.collect(tmp_path)
    assert kept == json.loads((ROOT / "benchmarks" / "results" / "to_accuracy.json").read_text())["results"]


@pytest.mark.parametrize("speed", stragglers.SPEEDS)
def test_shares_are_of_the_depths_that_a_run_has(speed):
    """A backward pass counts as it is planned, of all rounds and peers."""
    found = {setting: stragglers.share_computed(setting, speed, 0) for setting in ("undisturbed", *stragglers.SETTINGS)}
    assert found["undisturbed"] == 1 and found["drop"] < found["salf"] == found["salf, uncorrected"] < 1
    if speed == "machines":
        assert found["salf"] == pytest.approx((4 + 4 + 2 + 2 + 1 + 1) / 24) and found["drop"] == pytest.approx(1 / 3)


def test_the_clock_of_who_waits_is_that_of_a_run(monkeypatch):
    """Machines that take 0.5, 1 and 4 s for a pass, with nobody late: the framework's clock on the same ring."""
    seconds = [0.125, 0.125, 0.25, 0.25, 1.0, 1.0]
    monkeypatch.setitem(stragglers.SPEEDS, "machines", {"speed": "fixed", "deadline": 0.5, "seconds": seconds})
    monkeypatch.setattr(stragglers, "DEADLINE", 0.5)
    factors = {"q": (torch.zeros(stragglers.PEERS, 2, 3), torch.zeros(stragglers.PEERS, 3, 2))}
    done = simulate("lora", topologies.build("ring", stragglers.PEERS), factors, lambda *_: None, stragglers.ROUNDS, local_steps=1,
                    network=Choice("links", {**stragglers.LINK, "compute": [4 * one for one in seconds]}))
    size = done.measures[-1]["sent_bytes"] / (2 * stragglers.PEERS * stragglers.ROUNDS)
    ticks = list(stragglers.clocks("machines", 0, size))
    assert [record["seconds"] for record in done.measures][-1] == pytest.approx(ticks[-1], rel=1e-6)
    assert ticks[-1] == pytest.approx(stragglers.ROUNDS * 4.05, rel=1e-3)  # of two slow machines that wait for each other


@pytest.mark.parametrize("second, expected", [(1, 6.0), (3, 4.0)])
def test_who_waits_does_so_for_neighbours_alone(monkeypatch, second, expected):
    """Peer 0 takes 3 s in the first round and `second` in the next, all others 1: a neighbour of 0 begins late, another not."""
    slow = (0, second)
    monkeypatch.setattr(stragglers, "whole_pass", lambda found, t, peer, seed: 3.0 if peer == slow[t] else 1.0)
    monkeypatch.setattr(stragglers, "ROUNDS", 2)
    assert list(stragglers.clocks("uniform", 0, 0.0)) == pytest.approx([3.05, expected + 0.1])


def test_between_two_evaluations_accuracy_is_on_their_line():
    points = [{"seconds": 0.0, "accuracy": 0.2}, {"seconds": 10.0, "accuracy": 0.6}]
    assert stragglers.at(points, 5.0) == pytest.approx(0.4) and stragglers.at(points, 99.0) == 0.6


def test_what_is_forgotten_is_against_the_adapter_that_was_learnt_alone():
    runs = [{"method": "sparse, alone", "seed": 0, "own": [0.8, 0.7, 0.6], "sum": [0.3, 0.7, 0.5], "together": [0.8, 0.7, 0.6]},
            {"method": "bank", "seed": 0, "own": [0.1, 0.1, 0.1], "sum": [0.7, 0.7, 0.7], "together": [0.7, 0.65, 0.6]},
            {"method": "bank", "seed": 1, "own": [0.1, 0.1, 0.1], "sum": [0.0, 0.0, 0.0], "together": [0.0, 0.0, 0.0]}]
    runs = [{**run, "routed": {str(one): run["sum"] for one in many_tasks.TEMPERATURES},
             "bytes": dict.fromkeys((*many_tasks.BYTES, "messages"), 10 * (1 + run["seed"]))} for run in runs]
    short = many_tasks.in_short(json.loads(json.dumps(runs)))
    assert short["sparse, alone"]["forgotten"] == pytest.approx([0.5, 0.0, 0.1])
    assert short["bank"]["forgotten"] == pytest.approx([0.1, 0.05, 0.0])  # of the one seed that both have
    assert short["bank"]["bytes"]["payload_bytes"] == 15 and short["bank"]["seeds"] == [0, 1]
    assert list(short) == ["bank", "sparse, alone"]


def test_a_target_is_reached_between_two_evaluations_and_only_the_first_time_counts():
    told = [(0, 0.0, 0, 0.2), (4, 2.0, 8_000_000, 0.5), (8, 4.0, 16_000_000, 0.7), (12, 6.0, 20_000_000, 0.4), (16, 8.0, 3e7, 0.9)]
    curve = [dict(zip(("round", "seconds", "bytes", "accuracy"), one, strict=True)) for one in told]
    assert to_accuracy.reached(curve, 0.6) == {"rounds": 6.0, "seconds": 3.0, "MB": 12.0}
    assert to_accuracy.reached(curve, 0.2) is None and to_accuracy.reached(curve, 0.95) is None
    assert to_accuracy.reached(curve, 0.5) == {"rounds": 4.0, "seconds": 2.0, "MB": 8.0}
