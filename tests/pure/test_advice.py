"""A recipe that names no method or no topology is told which one is likelier to suit it; one that chooses is told nothing."""

import re
from pathlib import Path

import pytest
import tiny_runs

from dfl.config import from_dict, load
from dfl.run.advice import WHERE, advice
from dfl.run.dryrun import dry_run
from dfl.run.train import train


@pytest.mark.parametrize("tree, said", [
    ({}, ": examples are dealt alike"), ({"partition": "dirichlet"}, ": with partition = dirichlet"),
    ({"peers": 4, "lora": {"rank": [4, 4, 8, 8]}}, "; carry is likelier to suit: ranks may differ")])
def test_it_names_a_method_and_the_reason(tree, said):
    (told,) = advice(from_dict({"topology": "ring"} | tree))
    assert told.startswith(f"no method is named, so it is lora{said}") and told.endswith(f"({WHERE})")


@pytest.mark.parametrize("tree", [{"method": "tad"}, {"method": {"name": "lora"}}, {"schedule": "alternating"}])
def test_who_chooses_is_told_nothing(tree):
    assert advice(from_dict(tree)) == []


@pytest.mark.parametrize("tree, told", [
    ({"partition": "dirichlet"}, True), ({}, False), ({"partition": "dirichlet", "peers": 3}, False),
    ({"partition": "dirichlet", "topology": "ring"}, False)])
def test_a_graph_is_suggested_where_examples_are_unlike(tree, told):
    lines = advice(from_dict({"method": "lora"} | tree))
    assert len(lines) == told
    assert all(line.startswith("no topology is named, so it is ring; ") and line.endswith(f"({WHERE})") for line in lines)


def test_what_it_rests_on_is_where_it_says():
    path, _, heading = WHERE.partition(", ")
    assert re.search(f"^## {heading}$", (Path(__file__).parents[2] / path).read_text(), re.MULTILINE)


def test_a_run_and_a_dry_run_say_it(tmp_path, capsys):
    root = tiny_runs.make_folder(tmp_path)
    words = tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run", train__rounds=1)
    config = load(None, [word for word in words if not word.startswith("--method")])
    assert "# no method is named, so it is lora: " in dry_run(config)
    assert train(config) == 0
    assert capsys.readouterr().err.count("no method is named") == 1
    named = tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "named", train__rounds=1, method="tad")
    assert "no method is named" not in dry_run(named)
