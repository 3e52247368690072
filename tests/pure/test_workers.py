"""How many processes and threads a run has by default; what forks leave behind."""

import os
import signal
import subprocess
import sys

import pytest

from dfl.config import from_dict
from dfl.run import runtime, workers
from dfl.run.runtime import num_threads


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "OMP_NUM_THREADS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(workers, "num_cores", lambda: 16)
    monkeypatch.setattr(workers, "weight_bytes", lambda model: 100 * 2**20)
    monkeypatch.setattr(workers, "free_memory", lambda: 1e15)


def config(**tree):
    return from_dict({"device": "cpu"} | tree)


def test_threads_do_not_follow_from_the_cores(monkeypatch):
    monkeypatch.setattr(runtime, "num_cores", lambda: 64)
    assert num_threads(config()) == 1 and num_threads(config(threads=3)) == 3
    for given, found in (("4", 4), ("4,2", 4), ("0", 1), ("many", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert num_threads(config()) == found and num_threads(config(threads=3)) == 3


def test_as_many_processes_as_cores_peers_and_memory(monkeypatch):
    def count(**tree):
        return workers.count(config(**tree), automatic=True)

    assert count() == 8 and count(peers=40) == 16 and count(peers=3) == 3 and count(processes=2) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert count() == 4
    monkeypatch.setattr(workers, "free_memory", lambda: 3.4 * 2**30)  # of which 70 % hold two of 1.1 GiB
    assert count() == 2
    monkeypatch.setattr(workers, "free_memory", lambda: 2**20)
    assert count() == 1
    monkeypatch.setattr(workers, "weight_bytes", lambda model: None)
    monkeypatch.setattr(workers, "free_memory", lambda: 1e15)
    assert count() == 1


def test_who_calls_train_from_a_program_gets_one_unless_he_asks():
    assert workers.count(config(), automatic=False) == 1
    assert workers.count(config(processes=2), automatic=False) == 2


@pytest.mark.parametrize("env", [{"RANK": "0", "WORLD_SIZE": "1"},
                                 {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a", "SLURM_TASKS_PER_NODE": "2"}])
def test_a_launcher_brings_its_own(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert workers.count(config(processes=4), automatic=True) == 1


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="processes = 9 is not allowed.*at most 8"):
        config(processes=9)
    monkeypatch.setattr(workers, "choose_device", lambda *_: __import__("torch").device("cuda", 0))
    with pytest.raises(ValueError, match="processes = 2 is for device = 'cpu'"):
        workers.count(config(processes=2), automatic=True)
    assert workers.count(config(), automatic=True) == 1


def test_what_each_returns_and_who_was_killed(tmp_path):
    def work(worker):
        (tmp_path / str(worker.rank)).write_text(f"{worker.size} {os.getpid()}")
        if worker.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        while not all((tmp_path / str(rank)).exists() for rank in range(3)):
            pass
        if worker.rank == 0 and failing:
            raise ConnectionError("somebody is gone")
        return worker.rank

    failing = False
    assert workers.run(3, work) == 0
    assert [(tmp_path / str(rank)).read_text()[:2] for rank in range(3)] == ["3 "] * 3
    failing = True
    with pytest.raises(ConnectionError, match="^somebody is gone; process 2 was killed by SIGKILL$"):
        workers.run(3, work)
    for rank in (1, 2):
        assert waited_for(int((tmp_path / str(rank)).read_text()[2:]))


def waited_for(pid: int) -> bool:
    """Not of any child: a server of other tests' processes may be one."""
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return True


def test_a_pipe_that_nobody_reads_is_no_lost_process():
    def work(worker):
        if worker.rank == 0:
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        workers.run(2, work)


def test_who_does_not_leave_is_killed(monkeypatch):
    def work(worker):
        if worker.rank == 0:
            return os.read(reader, 20)
        os.write(writer, str(os.getpid()).encode())
        signal.pause()

    reader, writer = os.pipe()
    monkeypatch.setattr(workers, "GRACE", 0.2)
    assert waited_for(int(workers.run(2, work)))


@pytest.mark.long
def test_weights_of_a_graph_do_not_depend_on_the_cores_either():
    """numpy's linear algebra has threads of its own; by default the command gives it one."""
    code = ("import os, sys; from dfl.cli import main; assert 'numpy' not in sys.modules; main(['train', '--dry-run']); "
            "print('threads', os.environ['OPENBLAS_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])")
    for given, found in ((None, "1 1"), ("3", "3 3")):
        env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        env |= {"OMP_NUM_THREADS": given} if given else {}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"threads {found}"


def test_teams_are_started_whole():
    assert workers.count(config(processes=4, processes_per_peer=2), automatic=True) == 4
    assert workers.count(config(processes_per_peer=2), automatic=True, cores=5) == 4
    assert workers.count(config(processes_per_peer=2), automatic=True, cores=1) == 2
    assert workers.count(config(processes_per_peer=3), automatic=False, cores=8) == 3
    with pytest.raises(ValueError, match="processes = 3 is no multiple of processes_per_peer = 2"):
        workers.count(config(processes=3, processes_per_peer=2), automatic=True)
