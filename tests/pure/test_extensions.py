"""Plug-ins from outside: a package whose entry points fill every slot, and modules that a recipe names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from documents import block

from dfl import extensions, metrics
from dfl.cli import main
from dfl.metrics import choice
from dfl.store.records import read_lines

HERE = Path(__file__).parent.parent
OUTSIDE = HERE / "outside"
PROGRAM = """
import torch, topologies
from dfl import simulate
from dfl.methods import Choice

start = {"layer": (torch.randn(1, 2, 5).repeat(6, 1, 1), torch.randn(6, 4, 2))}
step = lambda factors, t, trains: [f.add_(0.01 * t) for name, f in zip("AB", factors["layer"]) if name in trains]

def run(method="lora", graph="ring", **slots):
    result = simulate(method, topologies.build(graph, 6), start, step, 4, **slots)
    return result.factors["layer"][1], result.measures

plain, measures = run()
edges = [m["edges"] for m in measures]
for name, slots in {"rule": {"method": "slow_average", "pace": 0.25}, "guard": {"guard": Choice("only_small", {"most": 1e-6})},
                    "trigger": {"trigger": "by_turns"}, "channel": {"channel": "from_peer_0_alone"}, "wrapper": {"wrapper": "damped"},
                    "schedule": {"schedule": "every_other"}, "topology": {"graph": "two_rings"}}.items():
    found, other = run(**slots)
    assert not torch.equal(found, plain), name
assert torch.allclose(run(codec="halves")[0], plain)
assert run(codec="halves")[1][0]["message_bytes"] == 2 * measures[0]["message_bytes"]
assert [m["edges"] for m in run(schedule="every_other")[1]] == [12, 0, 12, 0]
assert [m["rejected"] for m in run(guard=Choice("only_small", {"most": 1e-6}))[1]] == [12] * 4
print("all kinds")
"""


def outside(code: str, *paths: Path, cwd: Path = HERE) -> subprocess.CompletedProcess:
    """The code in a process of its own, in which the packages in `paths` are installed."""
    path = os.pathsep.join([*map(str, paths), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, cwd=cwd,
                          timeout=120)


@pytest.mark.long
def test_entry_points_fill_every_slot():
    done = outside(PROGRAM, OUTSIDE)
    assert done.returncode == 0 and "all kinds" in done.stdout, done.stderr


@pytest.mark.long
def test_they_are_listed_and_may_be_named_in_a_recipe(tmp_path):
    listed = outside("from dfl.cli import main; main(['list'])", OUTSIDE).stdout
    assert "slow_average" in listed and "Send every number as two" in listed and "grading" in listed and "two_rings" in listed
    assert "of those with more than this share of the examples. Of a predicted class; higher is better." in listed
    root = tiny_runs.make_folder(tmp_path)
    words = tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run", method="{name: slow_average, pace: 0.25}",
                                peers=6, topology="two_rings", codec="halves", model__task="grading", train__rounds=2,
                                eval__metrics="[{name: worst_recall, above: 0.1}, accuracy]", eval__primary="worst_recall")
    done = outside(f"import sys; from dfl.cli import main; sys.exit(main({['train', *words]!r}))", OUTSIDE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "round-00002").is_dir()
    assert "worst_recall on the evaluation examples" in done.stdout and "mean over peers of accuracy 0." in done.stdout
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    assert facts["primary"] == "worst_recall" and facts["better"] == {"worst_recall": "higher", "accuracy": "higher", "loss": "lower"}
    done = outside(f"import sys; from dfl.cli import main; sys.exit(main({['train', *words]!r}))")
    assert done.returncode == 2 and "is not known" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("entry, said", [
    ("[dfl.codecs]\nint8 = outside:halves", "dfl.codecs: int8 = 'outside:halves': the name is taken"),
    ("[dfl.rules]\nmine = outside:absent", "cannot be loaded: AttributeError"),
    ("[dfl.rules]\nmine = not_there:rule", "cannot be loaded: ModuleNotFoundError"),
])
def test_entry_points_that_are_none_are_named(tmp_path, entry, said):
    package = tmp_path / "wrong-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(entry + "\n")
    (tmp_path / "outside.py").write_text("def halves():\n    '''Halves.'''\n")
    done = outside("import sys; from dfl.cli import main; sys.exit(main(['list']))", tmp_path)
    assert done.returncode == 2 and said in done.stderr, done.stderr


@pytest.mark.long
def test_a_recipe_names_a_module_of_its_own_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rules.py").write_text("from dfl.rules import RULES\nfrom dfl.rules.average import average\n\n\n"
                                          "def mine(layout):\n    '''Average as everybody does.'''\n    return average(layout)\n\n\n"
                                          "RULES['mine'] = mine\n")
    root = tiny_runs.make_folder(tmp_path)
    code = "import sys; from dfl.cli import main; sys.exit(main({!r}))"
    words = tiny_runs.arguments(root / "bert", root / "data.csv", "run", method="mine", plugins="my_rules", train__rounds=2)
    dry = outside(code.format(["train", *words, "--dry-run"]), cwd=tmp_path)
    assert dry.returncode == 0 and "plugins = my_rules: this recipe names code" in dry.stdout + dry.stderr, dry.stderr
    done = outside(code.format(["train", *words]), cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "checkpoints").is_dir(), done.stderr
    assert main(["train", *tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "other", plugins="not_there")]) == 2
    assert "plugins = 'not_there' cannot be imported: ModuleNotFoundError" in capsys.readouterr().err


def test_the_metric_of_the_document_is_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "METRICS", known := dict(metrics.METRICS))
    monkeypatch.setattr(choice, "METRICS", known)
    exec(block("python", "def top_error"), {})
    root = tiny_runs.make_folder(tmp_path)
    words = tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "run", train__rounds=2, eval__primary="top_error",
                                eval__metrics="[accuracy, {name: top_error, above: 0.5}]")
    assert main(["train", *words]) == 0
    text = capsys.readouterr().out
    assert "top_error on the evaluation examples" in text and "mean over peers of accuracy 0." in text
    found = [line["eval"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval" in line]
    assert all(0 < one["top_error"]["mean"] <= 1 and one["own"]["top_error"] for one in found)
    assert main(["eval", str(tmp_path / "run"), "--eval.primary", "macro_f1"]) == 0
    assert "macro_f1" in capsys.readouterr().out


def test_the_tables_are_those_of_the_entry_points():
    assert set(extensions._tables()) == {"rules", "schedules", "triggers", "codecs", "channels", "networks", "guards", "wrappers",
                                         "topologies", "tasks", "metrics", "adapters"}
