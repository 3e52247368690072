"""Processes that start find each other, whatever an earlier start has left in the store."""

import socket
import threading
import time

import pytest
import torch.distributed as dist

from dfl.transport.meeting import meet, reach


def start(store, size: int, ranks=None, patience: float = 20.0) -> list:
    """What each of `ranks` gets, or its error."""
    found = {}

    def run(rank):
        try:
            found[rank] = meet(store, rank, size, patience)
        except ConnectionError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (range(size) if ranks is None else ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in sorted(found)]


def test_all_of_a_start_get_one_name_and_the_next_start_another():
    store, names = dist.HashStore(), []
    for _ in range(5):
        got = start(store, 4)
        assert len(set(got)) == 1 and isinstance(got[0], str)
        names.append(got[0])
    assert len(set(names)) == 5


@pytest.mark.parametrize("came", [[1, 2], [0, 2], [0]])
def test_a_start_that_failed_does_not_disturb_the_next(came):
    """Words, answers and confirmations of those that came are left behind."""
    store = dist.HashStore()
    said = start(store, 3, came, patience=0.2)
    missing = "process 0" if 0 not in came else f"process {', '.join(str(rank) for rank in range(3) if rank not in came)}"
    assert any(str(error).startswith(f"{missing} did not come within 0 s") for error in said)
    got = start(store, 3)
    assert len(set(got)) == 1 and isinstance(got[0], str) and got[0] not in said


def test_nobody_at_the_address_is_a_line_and_a_late_listener_is_found():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match="process 0 did not come within 0 s"):
            reach(listener.getsockname(), 0.3)
        threading.Thread(target=lambda: (time.sleep(0.3), listener.listen())).start()
        reach(listener.getsockname(), 20.0)
