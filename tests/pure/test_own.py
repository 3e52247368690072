"""A peer's model on its own distribution: the weights, a dense recomputation of the loop's, and what is not measured."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch

from dfl.metrics.own import own_distributions
from dfl.metrics.tally import Tally
from dfl.report import closing_table
from dfl.report.build import write_report
from dfl.run.evaluation import evaluate_run
from dfl.run.loop import evaluate
from dfl.run.train import train
from dfl.store.records import read_lines
from dfl.training.executors import Sequential, Stacked


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tiny_runs.make_folder(tmp_path_factory.mktemp("own"))
    tiny_models.save(folder / "gpt2", "gpt2", 1)
    lines = (folder / "data.csv").read_text().splitlines()[1:]
    rows = [f"{line},{'abcdef'[k % 6]}" for k, line in enumerate(lines)]
    (folder / "who.csv").write_text("text,label,who\n" + "\n".join(rows) + "\n")
    # three times as many of one label: where all are equally many, the counts would cancel
    of_label = {label: [line for line in lines if line.endswith(label)] for label in ("yes", "no")}
    (folder / "valid.csv").write_text("\n".join(["text,label", *of_label["yes"][:12], *of_label["no"][:4]]) + "\n")
    return folder


SKEWED = {"partition": "{name: dirichlet, alpha: 0.4}", "train__lr": 0.05, "method": "decaf"}


def make_config(root, output, data="data.csv", model="bert", **fields):
    return tiny_runs.make_config(root / model, root / data, output, **fields)


def split(labels, names=(), **columns):
    return SimpleNamespace(labels=np.array(labels), label_names=list(names), columns=columns)


def test_weights_are_shares_over_counts():
    parts = [np.array([0, 1, 2, 3]), np.array([4, 5])]
    own = own_distributions(split([0, 0, 0, 1, 2, 1], "abc"), split([0, 1, 1, 0, 0], "abc"), parts, None)
    # peer 0 holds three a and a b; peer 1 a b and a c, which no validation example has
    assert own.weights.tolist() == [[0.75 / 3, 0.25 / 2, 0], [0, 1 / 2, 0]]
    assert own.covered == [1.0, 0.5] and own.facts() == {"by": "label", "groups": 3, "covered": [1.0, 0.5]}
    # a model that knows a alone: at peer 0 it is right three times of four, at peer 1 never
    right = torch.tensor([1.0, 0, 0, 1, 1], dtype=torch.float64)
    assert [float((right * row[own.groups]).sum()) for row in own.weights] == [0.75, 0.0]


def test_a_peer_without_a_covered_group_has_no_value():
    own = own_distributions(split([0, 1], "ab"), split([0], "ab"), [np.array([0]), np.array([1])], None)
    assert own.covered == [1.0, 0.0] and own.weights[1].isnan().all()


@pytest.mark.parametrize("executor", [Sequential(), Stacked()], ids=["sequential", "stacked"])
def test_the_loop_agrees_with_a_dense_recomputation(root, tmp_path, executor):
    """Every validation example is scored by itself, and drawn as often as the peer's shard holds its label."""
    run, loaded = tiny_runs.make_run(make_config(root, tmp_path / "run", data__valid=root / "valid.csv", **SKEWED))
    run.executor = executor
    run.peers.x += torch.randn(run.peers.x.shape, generator=torch.Generator().manual_seed(3))
    found, valid, labels = evaluate(run), loaded.bundle.valid, loaded.bundle.train.labels
    counts, accuracies = np.bincount(valid.labels, minlength=2), []
    for peer, part in enumerate(loaded.parts):
        shares = np.bincount(labels[part], minlength=2) / len(part)
        right, loss = np.zeros(2), np.zeros(2)
        with Sequential().bound(loaded.adapted, run.rows().row(peer), None, [0]) as forward, torch.no_grad():
            for features, label in zip(valid.features, valid.labels, strict=True):
                logits = forward(run.task.inputs(run.task.collate([features])), [0]).logits[0].double()
                right[label] += int(logits.argmax()) == label
                loss[label] += float(torch.logsumexp(logits, 0) - logits[label])
        accuracies.append((shares * right / counts).sum())
        assert found["own"]["peers"]["accuracy"][peer] == pytest.approx(accuracies[-1], abs=1e-12)
        assert found["own"]["peers"]["loss"][peer] == pytest.approx((shares * loss / counts).sum(), rel=1e-5)
        gap = accuracies[-1] - right.sum() / counts.sum()
        assert found["own"]["gap"]["peers"]["accuracy"][peer] == pytest.approx(gap, abs=1e-12)
        assert found["peers"]["accuracy"][peer] == pytest.approx(right.sum() / counts.sum(), abs=1e-12)
    assert found["own"]["accuracy"] == pytest.approx(
        {"mean": np.mean(accuracies), "min": min(accuracies), "max": max(accuracies)})
    assert max(accuracies) - min(accuracies) > 0.1  # else the test would show nothing


