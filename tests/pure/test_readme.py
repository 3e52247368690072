"""The documents are true: rooms, tables and references are the project's, code runs, the round for readers is the loop's round."""

import hashlib
import importlib.util
import re
import shutil
from pathlib import Path

import documents
import pytest
import reference
import tiny_models
import torch
import tree
import yaml
from tiny_runs import make_config, make_run, write_data
from torch.func import functional_call

from dfl import config as configuration
from dfl import methods
from dfl.adapters.layout import a_view, b_view
from dfl.cli import COMMANDS
from dfl.rules import RULES
from dfl.run.build import check
from dfl.run.loop import Hooks, run_rounds
from dfl.run.train import train
from dfl.store.records import read_lines

ROOT = Path(__file__).parent.parent.parent
README = documents.text("README.md")


def block(containing: str) -> str:
    """The one block of Python with this text, in whichever document."""
    return documents.block("python", containing)


@pytest.mark.parametrize("interval", [1, 2])
def test_the_round_for_readers_is_the_loops(interval, tmp_path):
    twin = {}
    exec(block("def one_round"), twin)
    assert len(block("def one_round").strip().splitlines()) <= 40
    model, data = tiny_models.save(tmp_path / "model", "bert", layers=2), write_data(tmp_path)
    config = make_config(model, data, tmp_path / "run", method=f"{{name: tad, T: {interval}}}", train__rounds=3, train__local_steps=3,
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
    (code,) = documents.blocks("dfl/rules/README.md", "python")
    exec(code, {})
    assert float(capsys.readouterr().out) >= 0


def test_the_hook_ends_a_run(tmp_path):
    """In a module of its own; a run whose accuracy cannot rise ends after the third evaluation and one round."""
    (tmp_path / "patience.py").write_text(block("class Patience"))
    spec = importlib.util.spec_from_file_location("patience", tmp_path / "patience.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, data = tiny_models.save(tmp_path / "model", "bert", layers=2), write_data(tmp_path)
    config = make_config(model, data, tmp_path / "run", train__rounds=20, train__lr=0.0, eval__every=1)
    assert train(config, callbacks=[module.Patience()]) == 0
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert 3 <= records[-1]["round"] <= 6


def test_own_data_from_recipe_to_loaded_adapter(tmp_path, monkeypatch, capsys):
    """The README's recipe, script and loading, with a small model in place of the one that it names and two rounds."""
    documents.workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    said = {}
    exec(block("result = dfl.train("), said)
    assert said["again"].metrics == said["result"].metrics and (tmp_path / "runs" / "script" / "run.json").is_file()
    assert "'mean'" in capsys.readouterr().out
    assert said["result"].finished and len(said["result"].adapters) == yaml.safe_load(documents.recipes()["my.yaml"])["peers"]
    shutil.move("runs/script", "runs/mine")
    loading = block("runs/mine/checkpoints/round-00100/consensus").replace("round-00100", "round-00002")
    for name, kind in documents.MODELS.items():
        loading = loading.replace(name, str(tmp_path / "models" / kind))
    loaded = {}
    exec(loading, loaded)
    tensors = {name: value for name, value in loaded["model"].state_dict().items() if "lora_" in name}
    assert tensors and all(value.abs().sum() for value in tensors.values())


@pytest.mark.parametrize("name", documents.recipes())
def test_every_recipe_is_a_recipe(name):
    check(configuration.from_dict(yaml.safe_load(documents.recipes()[name])))


def test_the_readme_counts_the_methods():
    assert f"{len(methods.METHODS) - 1} methods behind one interface" in README  # local training is none


def test_the_readme_is_short():
    assert README.count("\n") <= 150


def test_the_rooms_are_the_rooms():
    text = documents.text("dfl/README.md")
    assert text == tree.with_tree(text), "run python tests/tree.py"
    listed = set(re.findall(r"(\w+)/", tree.tree()))
    packages = {path.parent.name for path in (ROOT / "dfl").glob("*/__init__.py")}
    assert packages | {"topologies", "dfl", "launch", "benchmarks", "tests"} <= listed
    assert all(len(line) > 22 for line in tree.tree().splitlines())  # every room says what it is for


def test_the_configuration_reference_is_the_schema():
    text = reference.README.read_text()
    assert text == reference.with_reference(text), "run python tests/reference.py"
    # every field has a row that says something
    rows = dict(re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", text, re.M))
    sections = dict(reference.sections())
    fields = {f"{prefix}.{name}".lstrip(".") for prefix, cls in sections.items() for name in cls.model_fields}
    rest = fields - {name for name in sections if sections[name] is not configuration.RankConfig}
    assert rows.keys() >= rest and all(rows[name] for name in rest), [name for name in rest if not rows.get(name)]


@pytest.mark.parametrize("path", documents.paths())
def test_links_lead_somewhere(path):
    folder = (ROOT / path).parent
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", documents.text(path))
    assert not [target for target in targets if not (folder / target).exists()]


@pytest.mark.parametrize("path", documents.paths())
def test_scripts_that_are_named_are_there(path):
    """`python X.py`, `bash X.sh` and `dfl COMMAND` in a sentence: those in blocks are run."""
    text = documents.text(path)
    scripts = re.findall(r"`(?:python|bash) ([\w/.-]+\.(?:py|sh))", text)
    assert not [script for script in scripts if not (ROOT / script).exists() and script not in documents.scripts()]
    assert set(re.findall(r"`dfl ([a-z]+)", text)) <= COMMANDS.keys()


def test_every_block_of_commands_is_run():
    """In a workplace, or by the tests that the table names."""
    for path in documents.paths():
        tests = documents.ELSEWHERE.get(path, ("tests/launch/test_launch.py",))
        assert not documents.commands(path) or all((ROOT / test).is_file() for test in tests), path
    assert {"README.md", "dfl/cli/README.md", "dfl/tasks/README.md"} <= set(documents.with_commands())


def test_the_license_is_the_license():
    text = documents.text("LICENSE")
    assert "Version 2.0, January 2004" in text and text.count("\n") == 202
    assert hashlib.sha256(text.encode()).hexdigest() == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert "license = Apache-2.0" in documents.text("setup.cfg")


@pytest.mark.parametrize("name", ["real_input", "language_models"])
def test_the_results_are_the_committed_ones(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    assert study.table() in documents.text("benchmarks/README.md")


def test_the_table_of_rules_is_the_registry():
    lines = (ROOT / "dfl" / "rules" / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == list(methods.METHODS)
    for name, *_, unequal, module in rows:
        name = name.strip("`")
        assert unequal.startswith("yes") == methods.accepts(name, "ranks"), name
        assert RULES[methods.METHODS[name].rule].__module__ == f"dfl.rules.{module}", name
