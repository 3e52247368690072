"""Short runs of the real recipes on real data: the loop learns."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from dfl.cli import main

RECIPES = Path(__file__).parent.parent.parent / "launch" / "recipes"


def train(recipe: str, output: Path, *overrides: str) -> list[dict]:
    """The records of a run that hold an evaluation."""
    assert main(["train", str(RECIPES / recipe), "--output", str(output), *overrides]) == 0
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval" in line]


@pytest.fixture(autouse=True)
def data_folder(research_data, monkeypatch):
    monkeypatch.setenv("DFL_DATA", str(research_data))


def test_perplexity_falls_at_every_peer(tmp_path):
    before, *_, after = train("stories.yaml", tmp_path / "run", "--train.rounds", "4", "--data.max_valid", "40", "--data.max_length",
                              "64", "--eval.every", "0")
    for first, last in zip(before["eval"]["peers"]["perplexity"], after["eval"]["peers"]["perplexity"], strict=True):
        assert last < 0.8 * first
    assert after["eval"]["consensus"]["perplexity"] < 0.8 * before["eval"]["consensus"]["perplexity"]


def test_preferences_are_learned_by_everybody(research_data, tmp_path):
    """Which of two continuations has its words in order, on texts that nobody has trained on: 0.5 and five standard errors of 119."""
    spec = importlib.util.spec_from_file_location("language_models", RECIPES.parents[1] / "benchmarks" / "language_models.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    study.write_data(tmp_path)
    fields = study.COMMON | study.STUDIES["preferences"][1] | {
        "model.name": research_data / "stories260k", "data.train": tmp_path / "preferences-train.jsonl",
        "data.valid": tmp_path / "preferences-valid.jsonl", "train.rounds": 3, "eval.every": 0, "baseline": "null"}
    words = [str(word) for key, value in fields.items() for word in (f"--{key}", value)]
    assert main(["train", *words, "--processes", "1", "--output", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line["eval"] for line in lines if "eval" in line][-1]
    assert min(*last["peers"]["accuracy"], last["consensus"]["accuracy"]) > 0.5 + 5 * math.sqrt(0.25 / 119)


@pytest.mark.core
def test_trec_is_learned_by_everybody(tmp_path):
    before, after = train("trec6.yaml", tmp_path / "run", "--partition", "iid", "--topology", "complete", "--method", "lora",
                          "--model.layers", "1", "--train.rounds", "5", "--train.batch_size", "16", "--train.lr", "1e-2",
                          "--peers", "4", "--data.max_valid", "200", "--eval.every", "0")
    assert min(after["eval"]["peers"]["accuracy"]) > max(before["eval"]["peers"]["accuracy"]) + 0.15


@pytest.mark.parametrize("recipe, majority", [("trec6.yaml", 0.9), ("sst2.yaml", 0.9)])
def test_the_recipes_have_their_label_skew(recipe, majority):
    from dfl import config as configuration
    from dfl import partition, tasks
    config = configuration.load(RECIPES / recipe)
    bundle = tasks.load(config.model, config.data, seed=0)
    parts = partition.build(config.partition.name, bundle.train.labels, config.peers, label_names=bundle.train.label_names,
                            **config.partition.params)
    shares = [max((bundle.train.labels[part] == label).mean() for label in set(bundle.train.labels)) for part in parts]
    skewed = [share for share in shares if share > 0.8]
    assert len(skewed) == (10 if recipe == "trec6.yaml" else 6)
    assert all(abs(share - majority) < 0.01 for share in skewed)
