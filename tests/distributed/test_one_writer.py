"""One folder, one writer, with whole runs: two at once, one over another, one that was taken over, one whose launcher was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
import workplace
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kill_loop

from dfl.store.checkpoints import latest
from dfl.store.lease import owners
from dfl.store.manifest import verify
from dfl.store.records import read_lines

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
ROUNDS = 6
STOPS = "--callbacks=[tiny_runs:StopsItself]"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("writers"))


def words(root, output, *more, seed=1, rounds=ROUNDS, steps=2) -> list[str]:
    fields = {"train__rounds": rounds, "train__local_steps": steps, "checkpoint__every": 1, "seed": seed, "timeout": 60}
    return ["train", *tiny_runs.arguments(root / "bert", root / "data.csv", output, **fields), *more]


@pytest.fixture(scope="module")
def straight(root, tmp_path_factory):
    """The runs of two seeds that had their folders for themselves."""
    folder = tmp_path_factory.mktemp("straight")
    jobs = [kill_loop.Forked(1, words(root, folder / str(seed), seed=seed), folder / f"{seed}.log") for seed in (1, 2)]
    for job in jobs:
        job.finish()
    return folder


def ended(job, seconds: float = 120) -> tuple[set[int], str]:
    """The exit statuses of a job's processes, and what they said."""
    for process in job.processes:
        process.join(seconds)
    said = "".join(path.read_text() for path in job.logs)
    assert "Traceback" not in said, said
    return {process.exitcode for process in job.processes}, said


def is_the_run_of(output: Path, straight: Path, seed: int) -> None:
    """Recipe, records and adapters are those of one run."""
    assert yaml.safe_load((output / "recipe.yaml").read_text())["seed"] == seed
    assert json.loads((output / "run.json").read_text())["config"]["seed"] == seed
    verify(latest(output))
    assert tiny_runs.adapter_digests(output) == tiny_runs.adapter_digests(straight / str(seed))
    lines = [read_lines(folder / "metrics.jsonl") for folder in (output, straight / str(seed))]
    for one, other in zip(*lines, strict=True):
        assert tiny_runs.lasting(one) == tiny_runs.lasting(other)


@pytest.mark.parametrize("more, processes", [((), 1), ((), 1), (("--overwrite",), 1), (("--resume",), 1), (("--overwrite",), 2)])
def test_of_two_that_start_at_once_one_wins_and_the_other_is_refused(root, straight, tmp_path, more, processes):
    output = tmp_path / "run"
    jobs = [kill_loop.Forked(processes, words(root, output, *more, seed=seed, steps=2), tmp_path / f"{seed}.log") for seed in (1, 2)]
    found = [ended(job) for job in jobs]
    assert sorted(sorted(statuses) for statuses, _ in found) == [[0], [2]], found
    winner = 1 + [statuses for statuses, _ in found].index({0})
    refused = found[2 - winner][1]
    assert "is in use by another run: process " in refused and " on " in refused and ", since " in refused
    is_the_run_of(output, straight, winner)
    assert owners(output) == [] and not list(output.glob(".dfl/lease*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_living_run_cannot_be_replaced_nor_resumed(root, straight, tmp_path, processes):
    """It is refused with the process that is at work, whatever is asked for, and ends as if nobody had asked."""
    output = tmp_path / "run"
    job = kill_loop.Forked(1, words(root, output, STOPS, seed=1), tmp_path / "living.log")
    wait_for_round(output, 2)
    workplace.wait_for(lambda: state(job.processes[0].pid) == "T", 120, lambda: "it does not stop itself")
    try:
        for number, more in enumerate([(), ("--resume",), ("--overwrite",)]):
            asked = kill_loop.Forked(processes, words(root, output, *more, seed=2), tmp_path / f"{number}.log")
            statuses, said = ended(asked)
            assert statuses == {2} and f"in use by another run: process {job.processes[0].pid} on " in said, said
    finally:
        os.kill(job.processes[0].pid, signal.SIGCONT)
    assert ended(job)[0] == {0}
    is_the_run_of(output, straight, 1)


def wait_for_round(output: Path, rounds: int) -> None:
    workplace.wait_for(lambda: kill_loop.rounds_of(output) >= rounds, 120, lambda: f"{output} has no round {rounds}")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_lost_its_folder_stops_and_leaves_it_to_the_other(root, straight, tmp_path, processes):
    """As after a long sleep of its machine, when another host has taken over: nothing of the first one is written any more."""
    output = tmp_path / "run"
    late = kill_loop.Forked(processes, words(root, output, seed=1, rounds=400), tmp_path / "late.log")
    wait_for_round(output, 1)
    for process in late.processes:
        os.kill(process.pid, signal.SIGSTOP)
    path = next(output.glob(".dfl/lease-*.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": late.processes[0].pid, "started": 1}))  # seen as dead
    kill_loop.Forked(1, words(root, output, "--overwrite", seed=2), tmp_path / "next.log").finish()
    for process in late.processes:
        os.kill(process.pid, signal.SIGCONT)
    statuses, said = ended(late)
    assert statuses == {1} and "is no longer this run's" in said and "Nothing more is written" in said
    is_the_run_of(output, straight, 2)


def test_after_the_kill_of_a_launcher_a_successor_goes_on_at_once_and_no_worker_is_left(root, straight, tmp_path):
    """torchrun's agent gets SIGKILL: its workers end with it, and the next start with --resume need not wait for anybody."""
    output = tmp_path / "run"
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "dfl"]
    command = [*torchrun, *words(root, output, "--resume", seed=1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen([*command, STOPS], cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        wait_for_round(output, 2)
        workers = kill_loop.children(first.pid)
        assert len(workers) == 2
        first.kill()
        first.wait()
        second = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        until = time.monotonic() + 1.5
        while any(map(alive, workers)) and time.monotonic() < until:
            time.sleep(0.01)
        assert not any(map(alive, workers))
        assert second.wait(200) == 0, (tmp_path / "log").read_text()
    is_the_run_of(output, straight, 1)


def alive(pid: int) -> bool:
    return state(pid) not in ("Z", None)


def state(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
