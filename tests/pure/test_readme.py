"""The README is true: its tree is the tree, its code runs, its round is the loop's round."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from tiny_runs import make_config, make_run, write_data
from torch.func import functional_call

from dfl import config as configuration
from dfl import methods
from dfl.assemble import check
from dfl.factors import a_view, b_view
from dfl.record import read_lines
from dfl.rounds import Hooks, run_rounds
from dfl.rules import RULES
from dfl.running import train

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


def block(containing: str) -> str:
    """The one fenced code block with this text."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if containing in code]
    return found


@pytest.mark.parametrize("interval", [1, 2])
def test_the_round_for_readers_is_the_loops(interval, tmp_path):
    twin = {}
    exec(block("def one_round"), twin)
    assert len(block("def one_round").strip().splitlines()) <= 40
    model, data = tiny_models.save(tmp_path / "model", "bert", layers=2), write_data(tmp_path)
    config = make_config(model, data, tmp_path / "run", rule=f"{{name: tad, T: {interval}}}", train__rounds=3, train__local_steps=3,
                         train__lr=1e-2, train__clip=0.5, model__dropout=0.0)
    run, loaded = make_run(config)
    topology = run.topology
    net, layout, task, split = loaded.adapted.model.eval(), run.peers.layout, run.task, run.split
    names = [[name for name, p in net.named_parameters()
              if p is site.module.lora_A["default"].weight or p is site.module.lora_B["default"].weight]
             for site in loaded.adapted.sites]

    def loss(a, b, batch):
        values = {name: value for (name_a, name_b), a_l, b_l in zip(names, a, b, strict=True)
                  for name, value in ((name_a, a_l), (name_b, b_l))}
        return task.losses(functional_call(net, values, kwargs=task.inputs(batch)), batch, 1)[0]

    num = config.peers
    row = loaded.adapted.start
    a = [[a_view(row, pair).clone() for pair in layout.pairs] for _ in range(num)]
    b = [[b_view(row, pair).clone() for pair in layout.pairs] for _ in range(num)]
    for t in range(3):
        batches = [[task.collate([split.features[k] for k in run.peers.streams[i].batch(3 * t + step)]) for step in range(3)]
                   for i in range(num)]
        a, b = twin["one_round"](t, a, b, topology.matrix(t), loss, batches, T=interval, lr=1e-2, clip=0.5)
    run_rounds(run, Hooks(lambda record: None, lambda: None, lambda: False))
    moved = 0.0
    for i in range(num):
        for layer, pair in enumerate(layout.pairs):
            torch.testing.assert_close(a_view(run.peers.x[i], pair), a[i][layer].float(), rtol=0, atol=1e-6)
            torch.testing.assert_close(b_view(run.peers.x[i], pair), b[i][layer].float(), rtol=0, atol=1e-6)
            moved += float(b[i][layer].abs().sum())
    assert moved > 0.1


def test_the_simulator_example_runs(capsys):
    exec(block("from dfl import simulate"), {})
    assert float(capsys.readouterr().out) >= 0


def test_the_hook_ends_a_run(tmp_path):
    """As the README has it, in a module of its own; a run whose accuracy cannot rise ends after the third evaluation and one round."""
    (tmp_path / "patience.py").write_text(block("class Patience"))
    spec = importlib.util.spec_from_file_location("patience", tmp_path / "patience.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, data = tiny_models.save(tmp_path / "model", "bert", layers=2), write_data(tmp_path)
    config = make_config(model, data, tmp_path / "run", train__rounds=20, train__lr=0.0, eval__every=1)
    assert train(config, callbacks=[module.Patience()]) == 0
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert 3 <= records[-1]["round"] <= 6


def test_the_notebook_example_runs(tmp_path, monkeypatch, capsys):
    model, data = tiny_models.save(tmp_path / "model", "bert", layers=2), write_data(tmp_path)
    tree = make_config(model, data, tmp_path / "elsewhere", train__rounds=2).to_dict()
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    said = {}
    exec(block("result = dfl.train("), said)
    assert said["again"].metrics == said["result"].metrics and (tmp_path / "runs" / "mine" / "run.json").is_file()
    assert "'mean'" in capsys.readouterr().out


def test_the_recipe_example_is_a_recipe():
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    config = configuration.from_dict(yaml.safe_load(text))
    check(config)


def test_the_tree_is_the_tree():
    (tree,) = re.findall(r"## The tree\n.*?```text\n(.*?)```", README, re.S)
    named, folder = set(), ""
    for line in tree.splitlines():
        entry = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        if not line.startswith(" "):
            folder = entry if entry.endswith("/") else ""
            named |= set() if folder else {entry}
        else:
            named.add(folder + entry)
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                            text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = {f for f in listed.stdout.split() if (ROOT / f).exists()}
    whole = {n for n in named if n.endswith("/*")}  # a folder whose files speak for themselves
    covered = {f for f in files if any(f.startswith(n[:-1]) for n in whole)}
    assert files - covered == named - whole


def test_the_results_are_the_committed_ones():
    spec = importlib.util.spec_from_file_location("real_input", ROOT / "benchmarks" / "real_input.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    assert study.table() in README


def test_the_table_of_rules_is_the_registry():
    lines = (ROOT / "dfl" / "rules" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(methods.METHODS)
    for name, *_, unequal, module in rows:
        name = name.strip("`")
        assert unequal.startswith("yes") == methods.accepts(name, "ranks"), name
        assert RULES[methods.METHODS[name].rule].__module__ == f"dfl.rules.{module}", name
