"""The processes that a plain `dfl train` forks: who dies is named, nobody outlives the command, a signal to one stops all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: an every_rule is there too
import kill_loop

pytestmark = [pytest.mark.launch, pytest.mark.clock, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("workers"))


def start(folder, output, *words: str) -> subprocess.Popen:
    """A run of three processes that would take minutes."""
    fields = {"processes": 3, "train__rounds": 5000, "eval__every": 0, "measure__every": 0}
    given = tiny_runs.arguments(folder / "bert", folder / "data.csv", output, **fields)
    command = [sys.executable, "-m", "dfl", "train", *given, *words]
    job = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while kill_loop.rounds_of(output) < 2:
        assert time.monotonic() < until and job.poll() is None, job.communicate()
        time.sleep(0.05)
    return job


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_killed_one_is_named_and_nobody_is_left(folder, tmp_path):
    job = start(folder, tmp_path / "run")
    workers = sorted(kill_loop.children(job.pid))
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    out, said = job.communicate(timeout=60)
    assert job.returncode == 1 and out == "" and "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("dfl: ")]
    assert len(lines) == 1 and lines[0].startswith("dfl: process 1 (peer 2, host ") and "is gone" in lines[0]
    assert lines[0].endswith("; process 1 was killed by SIGKILL") and gone(workers)


def test_they_end_with_the_command(folder, tmp_path):
    job = start(folder, tmp_path / "run")
    workers = kill_loop.children(job.pid)
    job.kill()
    job.communicate()
    assert len(workers) == 2 and gone(workers)


@pytest.mark.parametrize("whom", [pytest.param("command", marks=pytest.mark.core), "worker"])
def test_a_signal_to_one_stops_all_and_another_number_goes_on(folder, tmp_path, whom):
    job = start(folder, tmp_path / "run", "--train.rounds=40", "--train.local_steps=4", "--model.layers=1")
    workers = sorted(kill_loop.children(job.pid))
    os.kill(job.pid if whom == "command" else workers[-1], signal.SIGTERM)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 75 and "--resume goes on" in said and gone(workers)
    words = tiny_runs.arguments(folder / "bert", folder / "data.csv", tmp_path / "run", train__rounds=40, train__local_steps=4,
                                eval__every=0, measure__every=0, model__layers=1)
    whole = [word.replace(str(tmp_path / "run"), str(tmp_path / "whole")) for word in words]
    for argv in ([*words, "--resume"], whole):
        kill_loop.Forked(1, ["train", *argv], tmp_path / "log").finish()
    assert tiny_runs.adapter_digests(tmp_path / "run") == tiny_runs.adapter_digests(tmp_path / "whole")


def test_an_error_of_all_is_one_line(folder, tmp_path):
    """A loss that is not finite: every process raises it, the command says it."""
    words = tiny_runs.arguments(folder / "bert", folder / "data.csv", tmp_path / "run", processes=4, train__lr=1e30,
                                lora__head="mixed", train__rounds=30)
    done = subprocess.run([sys.executable, "-m", "dfl", "train", *words], cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"},
                          capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if line.startswith("dfl: ") or "Traceback" in line]
    assert done.returncode == 1 and len(said) == 1 and "diverged in round" in said[0]
