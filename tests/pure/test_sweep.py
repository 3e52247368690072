"""Sweeps: which runs a grid gives and what they are called, what is refused before anything starts, what a changed grid keeps."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import yaml

from dfl import sweep as sweeps
from dfl.cli import main
from dfl.config.recipes import parse_overrides, set_field
from dfl.store import lease
from dfl.sweep import local
from dfl.sweep.names import names
from dfl.transport import InProcess


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("sweep"))


def recipe(root, **fields) -> dict:
    tree: dict = {}
    for key, value in parse_overrides(tiny_runs.arguments(root / "bert", root / "data.csv", "unused", train__rounds=2, **fields)):
        set_field(tree, key, value)
    return tree


def write(tmp_path, tree) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), **tree}, sort_keys=False))
    return path


def sweep(*words) -> int:
    return main(["sweep", *map(str, words)])


def states(folder) -> dict[str, str]:
    return {run.name: run.state for run in sweeps.read(folder)}


def digests(tmp_path, name) -> dict[str, str]:
    return tiny_runs.adapter_digests(tmp_path / "out" / name)


GRID = {"grid": {"method": ["lora", {"name": "tad", "T": 5}], "topology": ["ring", {"name": "erdos_renyi", "p": 0.5}], "seed": [0, 1]}}


def expand(tmp_path, tree, *overrides):
    return sweeps.load(write(tmp_path, {"recipe": {}, **tree}), overrides)


def test_every_combination_the_last_field_fastest(tmp_path):
    cells = expand(tmp_path, GRID).cells
    assert len(cells) == 8
    assert [cell.fields["seed"] for cell in cells] == [0, 1] * 4
    assert [cell.config.method.name for cell in cells] == ["lora"] * 4 + ["tad"] * 4
    assert cells[3].config.topology.params == {"p": 0.5} and cells[4].config.method.params == {"T": 5}


def test_fields_that_move_together_and_those_with_one_value(tmp_path):
    found = expand(tmp_path, {"grid": {"seed": [0, 1], "train.rounds": [3]},
                              "together": {"lora.rank": [4, 8], "lora.alpha": [8, "1.6e1"]}})
    assert found.axes == ["seed", "lora.rank", "lora.alpha"]
    assert [(c.config.seed, c.config.lora.rank, c.config.lora.alpha, c.config.train.rounds) for c in found.cells] == [
        (0, 4, 8.0, 3), (0, 8, 16.0, 3), (1, 4, 8.0, 3), (1, 8, 16.0, 3)]
    two = expand(tmp_path, {"together": [{"seed": [0, 1], "topology_seed": [5, 6]}, {"lora.rank": [2, 4], "lora.alpha": [4, 8]}]})
    assert len(two.cells) == 4


def test_exclude_and_include(tmp_path):
    found = expand(tmp_path, GRID | {"exclude": [{"method": "tad", "topology": "ring"}, {"topology": {"p": 0.5}, "seed": 1}],
                                     "include": [{"method": "local"}, {"method": "lora", "seed": 7}]})
    shown = [(c.config.method.name, c.config.topology.name, c.config.seed) for c in found.cells]
    assert shown == [("lora", "ring", 0), ("lora", "ring", 1), ("lora", "erdos_renyi", 0), ("tad", "erdos_renyi", 0),
                     ("local", "ring", 0), ("lora", "ring", 7)]
    # an included run stands in the table with every field
    assert found.cells[4].fields == {"method": "local", "topology": "ring", "seed": 0} and found.cells[4].given == {"method": "local"}


def test_a_parameter_of_a_plugin_may_be_an_axis_in_either_order(tmp_path):
    for grid in ({"method": ["tad", "adf"], "method.T": [2, 3]}, {"method.T": [2, 3], "method": ["tad", "adf"]}):
        found = {(c.config.method.name, c.config.method.params["T"]) for c in expand(tmp_path, {"grid": grid}).cells}
        assert found == {("tad", 2), ("tad", 3), ("adf", 2), ("adf", 3)}


def test_an_override_holds_in_all_runs(tmp_path):
    found = expand(tmp_path, GRID, "--learning_rate", "0.5", "--seed", "9", "--output", str(tmp_path / "other"))
    assert len(found.cells) == 4 and found.axes == ["method", "topology"] and found.output == tmp_path / "other"
    assert {(c.config.train.lr, c.config.seed) for c in found.cells} == {(0.5, 9)}


def test_what_is_excluded_stays_so_under_an_override(tmp_path):
    tree = GRID | {"exclude": [{"seed": 1, "method": "lora"}, {"seed": 0, "method": "tad"}]}
    assert [c.config.method.name for c in expand(tmp_path, tree, "--seed", "0").cells] == ["lora", "lora"]
    assert [c.config.method.name for c in expand(tmp_path, tree, "--seed", "1").cells] == ["tad", "tad"]


def test_steps_as_transformers_counts_them_hold_against_the_recipe(tmp_path):
    tree = {"recipe": {"eval": {"every": 3}}, "grid": {"train.local_steps": [10, 20]}}
    assert [c.config.eval.every for c in expand(tmp_path, tree, "--eval_steps", "40").cells] == [4, 2]


def test_a_recipe_beside_the_sweep_or_inline(tmp_path):
    (tmp_path / "mine.yaml").write_text("peers: 3\nlearning_rate: 0.5\noutput: elsewhere\n")
    config = expand(tmp_path, {"recipe": "mine.yaml", "grid": {"seed": [0]}}).cells[0].config
    assert (config.peers, config.train.lr) == (3, 0.5)
    assert config == expand(tmp_path, {"recipe": {"peers": 3, "train": {"lr": 0.5}}, "grid": {"seed": [0]}}).cells[0].config


NAMES = [({"method": "lora", "topology": "ring", "seed": 0}, "lora__ring__seed=0"),
         ({"method": {"name": "tad", "T": 5}, "topology": {"name": "edge_activation", "p": 0.1}}, "tad-T=5__edge_activation-p=0.1"),
         ({"train.lr": 1e-3, "codec": {"name": "int8"}}, "lr=0.001__codec=int8"),
         ({"lora.targets": ["query", "value"], "lora.rslora": True}, "targets=query+value__rslora=true"),
         ({"train.clip": None}, "clip=null"),
         ({"model.name": "/data/models/my model"}, "name=my-model"), ({"train.lr": 1e-9}, "lr=1e-09"), ({}, "run")]


@pytest.mark.parametrize("fields, name", NAMES)
def test_names_are_readable(fields, name):
    assert names([fields], list(fields)) == [name]


def test_names_do_not_depend_on_what_else_there_is_and_never_collide():
    axes = ["method", "train.batch_size", "eval.batch_size"]
    few = [{"method": "lora", "train.batch_size": 4, "eval.batch_size": 8}]
    more = [*few, *({"method": rule, "train.batch_size": 4, "eval.batch_size": 8} for rule in ("tad", "local"))]
    assert names(more, axes)[0] == names(few, axes)[0] == "lora__train.batch_size=4__eval.batch_size=8"
    alike = names([{"model.name": "/a/bert"}, {"model.name": "/b/Bert"}, {"model.name": "/c/other"}], ["model.name"])
    assert len({name.casefold() for name in alike}) == 3 and alike[0].startswith("name=bert__") and alike[2] == "name=other"
    shares = [[0.1 * k, 1 - 0.1 * k] for k in range(60)]
    long = names([{"partition": {"name": "proportions", "proportions": shares}}], ["partition"])[0]
    assert len(long) <= 120 and "/" not in long


BAD = {
    "unknown key": ({"grd": {}}, ["unknown key 'grd'", "did you mean 'grid'?"]),
    "no grid": ({}, ["grid is missing"]),
    "no output": ({"output": None, "grid": {"seed": [0]}}, ["output = None", "a folder"]),
    "the output varies": ({"grid": {"output": ["a", "b"]}}, ["output cannot vary"]),
    "one value": ({"grid": {"seed": 3}}, ["seed = 3 must be a list"]),
    "no value": ({"grid": {"seed": []}}, ["seed = [] must be a list of at least one value"]),
    "a value twice": ({"grid": {"seed": [0, 1, 0]}}, ["seed has the value 0 twice"]),
    "no list of fields": ({"grid": {"seed": [0]}, "together": "seed"}, ["together = 'seed' must be a mapping"]),
    "no pattern": ({"grid": {"seed": [0]}, "include": ["lora"]}, ["include = ['lora'] must be a list of mappings"]),
    "a field twice": ({"grid": {"seed": [0]}, "together": {"seed": [0], "lora.rank": [4]}}, ["seed stands twice"]),
    "unequal lengths": ({"together": {"lora.rank": [4, 8], "lora.alpha": [8]}}, ["equal length", "lora.rank: 2, lora.alpha: 1"]),
    "no such field to exclude": ({"grid": {"seed": [0]}, "exclude": [{"sed": 0}]}, ["exclude: 'sed'", "did you mean 'seed'?"]),
    "nothing to exclude": ({"grid": {"seed": [0]}, "exclude": [{"seed": 4}]}, ["exclude: {'seed': 4} matches no run"]),
    "nothing left": ({"grid": {"seed": [0]}, "exclude": [{"seed": 0}]}, ["no run: exclude leaves none"]),
    "the same run twice": ({"grid": {"method": ["lora", {"name": "lora"}]}},
                           ["runs 0 (method = 'lora') and 1 (method = {'name': 'lora'})"]),
    "an unknown field": ({"grid": {"seed": [0], "train.learning_rate": [1, 2]}},
                         ["run 0 (seed = 0, train.learning_rate = 1): unknown key", "did you mean 'train.lr'?"]),
    "both names": ({"grid": {"train.lr": [1], "learning_rate": [1, 2]}}, ["run 0", "are the same field"]),
    "a parameter of another rule": ({"grid": {"method": ["tad", "lora"], "method.T": [2]}},
                                    ["run 1 (method = 'lora', method.T = 2): method.T = 2: 'lora' has no such parameter"]),
    "a bad value": ({"grid": {"seed": [0], "topology": ["ring", "rign"]}}, ["run 1 (seed = 0, topology = 'rign')", "not known"]),
    "no data file": ({"grid": {"data.train": ["{root}/data.csv", "{root}/nowhere.csv"]}},
                     ["run 1 (data.train = ", "nowhere.csv' is not a file"]),
    "no model": ({"grid": {"model.name": ["{root}/bert", "/nowhere/bert"]}}, ["run 1 (model.name = '/nowhere/bert')", "not a folder"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_is_started_or_written(root, tmp_path, capsys, case):
    tree, parts = BAD[case]
    tree = json.loads(json.dumps(tree).replace("{root}", str(root)))
    path = write(tmp_path, {"recipe": recipe(root), **tree})
    capsys.readouterr()
    assert sweep(path) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dfl: ") and err.count("\n") == 1
    for part in parts:
        assert part in err
    assert os.listdir(tmp_path) == ["sweep.yaml"]


@pytest.mark.parametrize("words, part", [
    (["--jobs", "0"], "--jobs 0"), (["--processes", "0"], "--processes 0"), (["--retries", "-1"], "--retries -1"),
    (["--index", "3"], "runs 0 to 2"),
    (["--processes", "5"], "run 0 (method = 'lora'): peers = 4 is fewer than the 5 processes"),
    (["--index", "0", "--slurm"], "--index 0"), (["--peers", "3"], "--peers = 3: the sweep sets peers by itself"),
    (["--sbatch", "time=3"], "with --slurm"),
    (["--method.T", "3"], "override --method.T = 3: the sweep sets method by itself")])
def test_refused_arguments(root, tmp_path, capsys, words, part):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"method": ["lora", "ffa"]}, "include": [{"peers": 5}]})
    assert sweep(path, *words) == 2
    assert part in capsys.readouterr().err and os.listdir(tmp_path) == ["sweep.yaml"]


@pytest.mark.parametrize("text, part", [
    ("grid: {1: [2]}", "1 is no field"), ("include: [{1: 2}]\ngrid: {seed: [0]}", "include = [{1: 2}]")])
def test_fields_that_are_no_text(tmp_path, capsys, text, part):
    (tmp_path / "sweep.yaml").write_text(f"output: x\n{text}\n")
    assert sweep(tmp_path / "sweep.yaml") == 2 and part in capsys.readouterr().err


def test_a_dry_run_lists_the_runs_and_writes_nothing(root, tmp_path, capsys):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"method": ["lora", {"name": "tad", "T": 2}], "seed": [0, 1]}})
    assert sweep(path, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "3  waiting  tad-T=2__seed=1  method: {name: tad, T: 2}, seed: 1" and len(lines) == 4
    assert os.listdir(tmp_path) == ["sweep.yaml"]


def test_one_run_by_its_number_and_what_a_reader_finds(root, tmp_path, capsys):
    path = write(tmp_path, {"recipe": recipe(root, lora__head="mixed"), "grid": {"method": ["lora", "ffa"], "train.lr": [0.01, 1e30]}})
    assert sweep(path, "--index", 2) == 0
    manifest = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert manifest["axes"] == ["method", "train.lr"]
    assert manifest["runs"][2] == {"index": 2, "name": "ffa__lr=0.01", "fields": {"method": "ffa", "train.lr": 0.01},
                                   "output": str(tmp_path / "out" / "ffa__lr=0.01")}
    assert set(states(tmp_path / "out").values()) == {"finished", "waiting"}
    before = os.stat(tmp_path / "out" / "ffa__lr=0.01" / "metrics.jsonl").st_mtime_ns
    capsys.readouterr()
    assert sweep(path, "--index", 2) == 0  # it is finished: nothing happens
    assert "run 2 (ffa__lr=0.01) is finished" in capsys.readouterr().out
    assert os.stat(tmp_path / "out" / "ffa__lr=0.01" / "metrics.jsonl").st_mtime_ns == before
    assert sweep(path, "--index", 1) == 1  # a rate that makes any run diverge
    found = {run.name: run for run in sweeps.read(tmp_path / "out")}
    assert {name: run.state for name, run in found.items()} == {
        "lora__lr=0.01": "waiting", "lora__lr=1e+30": "failed", "ffa__lr=0.01": "finished", "ffa__lr=1e+30": "waiting"}
    assert "diverged in round" in found["lora__lr=1e+30"].error and found["ffa__lr=0.01"].done == found["ffa__lr=0.01"].rounds == 2
    sweep(path, "--dry-run")
    assert "1  failed (0 of 2 rounds)  lora__lr=1e+30" in capsys.readouterr().out


def test_a_folder_that_is_moved_is_read_where_it_is(root, tmp_path):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1]}})
    assert sweep(path, "--index", 1) == 0
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert states(tmp_path / "moved") == {"seed=0": "waiting", "seed=1": "finished"}


def test_a_changed_grid_keeps_the_runs_that_still_belong(root, tmp_path, capsys):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"method": ["lora", "ffa"]}})
    assert sweep(path, "--index", 0) == 0
    kept = digests(tmp_path, "lora")
    # another value, and another field, with which the finished run is that of seed 0
    write(tmp_path, {"recipe": recipe(root), "grid": {"method": ["lora", "rolora"], "seed": [0, 1]}})
    capsys.readouterr()
    assert sweep(path, "--index", 0) == 0 and "is finished" in capsys.readouterr().out
    assert states(tmp_path / "out") == {"lora": "finished", "lora__seed=1": "waiting", "rolora__seed=0": "waiting",
                                        "rolora__seed=1": "waiting"}
    # it keeps its name ever after
    assert sweep(path, "--index", 1) == 0 and digests(tmp_path, "lora") == kept
    assert [run.name for run in sweeps.plan(sweeps.load(path))][:2] == ["lora", "lora__seed=1"]
    # how a run is carried out is not what it is
    assert sweep(path, "--index", 0, "--threads", 2) == 0


def test_a_changed_recipe_is_refused_with_the_field_unless_all_begins_again(root, tmp_path, capsys):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1]}})
    assert sweep(path, "--index", 0) == 0
    for grid in ({"seed": [0, 1]}, {"seed": [2, 3]}, {"seed": [0, 1], "method": ["lora", "ffa"]}):
        write(tmp_path, {"recipe": recipe(root, train__lr=0.5), "grid": grid})
        assert sweep(path, "--index", 0) == 2
        assert "train.lr = 0.5 differs from 0.001" in capsys.readouterr().err
    # a default that is written down changes nothing
    write(tmp_path, {"recipe": recipe(root) | {"lora": {"rank": 2, "alpha": 16}}, "grid": {"seed": [0, 1]}})
    assert sweep(path, "--index", 0) == 0
    write(tmp_path, {"recipe": recipe(root, train__lr=0.5), "grid": {"seed": [0, 1]}})
    changed = sweeps.load(path)
    runs = sweeps.plan(changed, overwrite=True)
    sweeps.write(changed, runs, overwrite=True)
    assert states(tmp_path / "out") == {"seed=0": "waiting", "seed=1": "waiting"} and not (tmp_path / "out" / "seed=0").exists()


def test_a_folder_with_something_else_in_it_is_refused(root, tmp_path, capsys):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1]}})
    assert main(["train", *tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "out", train__rounds=1)]) == 0
    assert sweep(path, "--dry-run") == 2
    assert "already holds a run" in capsys.readouterr().err
    (tmp_path / "out" / "recipe.yaml").unlink()
    (tmp_path / "out" / "sweep.json").write_text('{"runs": [{"name": "../x"}]}')
    assert sweep(path, "--dry-run") == 2
    assert "is not the manifest of a sweep" in capsys.readouterr().err


def test_a_run_that_is_at_work_elsewhere_is_left_alone(root, tmp_path, capsys):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0]}})
    (tmp_path / "out" / "logs").mkdir(parents=True)
    with (tmp_path / "out" / "logs" / "run.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert sweep(path) == 75
    assert "is at work in another process" in capsys.readouterr().err and not (tmp_path / "out" / "run").exists()


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_while_a_process_is_being_started_reaches_it(root, tmp_path, monkeypatch, capsys, signals):
    def start(*words, **options):
        process = popen(*words, **options)
        for _ in range(signals):
            signal.raise_signal(signal.SIGINT)
        return process

    popen = subprocess.Popen
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1]}})
    monkeypatch.setattr(local, "command_of", lambda *_: [sys.executable, "-c", "import time; time.sleep(100)"])
    monkeypatch.setattr(subprocess, "Popen", start)
    started = time.monotonic()
    assert sweep(path) == 75 and time.monotonic() - started < 60
    assert "seed=0  stopped after" in capsys.readouterr().err
    assert states(tmp_path / "out") == {"seed=0": "waiting", "seed=1": "waiting"}


# the first time it is killed, and leaves a process that has its log; the second time it is refused
KILLED = "echo >> {tries}; [ $(wc -l < {tries}) = 2 ] && exit 2; sleep 100 & echo $! > {left}; kill -9 $$"


def test_what_a_killed_run_leaves_for_a_moment_does_not_keep_it_from_being_tried_again(root, tmp_path, monkeypatch, capsys):
    tries, left = tmp_path / "tries", tmp_path / "left"
    monkeypatch.setattr(local, "command_of", lambda *_: ["bash", "-c", KILLED.format(tries=tries, left=left)])
    try:
        assert sweep(write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0]}})) == 1
        assert tries.read_text() == "\n\n"
        said = capsys.readouterr().err
        assert "will be tried again: ended by signal 9 (SIGKILL)" in said and "at work in another" not in said
    finally:
        os.kill(int(left.read_text()), signal.SIGKILL)


def test_what_a_run_says_before_the_sweep_knows_of_its_process_counts(root, tmp_path, monkeypatch, capsys):
    def start(*words, **options):
        process = popen(*words, **options)
        process.wait()
        return process

    popen = subprocess.Popen
    monkeypatch.setattr(local, "command_of", lambda *_: ["bash", "-c", "echo dfl: not like this; exit 2"])
    monkeypatch.setattr(subprocess, "Popen", start)
    assert sweep(write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0]}})) == 1
    assert ": not like this, left" in capsys.readouterr().err


def test_cores_and_gpus_are_shared_out(root, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "num_cores", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    tree = recipe(root)
    del tree["processes"]
    runs = sweeps.plan(sweeps.load(write(tmp_path, {"recipe": tree, "grid": {"seed": [0, 1, 2, 3]}})))
    runner = local.Runner(runs, local.Resources(jobs=2, processes=2))
    assert [runner._environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["4,5", "6,4"]
    command = local.command_of(runs[3], 2, runner.cores)
    assert command[command.index("--nproc-per-node") + 1] == "2" and command[-1] == "--resume"
    # without torchrun: a share of the cores each, one for each peer at most; threads follow from nothing that a sweep knows
    plain = ["-m", "dfl", "train", str(tmp_path / "out" / "recipes" / "seed=0.yaml"), "--resume"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [local.command_of(runs[0], None, cores)[1:] for cores in (3, 99)] == [[*plain, "--processes", n] for n in "34"]
    assert local.command_of(runs[0], 1, runner.cores)[1:] == [*plain, "--processes", "1"]
    # a recipe that says how many keeps them
    runs = sweeps.plan(sweeps.load(write(tmp_path, {"recipe": tree, "grid": {"seed": [0, 1]}}), ["--processes", "3"]))
    assert local.command_of(runs[0], None, 8)[1:] == plain


@pytest.mark.parametrize("status, text, line", [
    (1, "warming up\ndfl: peer 0 diverged\nTraceback\nValueError: x\n", "peer 0 diverged"),
    (1, "Traceback (most recent call last):\n  File x\nmy.module.OddError: no such thing\n", "my.module.OddError: no such thing"),
    (-9, "round 1\n", "ended by signal 9 (SIGKILL)"), (3, "round 1\n", "exit status 3: round 1"), (3, "", "exit status 3")])
def test_the_line_that_says_what_went_wrong(tmp_path, status, text, line):
    (tmp_path / "log").write_text("dfl: of an earlier attempt\n" + text)
    assert local.first_error(tmp_path / "log", 27, status) == line


def test_an_array_job_is_submitted_with_what_was_given(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dfl.sweep.slurm.SCRIPT", tmp_path / "sweep.sbatch")
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1, 2]}})
    words = [path, "--slurm", "--jobs", "2", "--sbatch", "time=2:00:00", "--sbatch", "exclusive", "--train.lr", "0.5"]
    assert sweep(*words) == 2 and "needs" in capsys.readouterr().err  # no checkout
    (tmp_path / "sweep.sbatch").write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert sweep(*words) == 2 and "no sbatch on this machine" in capsys.readouterr().err
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "Submitted: $*"\n')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    assert sweep(*words) == 0
    said = capsys.readouterr().out.strip()
    assert said == (f"Submitted: --array=0-2%2 --time=2:00:00 --exclusive {tmp_path}/sweep.sbatch {path} --train.lr 0.5")
    assert [run.state for run in sweeps.read(tmp_path / "out")] == ["waiting"] * 3
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/sh\necho "invalid partition" >&2\nexit 1\n')
    assert sweep(*words) == 1 and "invalid partition" in capsys.readouterr().err


# -- what --overwrite takes away -------------------------------------------------------------------------------------------


def everything(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../x", "/etc", "{absolute}"])
def test_a_sweep_json_cannot_name_what_lies_elsewhere(root, tmp_path, capsys, name):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1]}})
    assert sweep(path, "--index", 0) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    listed = json.loads((tmp_path / "out" / "sweep.json").read_text())
    listed["runs"][1]["name"] = name.replace("{absolute}", str(tmp_path / "mine"))
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(listed))
    before = everything(tmp_path)
    for more in ([], ["--overwrite"], ["--index", 1]):
        assert sweep(path, *more) == 2
        assert "is not the manifest of a sweep" in capsys.readouterr().err and everything(tmp_path) == before


def test_a_sweep_begins_again_beside_a_users_files(root, tmp_path, capsys):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1]}})
    out = tmp_path / "out"
    assert sweep(path, "--index", 0) == 0 and sweep(path, "--index", 1) == 0
    mine = {"notes.md": "mine", "logs/thoughts.txt": "mine", "seed=1/plots/loss.pdf": "mine", "third/recipe.yaml": "mine"}
    for name, text in mine.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    planned = sweeps.load(path)
    sweeps.write(planned, sweeps.plan(planned, overwrite=True), overwrite=True)
    assert everything(out).keys() == {*mine, "sweep.json", ".dfl/marker.json", "seed=1/.dfl/marker.json"}
    assert "left in" in (said := capsys.readouterr().err) and "seed=1/plots/" in said
    assert sweep(path, "--index", 1) == 0 and (out / "seed=1/plots/loss.pdf").exists()


def test_nothing_is_removed_where_no_sweep_has_put_its_marker(root, tmp_path, capsys):
    """A folder with a sweep.json of somebody, a link, and a run that is no run."""
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1]}})
    assert sweep(path, "--index", 0) == 0
    out = tmp_path / "out"
    shutil.rmtree(out / "seed=0" / ".dfl")
    planned = sweeps.load(path)
    kept = everything(out / "seed=0")
    sweeps.write(planned, sweeps.plan(planned, overwrite=True), overwrite=True)
    assert everything(out / "seed=0") == kept  # the run refuses it then
    shutil.rmtree(out / ".dfl")
    before = everything(out)
    assert sweep(path, "--overwrite") == 2
    assert "carries no marker" in capsys.readouterr().err and everything(out) == before
    out.rename(tmp_path / "real")
    out.symlink_to(tmp_path / "real")
    assert sweep(path, "--overwrite") == 2
    assert "symbolic link" in capsys.readouterr().err and everything(tmp_path / "real") == before


@pytest.mark.long
def test_a_sweep_whose_run_is_at_work_is_not_begun_again(root, tmp_path, capsys):
    path = write(tmp_path, {"recipe": recipe(root), "grid": {"seed": [0, 1]}})
    assert sweep(path, "--index", 0) == 0 and sweep(path, "--index", 1) == 0
    held = lease.hold(tmp_path / "out" / "seed=1", InProcess())
    before = everything(tmp_path / "out")
    assert sweep(path, "--overwrite") == 2
    assert f"in use by another run: process {os.getpid()}" in capsys.readouterr().err
    assert everything(tmp_path / "out") == before
    held.release()
