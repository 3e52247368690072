"""Signals, kills and silence through the real launchers: a run that went on ends in the same bits, and nobody waits for ever."""

import multiprocessing as mp
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
from ports import free_ports

from dfl.store.checkpoints import latest
from dfl.store.records import read_lines

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: an every_rule is there too
import kill_loop

pytestmark = [pytest.mark.launch, pytest.mark.clock, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model, data, and a run of twelve rounds that nobody disturbed (`straight`)."""
    folder = tmp_path_factory.mktemp("survival")
    kill_loop.prepare(folder)
    return folder


def wait_until(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.005)


def goes_on_to_the_same_end(folder, output) -> None:
    job = kill_loop.Forked(1, kill_loop.words(folder, output), folder / "resumed.log")
    job.finish()
    kill_loop.compare(output, folder / "straight")


# -- kills ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phases", [pytest.param(["anywhere"], marks=pytest.mark.core), ["draft", "manifest"]])
def test_killed_at_any_moment_a_run_ends_as_if_it_had_not_been(folder, tmp_path, phases):
    """The survivors leave by themselves, with a line each."""
    lines = kill_loop.loop(kill_loop.Forked, 2, [2], random.Random(1), folder, tmp_path, phases)
    assert len(lines) == 2


def test_torchrun_starts_killed_workers_again_and_they_meet(folder, tmp_path):
    """In a store that still holds the addresses of the dead, also of those that were killed before they had met."""
    lines = kill_loop.loop(kill_loop.Torchrun, 2, [2], random.Random(2), folder, tmp_path, ["start", "draft"])
    assert len(lines) == 2


# -- signals ----------------------------------------------------------------------------------------------------------------


# never stops in the middle of a round, however slow the machine, so that there is time for a second signal; tells $HEARD, a
# descriptor, when it has heard one: each SIGINT at the same time, a SIGTERM a minute later
FINISHES = """
import os, signal, sys
from dfl import cli
from dfl.transport import stopping

def hears(stop, number, now):
    hear(stop, number, 60.0 * (number == signal.SIGTERM))
    os.write(int(os.environ["HEARD"]), b".")

stopping.FINISH_SECONDS, hear = 1e9, stopping.StopSignal.hear
stopping.StopSignal.hear = hears
sys.exit(cli.main())
"""
# a part of the start takes a minute, unless a signal comes
SLOW = """
import importlib, sys, time
from dfl import cli
from dfl.run import train as running
name, _, inner = "{slow}".rpartition(".")
try:
    place = importlib.import_module(name)
except ImportError:
    module, _, cls = name.rpartition(".")
    place = getattr(importlib.import_module(module), cls)
before = getattr(place, inner)
def slow(*args, **options):
    print("slow", flush=True)
    until = time.monotonic() + (60 if inner == "with_weights" else 2)
    while time.monotonic() < until:
        time.sleep(0.05)
    return before(*args, **options)
setattr(place, inner, slow)
sys.exit(cli.main())
"""
TORCHRUN = [str(Path(sys.executable).parent / "torchrun")]
WITH_STATUS = [sys.executable, str(ROOT / "launch/torchrun.py")]


def launch(launcher: list[str], *words: str) -> subprocess.Popen:
    command = [*launcher, "--standalone", "--nproc-per-node", "2", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2"]
    return subprocess.Popen([*command, "-m", "dfl", *words], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("to, launcher, number, status", [
    ("launcher", TORCHRUN, signal.SIGTERM, 1),
    pytest.param("launcher", WITH_STATUS, signal.SIGUSR2, 75, marks=pytest.mark.core),
    ("one worker", WITH_STATUS, signal.SIGUSR1, 75)])
def test_a_signal_saves_the_state_of_all_processes(folder, tmp_path, to, launcher, number, status):
    """The launcher forwards it to the workers; or one of them hears it alone."""
    output = tmp_path / "run"
    job = launch(launcher, *kill_loop.words(folder, output))
    try:
        wait_until(lambda: kill_loop.rounds_of(output) >= 2)
        os.kill(job.pid if to == "launcher" else kill_loop.children(job.pid)[1], number)
        said = job.communicate(timeout=100)[0]
    finally:
        job.kill()
    done = kill_loop.rounds_of(output)
    # where the round is to be evaluated, that is left to those who go on
    saved = done + ("before its evaluation" in said)
    assert 2 <= done < kill_loop.ROUNDS and latest(output).name == f"round-{saved:05}"
    assert f"stopped after round {saved}" in said and "; the state is saved, --resume goes on" in said
    assert job.returncode == status and ("Traceback" in said) == (launcher is TORCHRUN)
    if to == "one worker":  # the launcher reports who left first, and ends the other, which has nothing left to do
        assert "exitcode  : 75" in said
    goes_on_to_the_same_end(folder, output)


def test_the_status_tells_a_killed_process_from_a_refused_run(folder, tmp_path):
    refused = launch(WITH_STATUS, *kill_loop.words(folder, tmp_path / "run"), "--train.lr=-1")
    assert "dfl: train.lr = -1" in refused.communicate(timeout=100)[0] and refused.returncode == 2
    killed = launch(WITH_STATUS, *kill_loop.words(folder, tmp_path / "run"))
    try:
        wait_until(lambda: kill_loop.rounds_of(tmp_path / "run") >= 2)
        os.kill(kill_loop.children(killed.pid)[1], signal.SIGKILL)
        said = killed.communicate(timeout=100)[0]
    finally:
        killed.kill()
    assert killed.returncode == 128 + signal.SIGKILL and "Traceback" not in said


def test_a_second_signal_ends_a_process_at_once_and_costs_its_round(folder, tmp_path):
    tree = {"method": "{name: tad, T: 2}", "train__state": "carried", "train__rounds": 3, "train__local_steps": 100,
            "checkpoint__every": 1, "model__layers": 1}
    words = {name: ["train", *tiny_runs.arguments(folder / "bert", folder / "data.csv", tmp_path / name, **tree), "--resume"]
             for name in ("run", "straight")}
    heard, tell = os.pipe()
    job = subprocess.Popen([sys.executable, "-c", FINISHES, *words["run"]], cwd=ROOT, env=ENVIRONMENT | {"HEARD": str(tell)},
                           text=True, stderr=subprocess.PIPE, pass_fds=[tell])
    os.close(tell)
    wait_until(lambda: latest(tmp_path / "run") is not None, 240)
    for _ in range(10):  # one wish
        job.send_signal(signal.SIGINT)
        assert os.read(heard, 1) == b"."
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=10)[1]
    os.close(heard)
    assert job.returncode == 128 + signal.SIGTERM and "dfl: left at once at a second SIGTERM" in said
    saved, recorded = (int(latest(tmp_path / "run").name[-5:]), kill_loop.rounds_of(tmp_path / "run"))
    assert saved >= recorded - 1
    for name in ("run", "straight"):
        kill_loop.Forked(1, words[name], tmp_path / f"{name}.log").finish()
    assert tiny_runs.adapter_digests(tmp_path / "run") == tiny_runs.adapter_digests(tmp_path / "straight")
    assert [line["round"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == list(range(4))


def test_a_signal_while_the_model_is_loaded_or_the_start_evaluated_leaves_soon(folder, tmp_path):
    """Nothing was done yet, so nothing is lost: no checkpoint, and --resume begins."""
    words = ["train", *tiny_runs.arguments(folder / "bert", folder / "data.csv", tmp_path / "run", train__rounds=2), "--resume"]
    for slow, said in (("dfl.tasks.with_weights", "stopped by SIGTERM before the first round"),
                       ("dfl.metrics.evaluator.in_batches", "stopped before the first round; --resume begins")):
        job = subprocess.Popen([sys.executable, "-c", SLOW.format(slow=slow), *words], cwd=ROOT, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert job.stdout.readline() == "slow\n"
        asked = time.monotonic()
        job.send_signal(signal.SIGTERM)
        err = job.communicate(timeout=60)[1]
        assert job.returncode == 75 and said in err and latest(tmp_path / "run") is None, err
        assert time.monotonic() - asked < 10
    kill_loop.Forked(1, words, tmp_path / "log").finish()
    assert [line["round"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


# -- silence and strangers, through the command line, without a launcher ------------------------------------------------------


class Started:
    """Processes with an environment as torchrun's or srun's; process 0 holds the store where they meet."""

    def __init__(self, arguments: list[list[str]], folder: Path):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "dfl.run.train"])
        [port] = free_ports(1)
        self.logs = [folder / f"log.{rank}" for rank in range(len(arguments))]
        self.processes = [context.Process(target=kill_loop._work, args=(rank, len(arguments), port, argv, str(path)))
                          for rank, (argv, path) in enumerate(zip(arguments, self.logs, strict=True))]
        for process in self.processes:
            process.start()

    def leave(self, seconds: float, but=()) -> list[tuple[int, list[str]]]:
        """The exit status and the lines of each, but for those in `but`."""
        until, found = time.monotonic() + seconds, []
        try:
            for rank, process in enumerate(self.processes):
                if rank not in but:
                    process.join(max(0, until - time.monotonic()))
                    said = self.logs[rank].read_text()
                    assert process.exitcode is not None, f"process {rank} hangs; it said: {said}"
                    assert "Traceback" not in said and "frame #" not in said, said
                    found.append((process.exitcode, [line for line in said.splitlines() if line.startswith("dfl: ")]))
        finally:
            for process in self.processes:
                process.kill()
        return found


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_process_is_named_on_every_command_line(folder, tmp_path, victim):
    """Also process 0, with which the store falls silent in which notes could be left."""
    words = [*kill_loop.words(folder, tmp_path / "run"), "--train.rounds=2000", "--timeout=4"]
    job = Started([words] * 3, tmp_path)
    wait_until(lambda: kill_loop.rounds_of(tmp_path / "run") >= 2)
    os.kill(job.processes[victim].pid, signal.SIGSTOP)
    for status, lines in job.leave(30, but=[victim]):
        assert status == 1 and len(lines) == 1, lines
        assert lines[0].startswith(f"dfl: process {victim} (peer") and f"host {socket.gethostname()}) said nothing for " in lines[0]
        assert " s, in round " in lines[0]


def test_a_stranger_is_refused_on_every_command_line(folder, tmp_path):
    words = kill_loop.words(folder, tmp_path / "run")
    found = Started([words, words, [*words, "--train.lr=0.5"]], tmp_path).leave(60)
    assert [status for status, _ in found] == [2, 2, 2]
    assert [len(lines) for _, lines in found] == [1, 0, 0]
    assert "does not belong to this run: train.lr = 0.5, but 0.001 on process 0" in found[0][1][0]
    assert not (tmp_path / "run").exists()


def test_a_process_that_never_comes_is_one_line(folder, tmp_path, monkeypatch):
    from dfl.run import runtime
    monkeypatch.setattr(runtime, "START_SECONDS", 2.0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
    config = tiny_runs.make_config(folder / "bert", folder / "data.csv", tmp_path / "run", timeout=0.5)
    with pytest.raises(ConnectionError, match=r"process 0 on .* did not meet the other 1 at 127.0.0.1:\d+: "):
        runtime.start(config)