def test_it_is_recorded_shown_and_evaluated_again(root, tmp_path):
    assert train(make_config(root, tmp_path / "run", **SKEWED)) == 0
    records = [r["eval"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval" in r]
    for found in records:
        own = found["own"]
        assert set(own) == {"accuracy", "loss", "peers", "gap", "consensus"}
        assert len(own["peers"]["accuracy"]) == len(own["gap"]["peers"]["loss"]) == 4
        assert own["consensus"]["accuracy"]["min"] <= own["consensus"]["accuracy"]["mean"]
    # before the first round all models are one, and so is what they are on the same distribution
    assert records[0]["own"]["consensus"] == {key: records[0]["own"][key] for key in ("accuracy", "loss", "peers")}
    again = evaluate_run(tmp_path / "run", ["--device=cpu", "--threads=1"])
    assert again["own"] == records[-1]["own"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["own"] == {
        "by": "label", "groups": 2, "covered": [1.0] * 4}
    table = closing_table(tmp_path / "run").splitlines()
    assert "own data: the same examples, each label weighing what it weighs" in table[2] and "on own data" in table[3]
    mean = next(line for line in table if line.startswith("mean")).split()
    assert mean[-1] == f"{records[-1]['own']['accuracy']['mean']:.4f}"
    page = write_report([tmp_path / "run"], None, None)
    text = page[1].read_text()
    assert "after, on own data" in text and f"{records[-1]['own']['gap']['accuracy']['mean']:.4f} on average" in text


def test_all_examples_count_as_ever(root, tmp_path):
    """Sums by group leave the sums over all examples as they are, to the bit."""
    run, _ = tiny_runs.make_run(make_config(root, tmp_path / "run", **SKEWED))
    run.peers.x += torch.randn(run.peers.x.shape, generator=torch.Generator().manual_seed(3))
    grouped, found = run.evaluator.tally, run.evaluator.sums(run.rows(), run.executor)
    run.evaluator.tally, run.evaluator.groups = Tally(grouped.metrics, grouped.num_examples), [None] * len(run.evaluator.batches)
    alone = run.evaluator.sums(run.rows(), run.executor)
    assert torch.equal(found[:, :4], alone) and found.shape == (4, 12) and alone.shape == (4, 4)


def test_one_pass_over_the_examples(root, tmp_path):
    """Nothing is evaluated twice: one forward pass for each hosted peer and batch, one for the consensus."""
    run, _ = tiny_runs.make_run(make_config(root, tmp_path / "run", **SKEWED, train__executor="sequential"))
    passes = []
    run.peers.adapted.model.register_forward_hook(lambda *_: passes.append(1))
    evaluate(run)
    assert len(passes) == (4 + 1) * len(run.evaluator.batches)


def test_shards_by_column_are_groups_by_column_also_without_labels(root, tmp_path):
    given = {"model": "gpt2", "data": "who.csv", "model__task": "causal_lm", "partition": "{name: column, column: who}"}
    run, loaded = tiny_runs.make_run(make_config(root, tmp_path / "run", **given))
    assert loaded.own.by == "column who"
    own, who = evaluate(run)["own"], np.array(loaded.bundle.valid.columns["who"])
    for peer, part in enumerate(loaded.parts):
        held = [loaded.bundle.train.columns["who"][i] for i in part]
        loss = tokens = 0.0
        for name in set(who) & set(held):
            weight = held.count(name) / (who == name).sum()
            with Sequential().bound(loaded.adapted, run.rows().row(peer), None, [0]) as forward, torch.no_grad():
                for i in np.flatnonzero(who == name):
                    batch = run.task.collate([loaded.bundle.valid.features[i]])
                    outcome = run.task.outcome(forward(run.task.inputs(batch), [0]), batch)
                    loss, tokens = loss + weight * float(outcome.losses.sum()), tokens + weight * float(outcome.counted.sum())
        assert own["peers"]["loss"][peer] == pytest.approx(loss / tokens, rel=1e-5)
        assert own["peers"]["perplexity"][peer] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_what_has_no_groups_says_why(root, tmp_path):
    config = make_config(root, tmp_path / "run", model="gpt2", model__task="causal_lm")
    assert train(config) == 0
    assert all("own" not in r.get("eval", {}) for r in read_lines(tmp_path / "run" / "metrics.jsonl"))
    assert "no labels" in json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["own"]
    assert "own data" not in closing_table(tmp_path / "run")
    many = split(range(1001), map(str, range(1001)))
    assert own_distributions(many, many, [np.arange(1001)], None) == "1001 groups by label are more than 1000"


def test_examples_of_another_file_are_nobodys_distribution(root, tmp_path):
    assert train(make_config(root, tmp_path / "run", **SKEWED)) == 0
    assert "own" not in evaluate_run(tmp_path / "run", ["--device=cpu", "--threads=1"], data=str(root / "data.csv"))
