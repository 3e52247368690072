"""A learning rate for each group of trained numbers: what a ratio multiplies, and what it leaves alone."""

import json

import pytest
import tiny_runs
import torch

from dfl import sweep as sweeps
from dfl.config import load, resolve
from dfl.run.train import train
from dfl.store.records import read_lines
from dfl.training.executors import Sequential

BOTH = frozenset({"A", "B"})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("rates"))


def make_config(root, output, **fields):
    return tiny_runs.make_config(root / "bert", root / "data.csv", output, **fields)


def make_run(root, output, **fields):
    return tiny_runs.make_run(make_config(root, output, **fields))[0]


def local_phase(run, t=0, trains=BOTH):
    tiny_runs.local_phase(run, t, tiny_runs.plans(run.peers, trains), Sequential())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_equal_ratios_are_another_rate_bit_for_bit(root, tmp_path, optimizer):
    given = {"train__optimizer": optimizer, "train__schedule": "cosine", "train__warmup": 0.3,
             "train__weight_decay": 0.1, "method": "decaf"}
    one = make_config(root, tmp_path / "one", train__lr=0.02, **given)
    halves = make_config(root, tmp_path / "halves", train__lr=0.04, train__lr_ratio="{A: 0.5, B: 0.5}", **given)
    assert train(one) == 0 and train(halves) == 0
    assert tiny_runs.adapter_digests(tmp_path / "one") == tiny_runs.adapter_digests(tmp_path / "halves")


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_is_that_of_an_optimiser_with_two_groups(root, tmp_path, optimizer):
    run = make_run(root, tmp_path, train__local_steps=1, train__lr=0.01, train__lr_ratio__B=16, train__weight_decay=0.1,
                   train__optimizer=optimizer, train__warmup=0.5, train__rounds=8)
    run.peers.x.copy_(torch.randn(run.peers.x.shape, generator=torch.Generator().manual_seed(0)) / 10)
    before = run.peers.x.clone()
    local_phase(run, t=2)
    lr, cuts = 0.01 * 2 / 8 / 0.5, run.peers.layout.groups  # in the warm-up
    factors = {group: before[:, cuts[group]].clone().requires_grad_() for group in "AB"}
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    dense = kind([{"params": [factors["A"]], "lr": lr}, {"params": [factors["B"]], "lr": 16 * lr}], weight_decay=0.1)
    for group, factor in factors.items():
        factor.grad = run.peers.g[:, cuts[group]].clone()
    dense.step()
    for group, factor in factors.items():
        torch.testing.assert_close(run.peers.x[:, cuts[group]], factor.detach(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(factor, before[:, cuts[group]])


def test_a_ratio_of_zero_freezes_a_factor(root, tmp_path):
    run = make_run(root, tmp_path, method="local", train__lr_ratio__A=0, train__weight_decay=0.1, train__state="carried",
                   train__optimizer="sgd", train__momentum=0.9)
    before, cuts = run.peers.x.clone(), run.peers.layout.groups
    for t in range(3):
        local_phase(run, t)
    assert torch.equal(run.peers.x[:, cuts["A"]], before[:, cuts["A"]])
    assert bool((run.peers.x[:, cuts["B"]] != before[:, cuts["B"]]).any(1).all())


@pytest.mark.parametrize("group, fields", [("head", {"lora__head": "local"}),
                                           ("M", {"lora__adapter": "dora", "method": "dora"}),
                                           ("core", {"lora__adapter": "sb", "method": "fed_sb"})])
def test_every_group_has_a_ratio(root, tmp_path, group, fields):
    run = make_run(root, tmp_path, **{"train__lr_ratio": f"{{{group}: 0}}"}, **fields)
    before, cut = run.peers.x.clone(), run.peers.layout.groups[group]
    others = [name for name in run.peers.layout.groups if run.peers.layout.has(name)]
    local_phase(run, trains=frozenset(others))
    assert cut.stop > cut.start and torch.equal(run.peers.x[:, cut], before[:, cut])
    if len(others) > 1:
        assert not torch.equal(run.peers.x, before)


def test_peers_with_other_numbers_of_steps_keep_their_schedules(root, tmp_path):
    given = {"train__local_steps": None, "train__local_epochs": 1, "train__schedule": "linear", "train__rounds": 2,
             "partition": "{name: quantity, skew: 1.0}"}
    run = make_run(root, tmp_path / "run", train__lr_ratio__B=4, **given)
    assert len({run.peers.steps(row) for row in range(4)}) > 1
    assert {(g["steps"], g["ratio"]) for g in run.peers.optimizer.torch.param_groups} == {
        (run.peers.steps(row), ratio) for row in range(4) for ratio in (1.0, 4.0)}
    local_phase(run)
    rates = {(group["steps"], group["ratio"]): group["lr"] for group in run.peers.optimizer.torch.param_groups}
    assert all(rates[steps, 4.0] == 4 * rates[steps, 1.0] < 4 * run.config.train.lr for steps, _ in rates)


def test_stopped_and_resumed_is_never_stopped(root, tmp_path):
    given = {"train__lr_ratio__B": 8, "train__state": "carried", "method": "{name: tad, T: 2}"}
    assert train(make_config(root, tmp_path / "whole", **given)) == 0
    assert train(make_config(root, tmp_path / "halves", **given, train__rounds=2)) == 0
    assert train(make_config(root, tmp_path / "halves", **given), resume=True) == 0
    assert tiny_runs.adapter_digests(tmp_path / "whole") == tiny_runs.adapter_digests(tmp_path / "halves")
    with pytest.raises(ValueError, match="train.lr_ratio.B = 4.0 differs from 8.0"):
        train(make_config(root, tmp_path / "halves", **given | {"train__lr_ratio__B": 4}), resume=True)
    rates = [record["rates"] for record in read_lines(tmp_path / "whole" / "metrics.jsonl")[1:]]
    assert all(found == {"A": 1e-3, "B": 8e-3} for found in rates)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["config"]["train"]["lr_ratio"]["B"] == 8


def test_a_rule_is_told_the_rate_of_every_group(root, tmp_path):
    run, seen = make_run(root, tmp_path, train__lr=0.01, train__lr_ratio__B=16, train__schedule="linear"), []

    plain = run.rule.mix

    def mix(x, inbox, state, round):
        seen.append((round.lr, round.rates))
        return plain(x, inbox, state, round)

    tiny_runs.put_in(run, rule=run.rule._replace(mix=mix))
    now, peers = 1 / 4, run.peers
    run.gossip.round(1, peers.x, lr=peers.learning_rate(now), rates=peers.rates(now))
    assert seen == [(0.0075, {"A": 0.0075, "B": 16 * 0.0075})] * 4


def test_what_a_recipe_may_say(tmp_path):
    assert load(None, ["--loraplus_lr_ratio", "16"]).train.lr_ratio.B == 16
    assert resolve({"loraplus_lr_ratio": 4, "train": {"lr_ratio": {"A": 2}}}).train.lr_ratio.A == 2
    for given, said in ((["--train.lr_ratio.B", "-1"], "train.lr_ratio.B = -1 is not allowed; allowed: zero or"),
                        (["--train.lr_ratio.C", "1"], "unknown key 'train.lr_ratio.C' = 1"),
                        (["--train.loraplus_lr_ratio", "2"], "did you mean 'train.lr_ratio.B'")):
        with pytest.raises(ValueError) as caught:
            load(None, given)
        assert said in str(caught.value)
    with pytest.raises(ValueError, match="loraplus_lr_ratio = 4 and train.lr_ratio.B = 2 are both given"):
        resolve({"loraplus_lr_ratio": 4, "train": {"lr_ratio": {"B": 2}}})
    (tmp_path / "sweep.yaml").write_text("recipe: {}\noutput: runs\ngrid: {train.lr_ratio.B: [1, 4, 16]}\n")
    assert [cell.config.train.lr_ratio.B for cell in sweeps.load(tmp_path / "sweep.yaml").cells] == [1, 4, 16]
