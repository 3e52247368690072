"""Metrics: the figures of well-known libraries, sums that add up to the bit, and which metric a recipe may name."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as oracle
import tiny_models
import tiny_runs
import torch
from measured import measured

import dfl
from dfl.config.schema import EvalConfig, Plugin
from dfl.metrics import METRICS
from dfl.metrics.base import Metric, Outcome, block_sums
from dfl.metrics.choice import choose, describe
from dfl.metrics.evaluator import GivenUp
from dfl.metrics.own import Own
from dfl.metrics.tally import MAX_BY_GROUP, Tally
from dfl.report import closing_table
from dfl.report.build import write_report
from dfl.report.runs import choose_metric, evaluated
from dfl.run.loop import evaluate
from dfl.run.train import train
from dfl.store.runs import read_description, read_run
from dfl.tasks import TASKS
from dfl.training.executors import Sequential, Stacked

CLASSES = SimpleNamespace(name="sorting", predicts="class", metrics=("accuracy", "loss"))
NUMBERS = SimpleNamespace(name="grading", predicts="number", metrics=("pearson", "loss"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("metrics"))


def outcome(predictions, targets):
    values = torch.as_tensor(predictions)[:, None]
    losses = torch.zeros(values.shape)
    return Outcome(losses, losses == 0, torch.as_tensor(targets)[:, None], lambda: values)


def classes(seed, num=200, num_classes=5):
    """Imbalanced targets, predictions that are right more often than not, and no example of the last class."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(num_classes - 1, size=num, p=[0.6, 0.3, 0.08, 0.02])
    return np.where(rng.random(num) < 0.6, targets, rng.integers(0, num_classes - 1, size=num)), targets


@pytest.mark.parametrize("seed", range(3))
def test_classes_agree_with_scikit_learn(seed):
    predicted, targets = classes(seed)
    parts = [outcome(predicted[k:k + 30], targets[k:k + 30]) for k in range(0, 200, 30)]
    (found,) = measured(CLASSES, parts, num_classes=5, metrics=["accuracy", "macro_f1", "matthews"])
    assert found["accuracy"] == oracle.accuracy_score(targets, predicted)
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(targets, predicted, average="macro"), abs=1e-14)
    assert found["matthews"] == pytest.approx(oracle.matthews_corrcoef(targets, predicted), abs=1e-14)


def test_classes_that_are_never_predicted_and_never_vary():
    targets = np.array([0, 1, 1, 2])
    for predicted in (np.zeros(4, dtype=np.int64), np.array([2, 2, 2, 0]), targets):
        (found,) = measured(CLASSES, [outcome(predicted, targets)], num_classes=3, metrics=["macro_f1", "matthews"])
        assert found["macro_f1"] == pytest.approx(oracle.f1_score(targets, predicted, average="macro"))
        assert found["matthews"] == pytest.approx(oracle.matthews_corrcoef(targets, predicted))
    (same,) = measured(CLASSES, [outcome(targets * 0, targets * 0)], num_classes=3, metrics=["macro_f1", "matthews"])
    assert same["macro_f1"] == 1.0 and same["matthews"] == 0.0


def test_a_prediction_of_no_class_is_wrong_and_no_class():
    """A model that has diverged says -1: it counts as scikit-learn counts a label that no target has, but is no class of macro-F1."""
    targets, predicted = np.array([0, 1, 1, 2]), np.array([0, -1, 1, -1])
    (found,) = measured(CLASSES, [outcome(predicted, targets)], num_classes=3, metrics=["accuracy", "macro_f1", "matthews"])
    assert found["accuracy"] == 0.5 and found["matthews"] == pytest.approx(oracle.matthews_corrcoef(targets, predicted))
    assert found["macro_f1"] == pytest.approx(oracle.f1_score(targets, predicted, labels=[0, 1, 2], average="macro", zero_division=0))


@pytest.mark.parametrize("digits", [1, 8], ids=["ties", "none"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_numbers_agree_with_scipy(digits, offset):
    rng = np.random.default_rng(0)
    targets = np.round(rng.normal(size=200), digits) + offset
    predicted = np.round(0.5 * targets + rng.normal(size=200), digits)
    parts = [outcome(predicted[k:k + 30], targets[k:k + 30]) for k in range(0, 200, 30)]
    (found,) = measured(NUMBERS, parts, metrics=["pearson", "spearman"])
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(predicted, targets).statistic, abs=1e-7 if offset else 1e-14)
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(predicted, targets).statistic, abs=1e-14)


