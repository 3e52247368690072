"""Wrappers in whole runs: with Adam, a warm-up, rates of their own for A and B, halted and resumed."""

import pytest
import tiny_runs
import torch
from tiny_runs import make_config, make_run, put_in

from dfl.run.loop import Hooks, run_rounds
from dfl.run.train import train
from dfl.wrappers import WRAPPERS

# what sums to zero over the peers, by wrapper
CANCEL = {"gradient_tracking": "tracking.offset", "exact_diffusion": "diffusion.memory", "led": "flexatc.dual"}
GIVEN = {"train__lr": 0.01, "train__lr_ratio__B": 4, "train__warmup": 0.5, "train__schedule": "linear", "train__state": "carried"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("wrappers"))


def config_of(root, output, **given):
    return make_config(root / "bert", root / "data.csv", output, **given)


@pytest.mark.long
@pytest.mark.parametrize("wrapper", CANCEL)
@pytest.mark.parametrize("rule", ["lora", "rolora"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_peers_keep_cancels_whatever_the_optimiser(root, tmp_path, wrapper, rule, optimizer):
    given = GIVEN | {"train__optimizer": optimizer, "train__lr": 0.01 if optimizer == "adamw" else 0.5}
    run, _ = make_run(config_of(root, tmp_path, **given, wrapper=wrapper, method=rule))
    assert run_rounds(run, Hooks(lambda record: None, lambda: None, lambda: False))
    kept = torch.stack([state[CANCEL[wrapper]] for state in run.gossip.state["rule"].values()]).double()
    # float32 rows of numbers of about one
    assert kept.abs().max() > 2e-5 and kept.sum(0).abs().max() < 1e-5 * kept.abs().max() + 2e-7


UNEQUAL = {"steps": {"train__local_steps": "null", "train__local_epochs": 1, "partition": "{name: quantity, skew: 1.0}"},
           "scaling": {"lora__alpha": "[2, 4, 8, 4]", "train__local_steps": 3}}


@pytest.mark.parametrize("wrapper", CANCEL)
@pytest.mark.parametrize("unequal", UNEQUAL)
def test_it_cancels_where_peers_take_unequal_steps_or_are_scaled_differently(root, tmp_path, wrapper, unequal):
    """A local epoch is another number of steps at each peer; what is kept is kept in the common scale."""
    run, _ = make_run(config_of(root, tmp_path, **GIVEN | UNEQUAL[unequal], wrapper=wrapper, method="lora"))
    told = []
    plain = run.rule.mix
    put_in(run, rule=run.rule._replace(
        mix=lambda x, inbox, state, round: (told.append(round.local_steps), plain(x, inbox, state, round))[1]))
    assert run_rounds(run, Hooks(lambda record: None, lambda: None, lambda: False))
    assert (len(set(told)) > 1) == (unequal == "steps")
    kept = torch.stack([state[CANCEL[wrapper]] for state in run.gossip.state["rule"].values()]).double()
    assert kept.abs().max() > 2e-5 and kept.sum(0).abs().max() < 1e-5 * kept.abs().max() + 2e-7


@pytest.mark.long
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "none"])
def test_stopped_and_resumed_is_never_stopped(root, tmp_path, wrapper, monkeypatch):
    from dfl.run import train as running
    graph = {"relay": "path", "updates": "complete"}.get(wrapper, "ring")
    named = "{name: muffliato, sigma: 0.1}" if wrapper == "muffliato" else wrapper
    given = GIVEN | {"wrapper": named, "train__local_steps": 3, "eval__every": 0, "topology": graph}
    assert train(config_of(root, tmp_path / "whole", **given)) == 0
    with monkeypatch.context() as patch:  # between two steps of the third round
        tiny_runs.stop_after(running, 3, 5, patch.setattr)
        train(config_of(root, tmp_path / "halves", **given))
    assert train(config_of(root, tmp_path / "halves", **given), resume=True) == 0
    assert tiny_runs.adapter_digests(tmp_path / "whole") == tiny_runs.adapter_digests(tmp_path / "halves")
