"""What a start knows before it reads weights: the layout and the size of what it will make, and what a dry run says of it."""

import math
import re

import pytest
import tiny_models
import tiny_runs
import torch
import yaml

from dfl.cli import main
from dfl.config import load
from dfl.run import build, memory, preflight, runtime

CASES = {
    "lora": {}, "mixed head": {"lora__head": "mixed"}, "dora": {"lora__adapter": "dora", "lora__head": "local"},
    "hira": {"lora__adapter": "hira"}, "sb": {"lora__adapter": "sb", "method": "fed_sb"},
    "ravan": {"lora__adapter": "ravan", "method": "ravan", "lora__rank": 4, "lora__head": "mixed"},
    "ranks that differ": {"lora__rank": [1, 2, 3, 4], "method": "decaf"},
    "ranks by memory": {"lora__rank": "{budget_mb: 0.01}", "method": "decaf"},
    "all layers": {"lora__targets": "all-linear"}, "half precision": {"model__dtype": "bfloat16"},
    "a residual": {"method": "fedex"}, "pissa": {"lora__start": "pissa"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tiny_runs.make_folder(tmp_path_factory.mktemp("preflight"))
    tiny_models.save(folder / "gpt2", "gpt2", layers=1)
    return folder


def shapes(config):
    return preflight.shapes_of(config, build.read_examples(config).prepared)


@pytest.mark.parametrize("case", CASES)
def test_a_model_without_numbers_has_the_layout_of_the_one_that_is_read(root, tmp_path, case):
    config = tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path, **CASES[case])
    generator = torch.get_rng_state()
    found = shapes(config)
    assert torch.equal(torch.get_rng_state(), generator)
    run, loaded = tiny_runs.make_run(config)
    adapted = loaded.adapted
    assert (found.layout, found.lora, found.ranks) == (adapted.layout, adapted.lora, adapted.ranks)
    own = ("lora_", "hira_", "modules_to_save")
    base = [p for name, p in adapted.model.named_parameters() if not any(part in name for part in own)]
    assert found.model_bytes <= sum(p.numel() * p.element_size() for p in base) <= 1.05 * found.model_bytes + 1000  # a head in float32
    # what is certain is what the peers hold
    parts = {part.name: part for part in preflight.ready(config, run.topology, torch.device("cpu"), runtime.Place())[1]}
    assert parts["adapters of 4 peers"].size == parts["their gradients"].size == 4 * run.peers.x.numel()
    tiny_runs.local_phase(run)
    moments = sum(value.numel() for state in run.peers.optimizer.torch.state.values() for value in state.values() if value.dim())
    assert parts["their moments (adamw)"].size == 4 * moments
    kept = parts.get("residuals beside the adapters", memory.Part("", 0)).size
    assert kept == (8 * 4 * run.rule.residual.size if run.rule.residual else 0)


def test_a_language_model_has_no_head(root, tmp_path):
    config = tiny_runs.make_config(root / "gpt2", root / "data.csv", tmp_path, model__task="causal_lm")
    assert shapes(config).layout == build.load(config, torch.device("cpu")).adapted.layout


def test_a_dry_run_prints_a_recipe_and_its_memory_and_leaves_nothing(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run")
    assert main(["train", *words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out) == load(None, words).to_dict() and list(tmp_path.iterdir()) == []
    train, valid, *table = [line for line in out.splitlines() if line.startswith("#")]
    assert re.fullmatch(r"# training data: \d+ rows; 50 % of them have at most .* tokens, .*; 0 cut", train)
    assert re.fullmatch(r"# evaluation data: \d+ rows; .*; 0 cut", valid)
    assert table[0] == "# memory of the process, without the activations of a step:"
    assert table[1].split()[-2:] == ["18.6", "kB"] and table[-1].startswith("#   together") and "this machine has" in table[-1]


@pytest.mark.parametrize("more", [{}, {"data__label": "lable"}, {"partition": "{name: quantity, skew: 9.0}"}, {"peers": 40}])
def test_a_name_on_a_hub_needs_the_network_and_what_is_here_is_checked(root, tmp_path, capsys, more):
    words = tiny_runs.arguments("someone/tiny-bert", root / "data.csv", tmp_path / "run", **more)
    status = main(["train", *words, "--dry-run"])
    out, err = capsys.readouterr()
    if more:
        assert status == 2 and out == ""
        assert main(["train", *tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run", **more)]) == 2
        assert capsys.readouterr().err == err
    else:
        assert status == 0 and "memory" not in out
        assert out.startswith("# model.name = 'someone/tiny-bert' is not here: a run asks the hub for it, which needs the network\n"
                              "# what depends on it is not checked here\n")


def test_a_data_set_on_a_hub_is_not_asked_for(root, tmp_path, capsys):
    words = tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run", data__source="hub", data__name="no/such_set")
    assert main(["train", *words, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("# data.name = 'no/such_set' is no folder here: a run takes it from the hub's cache or")


def test_what_a_machine_has_is_compared_with_what_is_certain(root, tmp_path, monkeypatch, capsys):
    words = tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run", processes=1)
    config = load(None, words)
    topology = build.check(config)
    parts = preflight.ready(config, topology, torch.device("cpu"), runtime.Place())[1]
    certain = sum(part.size for part in parts if part.certain)
    monkeypatch.setattr(memory, "check_peers", lambda config: None)
    monkeypatch.setattr(memory, "limit", lambda: certain)
    assert main(["train", *words, "--dry-run"]) == 0 and "which may not suffice" in capsys.readouterr().out
    monkeypatch.setattr(memory, "limit", lambda: certain - 1)
    for more in (["--dry-run"], []):
        assert main(["train", *words, *more]) == 2
        assert "peers = 4 with lora.rank = 2 need at least" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_one_would_want_to_mend(root, tmp_path, capsys):
    (tmp_path / "short.csv").write_text((root / "data.csv").read_text() + ",yes\n")
    words = tiny_runs.arguments(root / "bert", tmp_path / "short.csv", tmp_path / "run", data__max_length=4)
    assert main(["train", *words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert yaml.safe_load(out)["data"]["max_length"] == 4
    assert "# dfl: WARNING: data.text = 'text': " in out and "# dfl: WARNING: data.max_length = 4: " in out


def test_the_limit_is_the_least_of_machine_and_control_group(tmp_path):
    whole = memory.limit(tmp_path)
    assert 1e8 < whole < math.inf
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.limit(tmp_path) == whole
    (tmp_path / "memory.max").write_text("123456789\n")
    assert memory.limit(tmp_path) == 123456789


@pytest.mark.parametrize("size, said", [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (6.13e12, "6.1 TB")])
def test_bytes_for_people(size, said):
    assert memory.told(size) == said
