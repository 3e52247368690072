"""The processes that a plain `dfl train` starts itself: the hosted peers spread over the cores of a machine, with the same bits.

For CPUs only. torchrun and srun start processes of their own, one a GPU for instance, and nothing is started then. The processes are
forks of the command, which is process 0: console, exit status and signals are those of one process. They meet in a file without a
name, not at a port, and end with the command, however it ends.
"""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dfl.config import Config
from dfl.run.callbacks import CallbackError
from dfl.run.parent import end_with
from dfl.run.runtime import Worker, choose_device, launched, num_cores, num_threads, place_from_environment
from dfl.tasks.models import weight_bytes

Result = TypeVar("Result")
# seconds in which the others leave by themselves when one has failed
GRACE = 10.0
# bytes of a process without a model: Python, torch, transformers, the examples
PLAIN_BYTES = 700 * 2**20
# what a process needs for its model, in bytes per byte of the files: twice the numbers (float32 of bfloat16), and what a step adds
MODEL_FACTOR = 4
# the part of the free memory that processes may be started into
MEMORY_SHARE = 0.7


def count(config: Config, *, automatic: bool, cores: int | None = None) -> int:
    """How many processes a plain start has: `processes` of the recipe, else one for each core and peer that memory allows.

    automatic: False leaves a recipe that does not say alone in this process. ValueError where `processes` cannot be.
    """
    if launched():
        return 1
    each = config.processes_per_peer
    if config.processes is not None:
        return _checked(config)
    if each > 1:  # also where nobody asks for several: fewer make no team
        teams = min((cores or num_cores()) // (each * num_threads(config)), config.peers) if automatic else 1
        return _checked(config, each * max(1, teams))
    if not automatic or not sys.platform.startswith("linux") or choose_device(config, place_from_environment()).type != "cpu":
        return 1
    size = weight_bytes(config.model)
    if size is None:  # a model that has yet to be downloaded: nobody knows how large it is
        return 1
    fit = int(MEMORY_SHARE * free_memory() / (PLAIN_BYTES + MODEL_FACTOR * size))
    return max(1, min((cores or num_cores()) // num_threads(config), config.peers, fit))


def _checked(config: Config, number: int | None = None) -> int:
    what, number = ("processes", config.processes) if number is None else ("processes_per_peer", number)
    if number % config.processes_per_peer:
        raise ValueError(f"processes = {number} is no multiple of processes_per_peer = {config.processes_per_peer}; allowed: one that "
                         "is, or null")
    if number > 1 and choose_device(config, place_from_environment()).type != "cpu":
        raise ValueError(f"{what} = {getattr(config, what)} is for device = 'cpu'; "
                         "allowed on a GPU: 1, or torchrun with a process for each GPU")
    if number > 1 and not hasattr(os, "fork"):
        raise ValueError(f"{what} = {getattr(config, what)}: this system cannot fork; allowed: 1, or torchrun")
    return number


def free_memory() -> float:
    """Bytes that may still be used: of the machine, or of the control group of a job; infinite where nobody says."""
    found = [float("inf")]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * float(lines["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2].lstrip("/")
        found.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    except (OSError, ValueError, IndexError):  # no limit ("max"), or another layout
        pass
    return min(found)


def run(num: int, work: Callable[[Worker | None], Result]) -> Result:
    """`work` in `num` processes at once: what this one, process 0, returns. None of the others outlives the call.

    Each is given its place. ConnectionError also says which of them was killed.
    """
    if num == 1:
        return work(None)
    with _meeting_file() as path:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # what is buffered would be written by each of them
        parent, children = os.getpid(), {}
        try:
            for rank in range(1, num):
                child = os.fork()
                if child == 0:
                    _work(work, Worker(rank, num, path), parent)
                children[child] = rank
            return work(Worker(0, num, path))
        except BrokenPipeError:  # nobody reads what this process prints; not a lost process
            raise
        except ConnectionError as error:
            killed = [f"process {rank} was killed by {signal.Signals(-status).name}"
                      for rank, status in sorted(reap(children).items()) if status < 0]
            raise ConnectionError("; ".join([str(error), *killed])) from error
        finally:
            reap(children)


@contextmanager
def _meeting_file():
    """A path that the forks of this process can open: a file in memory, which ends with this process, or a temporary one."""
    if hasattr(os, "memfd_create"):
        # it stays open: a store that lives on, in a traceback or a circle, opens its file once more when it goes, and one that
        # cannot ends the process there
        yield f"/proc/self/fd/{os.memfd_create('dfl')}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield f"{folder}/store"


def _work(work: Callable[[Worker], object], worker: Worker, parent: int) -> None:
    """The life of a fork; it never returns into what the command was doing.

    What it fails of it has told process 0, which says it; only what nobody expected it says itself.
    """
    status = 1
    try:
        end_with(parent)
        work(worker)
        status = 0
    except (ValueError, OSError, FloatingPointError, CallbackError):
        if os.environ.get("DFL_TRACEBACK") == "1":
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def reap(children: dict[int, int]) -> dict[int, int]:
    """Wait until all children {process id: rank} have ended, and empty the dictionary: {rank: exit status, or minus the signal}.

    Who is still there after GRACE seconds is killed, and is not among what is returned.
    """
    ended, until = {}, time.monotonic() + GRACE
    while children and time.monotonic() < until:
        for child in list(children):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[children.pop(child)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01 if children else 0)
    for child in list(children):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        del children[child]
    return ended
