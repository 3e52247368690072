"""Sweeps with processes of their own: some at a time, under torchrun, failing, tried again, stopped and gone on with."""

import os
import re
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

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]
ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("sweep"), layers=3)  # slow enough to be met by a signal


def write(root, folder, grid, include=(), **fields) -> Path:
    recipe: dict = {}
    for key, value in parse_overrides(tiny_runs.arguments(root / "bert", root / "data.csv", "unused", **fields)):
        set_field(recipe, key, value)
    folder.mkdir(exist_ok=True)
    path = folder / "sweep.yaml"
    tree = {"recipe": recipe, "grid": grid, "include": list(include), "output": str(folder / "out")}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def start(path, *words) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "dfl", "sweep", str(path), *words], cwd=ROOT, env=ENVIRONMENT,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int) -> str:
    said, _ = process.communicate(timeout=250)
    assert process.returncode == status, said
    return said


def states(path) -> dict[str, str]:
    return {run.name: run.state for run in sweeps.read(path.parent / "out")}


FLAKY = '''
from pathlib import Path
import dfl

class Flaky(dfl.Callback):
    def on_round_end(self, run, control, record):
        mark = Path(__file__).with_name("tried")
        if run.round == 2 and not mark.exists():
            mark.touch()
            raise OSError("only the first time")
'''


@pytest.mark.core
def test_two_at_a_time_what_fails_is_tried_again_and_listed(root, tmp_path, monkeypatch):
    """One rate makes any run diverge, and a callback fails once."""
    (tmp_path / "flaky_hook.py").write_text(FLAKY)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path}:{ENVIRONMENT.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(root, tmp_path, {"train.lr": [0.01, 1e30]}, [{"callbacks": ["flaky_hook:Flaky"]}], lora__head="mixed")
    said = finish(start(path, "--jobs", "2"), 1)
    assert states(path) == {"lr=0.01": "finished", "lr=1e+30": "failed", "callbacks=flaky_hook-Flaky": "finished"}
    assert "2 at a time" in said and re.search(r"\[1/3\] lr=0.01  finished in .*, left \d\d:\d\d", said)
    assert "callbacks=flaky_hook-Flaky  failed after" in said
    assert "will be tried again: callback flaky_hook:Flaky failed in on_round_end after round 2: OSError: only the first time" in said
    closing, log = said.partition("1 of 3 runs failed:")[2], path.parent / "out" / "logs" / "lr=1e+30.log"
    assert "  lr=1e+30\n    peer " in closing and "diverged in round" in closing and str(log) in closing
    assert log.read_text().count("== ") == 2 and "attempt 2" in log.read_text()
    metrics = path.parent / "out" / "lr=0.01" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    # what is finished stays as it is, what failed is tried again
    assert "1 of 3 runs failed" in finish(start(path, "--retries", "0"), 1)
    assert metrics.stat().st_mtime_ns == before and "attempt 1" in log.read_text().rpartition("== ")[2]


@pytest.mark.parametrize("seeds, words", [([0, 1], ("--jobs", "2")), ([0], ("--processes", "2"))])
def test_stopped_by_a_signal_and_gone_on_with(root, tmp_path, seeds, words):
    """A real SIGINT to the sweep alone: its runs save and leave; the second start ends in the bits of a run that was not stopped."""
    fields = {"train__rounds": 60, "eval__every": 0, "measure__every": 0, "lora__dropout": 0.1}
    path = write(root, tmp_path, {"seed": seeds, "train.local_steps": [4]}, **fields)
    process = start(path, *words)
    stopped = path.parent / "out" / ("seed=0" if len(seeds) > 1 else "run")
    until = time.monotonic() + 120
    while not ((stopped / "metrics.jsonl").exists() and (stopped / "metrics.jsonl").read_bytes().count(b"\n") > 3):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = finish(process, 75)
    assert f"{stopped.name}  stopped after" in said and "the same command goes on" in said
    found = sweeps.read(path.parent / "out")[0]
    assert found.state == "begun" and 3 <= found.done < 60
    finish(start(path, *words), 0)
    assert set(states(path).values()) == {"finished"}
    whole = tiny_runs.arguments(root / "bert", root / "data.csv", tmp_path / "whole", train__local_steps=4, **fields)
    assert main(["train", *whole]) == 0
    assert tiny_runs.adapter_digests(stopped) == tiny_runs.adapter_digests(tmp_path / "whole")


def test_the_committed_sweep(tmp_path):
    said = finish(start("launch/recipes/sweep.yaml", "--jobs", "2", "--train.rounds", "1", "--train.local_steps", "2",
                        "--data.max_valid", "40", "--seed", "0", "--method", "lora", "--output", str(tmp_path / "out")), 0)
    assert "2 runs, 0 finished" in said
    assert {run.name: run.state for run in sweeps.read(tmp_path / "out")} == {
        "ring": "finished", "edge_activation-base=complete-p=0.2": "finished"}
