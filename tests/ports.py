"""Ports for the processes of a test, which are told them first and open them later."""

import fcntl
import itertools
import os
import socket
import tempfile
from pathlib import Path

# below those that a system gives to whoever asks for any port or connects, and above those at which steps of Slurm meet
FIRST, END, EACH = 30000, 32768, 64
_mine: list = []  # the lock of this process's ports, and an endless iterator over them


def free_ports(number: int) -> list[int]:
    """Nobody listens at them, and nobody is given them meanwhile: neither by the system nor by this function in another process."""
    if not _mine:
        lock, first = _locked()
        _mine.extend([lock, itertools.cycle(range(first, first + EACH))])
    asked = itertools.islice(_mine[1], EACH)
    return list(itertools.islice(filter(_is_free, asked), number))


def _locked():
    folder = Path(tempfile.gettempdir(), f"dfl-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for first in range(FIRST, END - EACH, EACH):
        lock = (folder / str(first)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock, first
        except BlockingIOError:
            lock.close()
    raise RuntimeError(f"all ports from {FIRST} are taken: {folder}")


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True
