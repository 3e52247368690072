"""Processes that stop, die or fail in the middle of a run: the others name them in time, and nothing hangs."""

import os
import signal
import time

import pytest
import torch
from processes import distributed, ring_exchange, run_processes

from dfl.transport import Distributed, notes

pytestmark = [pytest.mark.distributed, pytest.mark.clock]
PATIENCE = 1.0


def step(transport: Distributed, phase: str, rank: int) -> None:
    if phase == "exchange":
        ring_exchange(transport, 4, rank)
    elif phase == "agreement":
        transport.agree(1)
    else:
        transport.total(torch.zeros(1, 3))


def worker(rank: int, phase: str, victim: int, number: int) -> tuple[str, float, bool]:
    """What a process says when `victim` gets a signal before a step; how long that took; whether it could leave."""
    notes.GRACE = 0.5
    transport = distributed(3, timeout=PATIENCE)
    transport.introduce(f"host{rank}")
    for name in ("exchange", "agreement", "sum over peers"):
        step(transport, name, rank)
    transport.round = 4
    if rank == victim:
        os.kill(os.getpid(), number)
    started = time.monotonic()
    try:
        step(transport, phase, rank)
    except ConnectionError as error:
        noticed = time.monotonic() - started
        transport.leave(error)
        return str(error), noticed, transport.link.group.open
    return "nothing was noticed", 0.0, True


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", ["exchange", "agreement", "sum over peers"])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_all_others_name_the_process_that_is_silent_or_dead(phase, victim, number):
    results = run_processes(worker, 3, phase, victim, number, lost=[victim])
    how = "said nothing for" if number == signal.SIGSTOP else "is gone: its connection closed after"
    for rank, result in enumerate(results):
        if rank == victim:
            assert result is None
            continue
        said, seconds, still_in_a_group = result
        assert said.startswith(f"process {victim} (peer {victim}, host host{victim}) {how}"), results
        assert "in round 5 (" in said and not still_in_a_group
        assert seconds < PATIENCE + 3  # the others' notes are looked for


def failing_worker(rank: int, culprit: int, error: Exception) -> str:
    """One process has an error of its own, and leaves; the rest find out in the next step."""
    transport = distributed(3, timeout=30)
    transport.introduce(f"host{rank}")
    transport.round = 2
    started = time.monotonic()
    try:
        if rank == culprit:
            raise error
        transport.agree(0)
    except (OSError, ValueError) as failure:
        transport.leave(failure)
        assert time.monotonic() - started < 10
        return f"{type(failure).__name__}: {failure}"
    return "nothing was noticed"


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize("error, kind", [(OSError(28, "No space left on device", "run/metrics.jsonl"), "ConnectionError"),
                                         (ValueError("lr = -1 is not allowed"), "ValueError")])
def test_an_error_of_one_process_is_told_to_the_others(culprit, error, kind):
    results = run_processes(failing_worker, 3, culprit, error)
    for rank, said in enumerate(results):
        if rank != culprit:
            assert said == f"{kind}: process {culprit} (peer {culprit}, host host{culprit}) stopped in round 3: {error}"
        else:
            assert said == f"{type(error).__name__}: {error}"
