"""A run in which one peer's messages are absurd: the others go on, and the record says whose they were."""

import logging

import pytest
import tiny_models
import tiny_runs

from dfl import config as configuration
from dfl.run import train as running
from dfl.run.build import check
from dfl.store.records import read_lines
from dfl.transport import InProcess


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    return tiny_models.save(folder / "bert", "bert", layers=1), tiny_runs.write_data(folder)


def poisoned(monkeypatch, factor: float) -> None:
    """Peer 1's messages reach the others times `factor`."""
    import torch
    exchange = InProcess.exchange

    def spoil(self, *args):
        arrived = exchange(self, *args)
        for inbox in arrived.values():
            if 1 in inbox:
                payload = {name: (data.view(torch.float32) * factor).view(torch.uint8) for name, data in inbox[1].payload.items()}
                inbox[1] = inbox[1]._replace(payload=payload)
        return arrived

    monkeypatch.setattr(InProcess, "exchange", spoil)


@pytest.mark.parametrize("factor", [1e30, -100.0])
def test_honest_peers_go_on_and_the_sender_is_named_once(root, tmp_path, monkeypatch, caplog, factor):
    poisoned(monkeypatch, factor)
    config = tiny_runs.make_config(*root, tmp_path / "run", method="lora", topology="ring", train__rounds=3)
    with caplog.at_level(logging.WARNING):
        assert running.train(config) == 0
    rounds = read_lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert [(r["rejected"], r["rejected_senders"]) for r in rounds] == [(2, [1])] * 3
    named = [r.getMessage() for r in caplog.records if "rejected the message of peer 1 in round 1" in r.getMessage()]
    assert len(named) == 1


def test_without_a_guard_absurd_values_pass(root, tmp_path, monkeypatch):
    poisoned(monkeypatch, -100.0)
    config = tiny_runs.make_config(*root, tmp_path / "run", method="lora", topology="ring", train__rounds=2, guard="finite")
    assert running.train(config) == 0
    rounds = read_lines(tmp_path / "run" / "metrics.jsonl")[1:]
    assert all(r["rejected"] == 0 and "rejected_senders" not in r for r in rounds)


@pytest.mark.parametrize("value", [1.0, 0, -5, float("inf"), True, "much"])
def test_bounds_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="guard.bound = .* is not allowed; allowed: a number above 1"):
        check(configuration.from_dict({"guard": {"name": "norm", "bound": value}}))
    assert configuration.from_dict({}).guard.name == "norm"
