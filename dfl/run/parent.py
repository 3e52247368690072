"""Processes that end with the one that started them, so that nobody goes on writing when a launcher was killed.

A launcher that gets SIGKILL cannot stop its workers. They would go on beside their successors, on the same folder and devices.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

# how often a system that does not tell us is asked
POLL_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1


def end_with_launcher(env: Mapping[str, str] = os.environ) -> None:
    """For a worker of torchrun: end with its agent. A process of a shell, of nohup or of srun is left as it is."""
    if "TORCHELASTIC_RUN_ID" in env:
        end_with(os.getppid())


def end_with(parent: int) -> None:
    """From now on SIGKILL ends this process when `parent`, the process that started it, has gone; at once if it has already.

    SIGKILL and no handler of our own: a process that waits inside a library would not run it. What is on the disk is whole at any
    moment. On Linux the kernel sends it, when the thread that started us ends, so start workers in a thread that stays.
    """
    told = sys.platform == "linux" and _ask_kernel()
    if os.getppid() != parent or (parent == 1 and not _init_is_launcher()):  # it went before we had asked
        _leave()
    if not told:
        threading.Thread(target=_watch, args=(parent,), name="dfl-parent", daemon=True).start()


def _ask_kernel() -> bool:
    try:
        return ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def _init_is_launcher(cmdline: Path = Path("/proc/1/cmdline")) -> bool:
    """In a container the launcher may be process 1; elsewhere that is who adopts orphans. Without /proc it counts as the launcher."""
    try:
        program = cmdline.read_bytes().partition(b"\0")[0].rpartition(b"/")[2]
    except OSError:
        return True
    return b"python" in program or b"torchrun" in program


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    _leave()


def _leave() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
