"""Short runs of the real recipes on real data: the loop learns."""

import json
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