def test_numbers_that_do_not_vary_have_no_correlation():
    targets = np.arange(5.0)
    for predicted in (np.full(5, 0.1), np.full(5, np.nan), np.array([1, 2, np.inf, 3, 4])):
        (found,) = measured(NUMBERS, [outcome(predicted, targets)], metrics=["pearson", "spearman"])
        assert math.isnan(found["pearson"]) and math.isnan(found["spearman"])
    (found,) = measured(NUMBERS, [outcome(3 * targets - 1, targets)], metrics=["pearson", "spearman"])
    assert found == {"pearson": 1.0, "spearman": pytest.approx(1.0), "loss": 0.0}


def test_exact_match_is_what_greedy_decoding_says(tmp_path):
    """A response counts where all its tokens are predicted from those before: then generation gives it, else it does not."""
    from transformers import LlamaForCausalLM
    model = LlamaForCausalLM.from_pretrained(tiny_models.save(tmp_path / "llama", "llama")).eval()
    model.generation_config.update(eos_token_id=None, bos_token_id=None, pad_token_id=0)
    task, prompts = TASKS["causal_lm"](0), torch.randint(5, 60, (6, 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        greedy = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3, do_sample=False)
        wrong = greedy.clone()
        wrong[::2, -1] = (wrong[::2, -1] + 1) % 60
        labels = wrong.clone()
        labels[:, :4] = -100
        batch = {"input_ids": wrong, "attention_mask": torch.ones_like(wrong), "labels": labels}
        found = measured(task, [task.outcome(model(**task.inputs(batch)), batch)], metrics=["exact_match", "accuracy"])[0]
    assert found["exact_match"] == 0.5 and found["accuracy"] == 15 / 18
    labels[1] = -100  # an example without a token to predict is none
    with torch.no_grad():
        assert measured(task, [task.outcome(model(**task.inputs(batch)), batch)], metrics=["exact_match"])[0]["exact_match"] == 2 / 5


@pytest.mark.parametrize("executor", [Sequential(), Stacked()], ids=["sequential", "stacked"])
@pytest.mark.parametrize("parts", [2, 3, 99])
def test_batches_of_several_processes_add_up_to_the_bits_of_one(root, tmp_path, executor, parts):
    """Also where some processes have no batch; with sums by group, and with what is kept of every example."""
    run, loaded = tiny_runs.make_run(tiny_runs.make_config(
        root / "bert", root / "data.csv", tmp_path / "run", eval__batch_size=3, partition="{name: dirichlet, alpha: 0.4}"))
    run.peers.x += torch.randn(run.peers.x.shape, generator=torch.Generator().manual_seed(3))
    evaluator = run.evaluator
    evaluator.tally = Tally(METRICS_OF_ALL, len(loaded.bundle.valid), evaluator.tally.own)
    assert {"rank", "accuracy"} == set(evaluator.tally.kept) | {"accuracy"} and evaluator.tally.grouped
    whole = evaluator.sums(run.rows(), executor)
    num = len(evaluator.batches)
    assert num > 3
    tables = [evaluator.by_batch(run.rows(), executor, range(part, num, parts)) for part in range(parts)]
    assert torch.equal(evaluator.total(sum(tables)), whole) and torch.equal(evaluator.total(sum(reversed(tables))), whole)
    assert not torch.equal(evaluator.total(tables[0]), whole)
    kept = whole[:, evaluator.tally.width:].reshape(4, -1)
    assert torch.equal(kept, torch.tensor(loaded.bundle.valid.labels, dtype=torch.float64).expand(4, -1))  # each in its place
    with pytest.raises(GivenUp):
        evaluator.by_batch(run.rows(), executor, [0], lambda: True)


def _rank(num_classes):
    """The target itself, of every example."""
    metric = METRICS["spearman"](0)
    return metric._replace(sums=lambda outcome, num: outcome.targets.double(), size=1, suits=None, value=lambda kept, weights: 0.0)


# sums of float32 come out alike in whatever order they are added up in float64; roots do not
ROOTS = Metric(lambda outcome, num: block_sums(num, outcome.losses.double().sqrt()), float, size=1)
METRICS_OF_ALL = {"accuracy": METRICS["accuracy"](2), "rank": _rank(2), "macro_f1": METRICS["macro_f1"](2), "roots": ROOTS,
                  "loss": METRICS["loss"](2)}


def test_on_own_distributions_metrics_are_those_of_a_resampled_set():
    """Weights that are whole numbers count examples so many times: what the libraries say of the repeated examples."""
    predicted, targets = classes(0, 60)
    groups, weights = torch.arange(60) % 3, torch.tensor([[1.0, 2, 0], [3, 1, 1]], dtype=torch.float64)
    own = Own(groups, weights, [1.0, 1.0], "column of them")
    tally = Tally({name: METRICS[name](5) for name in ("accuracy", "macro_f1", "matthews")}, 60, own)
    row = tally.of_batch(outcome(predicted, targets), 1, groups)
    scores = np.round(np.random.default_rng(1).normal(size=60), 1) + targets
    numbers = Tally({name: METRICS[name](0) for name in ("pearson", "spearman")}, 60, own)
    of_numbers = outcome(scores, targets.astype(float))
    number_row = torch.cat([numbers.of_batch(of_numbers, 1, groups), numbers.of_examples(of_numbers, 1).flatten(1)], 1)
    for peer, (found, correlations) in enumerate(zip(tally.on_own(row), numbers.on_own(number_row), strict=True)):
        index = np.repeat(np.arange(60), weights[peer][groups].int().numpy())
        p, t, s = predicted[index], targets[index], scores[index]
        assert found["accuracy"] == pytest.approx(oracle.accuracy_score(t, p))
        assert found["macro_f1"] == pytest.approx(oracle.f1_score(t, p, average="macro"))
        assert found["matthews"] == pytest.approx(oracle.matthews_corrcoef(t, p))
        assert correlations["pearson"] == pytest.approx(scipy.stats.pearsonr(s, t).statistic)
        assert correlations["spearman"] == pytest.approx(scipy.stats.spearmanr(s, t).statistic)
    nobody = Own(groups, weights * math.nan, [0.0, 0.0], "label")
    for part in (Tally(tally.metrics, 60, nobody).on_own(row), Tally(numbers.metrics, 60, nobody).on_own(number_row)):
        assert all(math.isnan(value) for found in part for value in found.values())


def test_counts_of_many_classes_are_not_kept_by_group():
    num = 400
    own = Own(torch.zeros(5, dtype=torch.int64), torch.ones(2, num, dtype=torch.float64), [1.0, 1.0], "label")
    tally = Tally({"accuracy": METRICS["accuracy"](num), "macro_f1": METRICS["macro_f1"](num)}, 5, own)
    assert 3 * num * num > MAX_BY_GROUP and tally.width == 2 + 3 * num + 2 * num
    row = tally.of_batch(outcome([1, 2, 3, 4, 5], [1, 2, 3, 4, 0]), 1, own.groups)
    assert tally.values(row)[0] == {"accuracy": 0.8, "macro_f1": pytest.approx(4 / 6)}
    assert tally.on_own(row) == [{"accuracy": 0.8}] * 2


def test_a_recipe_chooses_metrics_and_the_primary_one():
    task = TASKS["sequence_classification"]
    assert list(choose(EvalConfig(), task, 3)) == ["accuracy", "loss"]
    two = (Plugin("macro_f1"), Plugin("matthews"))
    assert list(choose(EvalConfig(metrics=two), task, 3)) == ["macro_f1", "matthews", "loss"]
    assert list(choose(EvalConfig(metrics=(*two, Plugin("accuracy"))), task, 3)) == ["accuracy", "macro_f1", "matthews", "loss"]
    assert list(choose(EvalConfig(metrics=two, primary="matthews"), task, 3)) == ["matthews", "macro_f1", "loss"]
    assert list(choose(EvalConfig(primary="macro_f1"), task, 3)) == ["macro_f1", "accuracy", "loss"]
    assert list(choose(EvalConfig(metrics=()), task, 3)) == ["accuracy", "loss"]
    assert list(choose(EvalConfig(primary="loss"), task, 3)) == ["loss", "accuracy"]


@pytest.mark.parametrize("words, message", [
    (["eval.metrics=[accuracy, macrof1]"], r"eval.metrics = 'macrof1' is not known \(did you mean 'macro_f1'\?\); allowed: accuracy"),
    (["eval.metrics=pearson"], "eval.metrics = 'pearson' is of a predicted number, but model.task = 'sequence_classification' "
                               "predicts a class; allowed with it: accuracy, macro_f1, matthews, loss"),
    (["eval.primary=perplexity"], "eval.primary = 'perplexity' is of a predicted token"),
    (["eval.metrics=[loss, loss]"], "eval.metrics names 'loss' twice"),
    (["eval.metrics={name: macro_f1, beta: 2}"], "eval.metrics.beta = 2: 'macro_f1' has no such parameter"),
    (["eval.metrics=3"], "eval.metrics = 3 is not allowed; allowed: a list"),
])
def test_what_does_not_suit_is_refused_before_anything_is_loaded(root, tmp_path, words, message):
    from dfl.run import build
    fields = {key.replace(".", "__"): value for key, _, value in (word.partition("=") for word in words)}
    with pytest.raises(ValueError, match=message):
        build.check(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run", **fields))


def test_a_name_that_a_record_has_for_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(METRICS, "peers", METRICS["accuracy"])
    with pytest.raises(ValueError, match="eval.metrics = 'peers': a record has something else of that name"):
        choose(EvalConfig(metrics=(Plugin("peers"),)), CLASSES, 2)


def test_a_metric_whose_sums_have_another_shape_is_named(monkeypatch):
    monkeypatch.setitem(METRICS, "flat", lambda num_classes: METRICS["accuracy"](2)._replace(size=3))
    with pytest.raises(ValueError, match=r"metric 'flat': the sums of 1 blocks are of shape \(1, 2\); allowed: \(1, 3\)"):
        measured(CLASSES, [outcome([1], [1])], metrics=["flat"])


def test_every_metric_says_what_it_is_of_and_which_way_it_gets_better():
    lines = describe()
    assert list(lines) == list(METRICS) and lines["perplexity"].endswith("Of a predicted token; lower is better.")
    assert lines["accuracy"].endswith("Of a predicted class or token or preference; higher is better.")
    assert {name for name, make in METRICS.items() if not make(2).higher_is_better} == {"perplexity", "loss"}


def test_a_run_may_go_on_with_other_metrics(root, tmp_path):
    """Readers leave out what lacks the metric they are about; run.json still says which way the earlier ones get better."""
    words = {"train__rounds": 2, "eval__every": 1}
    assert train(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run", **words)) == 0
    words = {"train__rounds": 4, "eval__every": 1, "eval__metrics": "[macro_f1, matthews]"}
    assert train(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run", **words), resume=True) == 0
    facts = read_description(tmp_path / "run")["facts"]
    assert facts["primary"] == "macro_f1" and facts["better"] == dict.fromkeys(("macro_f1", "matthews", "accuracy"), "higher") | {
        "loss": "lower"}
    assert "macro_f1 on the evaluation examples" in closing_table(tmp_path / "run")
    page, markdown = write_report([tmp_path / "run"], None, None)
    assert "Macro f1 of every peer" in markdown.read_text() and "macro_f1 higher, matthews higher, loss lower" in markdown.read_text()
    run = read_run(tmp_path / "run")
    assert choose_metric([run], "loss") == ("loss", False) and choose_metric([run], "accuracy") == ("accuracy", True)
    assert [len(evaluated(run, name)) for name in ("accuracy", "macro_f1", "loss")] == [3, 2, 5]


def test_a_callback_knows_the_metric_that_counts(root, tmp_path):
    seen = []

    class Ask(dfl.Callback):
        def on_evaluate(self, run, control, evaluation):
            seen.append((run.primary, run.higher_is_better(), run.higher_is_better("matthews"), evaluation[run.primary]["mean"]))
            with pytest.raises(ValueError, match="metric = 'f1' is not known"):
                run.higher_is_better("f1")

    fields = {"eval__metrics": "[accuracy, matthews]", "eval__primary": "loss", "train__rounds": 1}
    assert train(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run", **fields), callbacks=[Ask]) == 0
    assert [one[:3] for one in seen] == [("loss", False, True)] * 2 and seen[0][3] > 0
    assert closing_table(tmp_path / "run").lstrip().startswith("loss on the evaluation examples")


def test_a_run_records_what_its_recipe_names(root, tmp_path):
    run, _ = tiny_runs.make_run(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run",
                                                      eval__metrics="[macro_f1, matthews]"))
    found = evaluate(run)
    assert list(found["peers"]) == list(found["own"]["peers"]) == ["macro_f1", "matthews", "loss"] == list(found["consensus"])
    assert run.evaluator.primary == "macro_f1" and run.evaluator.better()["loss"] == "lower"
