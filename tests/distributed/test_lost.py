"""Processes that stop, die or fail in the middle of a run: the others name them in time, and nothing hangs."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ports import free_ports
from processes import distributed, ring_exchange, run_processes

from dfl.transport import Distributed, notes
from dfl.transport.group import Group

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
    transport = distributed(3, timeout=30)
    transport.introduce(f"host{rank}")
    for name in ("exchange", "agreement", "sum over peers"):
        step(transport, name, rank)
    transport.round, transport.link.timeout = 4, PATIENCE
    dist.barrier()  # from here on who is late counts as silent
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


def late_worker(rank: int, port: int) -> str:
    """Process 1 has an error, process 0 holds the store and notices at once, process 2 is busy for longer than notes are awaited."""
    store = dist.TCPStore("127.0.0.1", port, 3, rank == 0, wait_for_workers=False)
    transport = Distributed(3, Group(store, rank, 3, timeout=30), device=torch.device("cpu"), timeout=30)
    transport.introduce(f"host{rank}")
    transport.round = 2
    try:
        if rank == 1:
            raise OSError(28, "No space left on device", "run/metrics.jsonl")
        time.sleep(0 if rank == 0 else 2 * notes.GRACE)
        transport.agree(0)
    except OSError as failure:
        began = time.monotonic()
        transport.leave(failure)
        del transport, store
        return f"{failure} / {time.monotonic() - began:.1f}"
    return "nothing was noticed"


def test_who_comes_late_still_reads_why_from_the_process_that_holds_the_store():
    said = [text.split(" / ") for text in run_processes(late_worker, 3, free_ports(1)[0])]
    assert said[2][0] == said[0][0] == f"process 1 (peer 1, host host1) stopped in round 3: {said[1][0]}"
    assert notes.GRACE < float(said[0][1]) < notes.LINGER - 2 and float(said[2][1]) < 1  # and nobody waits for longer
