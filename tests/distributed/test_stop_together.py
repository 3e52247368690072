"""A signal to one of several processes: all stop within a step, also those that wait, and any number of processes goes on."""

import os
import signal
import time

import pytest
import torch
from processes import distributed, ring_exchange, run_alone, run_processes
from tiny_runs import adapter_digests, lasting, make_config, make_folder

from dfl import config as configuration
from dfl.metrics.evaluator import Evaluator
from dfl.run import train as running
from dfl.store.records import read_lines
from dfl.training.phase import ModelTrainer
from dfl.transport import watch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("stop"))


def tree(root, output, **fields) -> dict:
    fields = {"method": "{name: tad, T: 2}", "train__state": "carried", "train__rounds": 2, "train__local_steps": 4, "peers": 5,
              "lora__dropout": 0.2, "timeout": 60} | fields
    return make_config(root / "bert", root / "data.csv", output, **fields).to_dict()


def stopped_worker(rank: int, tree: dict, asked: int, step_seconds: list[float], where: str) -> tuple[int, float]:
    """`dfl train` with steps of so many seconds a process, or long evaluations; `asked` gets a signal in one. Status, and seconds
    from the signal."""
    step, sums, sent = ModelTrainer._step, Evaluator.sums, []

    def slow(self, *args):
        if rank == asked and not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(step_seconds[rank])
        return step(self, *args)

    def slow_sums(self, rows, executor, halted):
        if len(rows.x) > 1 and rank == asked and not sent:
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(3000):  # batches
            time.sleep(0.01)
            if halted():
                break
        return sums(self, rows, executor, halted)

    if where == "steps":
        ModelTrainer._step = slow
    else:
        Evaluator.sums = slow_sums
    started = time.monotonic()
    status = running.train(configuration.from_dict(tree))
    return status, time.monotonic() - (sent[0] if sent else started)


def resumed(tree: dict) -> int:
    return running.train(configuration.from_dict(tree), resume=True)


def resumed_worker(rank: int, tree: dict) -> int:
    return resumed(tree)


@pytest.fixture(scope="module")
def straight(root):
    assert run_alone(resumed, tree(root, root / "straight")) == 0
    return root / "straight"


def goes_on(tree: dict, num: int, straight) -> None:
    if num == 1:
        assert run_alone(resumed, tree) == 0
    else:
        assert run_processes(resumed_worker, num, tree) == [0] * num
    output = type(straight)(tree["output"])
    assert adapter_digests(output) == adapter_digests(straight)
    one, two = (read_lines(run / "metrics.jsonl") for run in (output, straight))
    assert list(map(lasting, one)) == list(map(lasting, two))


@pytest.mark.parametrize("asked, num", [(0, 1), (2, 2)])
def test_within_a_step_also_where_another_has_long_ones(root, tmp_path, straight, asked, num):
    """Process 1 would need forty seconds for its round; the one that is asked would be done soon, and wait for it."""
    given = tree(root, tmp_path / "run")
    results = run_processes(stopped_worker, 3, given, asked, [0.5, 5.0, 0.5], "steps")
    assert [status for status, _ in results] == [75] * 3 and results[asked][1] < 12, results
    assert (tmp_path / "run" / "checkpoints" / "round-00000").is_dir()
    goes_on(given, num, straight)


def test_in_an_evaluation_of_one_and_gone_on_with_by_another_number(root, tmp_path, straight):
    given = tree(root, tmp_path / "run")
    results = run_processes(stopped_worker, 2, given, 1, [0, 0], "evaluation", timeout=120)
    assert [status for status, _ in results] == [75] * 2 and results[1][1] < 8, results
    goes_on(given, 3, straight)




def silent_worker(rank: int, victim: int, busy: float) -> tuple[str, float]:
    """One process is stopped, or computes for `busy` seconds, while two wait for it, who would wait for ten minutes."""
    watch.SILENT_SECONDS, watch.BEAT_SECONDS = 3.0, 0.5
    transport = distributed(3, timeout=600)
    transport.introduce(f"host{rank}")
    transport.watch(lambda: False)
    transport.round = 4
    transport.agree(0)
    time.sleep(1)
    started = time.monotonic()
    if rank == victim and not busy:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == victim:
        until = time.monotonic() + busy
        while time.monotonic() < until:
            torch.ones(100, 100) @ torch.ones(100, 100)
    try:
        ring_exchange(transport, 4, rank)
        transport.agree(0)
    except ConnectionError as error:
        seconds = time.monotonic() - started
        transport.leave(error)
        return str(error), seconds
    transport.close()
    return "all came", time.monotonic() - started


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_found_long_before_the_timeout(victim):
    results = run_processes(silent_worker, 3, victim, 0.0, lost=[victim])
    for said, seconds in (result for rank, result in enumerate(results) if rank != victim):
        assert said.startswith(f"process {victim} (peer {victim}, host host{victim}) has shown no life for "), said
        assert "in round 5" in said and seconds < 15


def test_a_busy_process_is_waited_for():
    assert [said for said, _ in run_processes(silent_worker, 3, 1, 8.0)] == ["all came"] * 3
