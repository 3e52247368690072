"""Processes of a run whose disk is slow or fails, and whose clock jumps: forks of a server that has torch loaded, and
tests/trouble.c before all other libraries."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import members

_WRONG = struct.Struct("<qqq4072s")
SOURCE = Path(__file__).with_suffix(".c")


def missing() -> str | None:
    """Why this cannot be done here, or None."""
    if shutil.which("cc") is None or not sys.platform.startswith("linux"):
        return "needs Linux and a C compiler (cc); on Debian: apt-get install gcc libc6-dev"
    return None


class Server:
    """`folder`: for the library. None of its processes outlives the `with`."""

    def __init__(self, folder: Path):
        library = folder / "trouble.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"], check=True)
        env = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen([sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True)

    def fork(self, tree: dict, env: dict[str, str], log: Path, resume: bool, wrong: Path) -> int:
        """The id of a process at work on a run, which says on its log what it says, and in the end its status."""
        job = {"tree": tree, "env": env, "log": str(log), "resume": resume, "wrong": str(wrong)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(20)


class Wrong:
    """What is wrong for one process: its wall clock is `clock` seconds off; in `folder` a write takes `slow` seconds and,
    where `error` is not 0, fails with it."""

    def __init__(self, path: Path, folder: Path):
        self.path, self.folder = path, folder
        self.path.write_bytes(bytes(_WRONG.size))
        self.now()

    def now(self, clock: int = 0, slow: float = 0.0, error: int = 0) -> None:
        with self.path.open("r+b") as file:  # it is mapped, and stays the same file
            file.write(_WRONG.pack(clock, int(1000 * slow), error, str(self.folder).encode()))


class Troubled(members.Group):
    """A group, each of whose processes has something of its own `wrong`, which may change at any time."""

    def __init__(self, folder: Path, words: list[str], size: int, server: Server):
        super().__init__(folder, words, size)
        self.server, self.pids = server, {}
        self.wrong = [Wrong(folder / f"wrong-{k}", self.output(k)) for k in range(size)]

    def start(self, process: int, resume: bool = False, **more: str) -> None:
        env = self.env_of(process) | more
        self.pids[process] = self.server.fork(self.tree, env, self.log_of(process), resume, self.wrong[process].path)

    def kill(self, process: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[process], number)

    def running(self, process: int) -> bool:
        return Path(f"/proc/{self.pids[process]}").exists()

    def wait(self, process: int, seconds: float = 90.0) -> int:
        until = time.monotonic() + seconds
        while self.running(process):
            assert time.monotonic() < until, f"process {process} goes on:\n{self.everything()}"
            time.sleep(0.02)
        return int(self.said(process).rpartition("status ")[2])

    def __exit__(self, *_) -> None:
        for process in self.pids:
            with contextlib.suppress(ProcessLookupError):
                self.kill(process)


class Together(Troubled):
    """Of a run that is lost with any of its processes: one folder of all."""

    def output(self, process: int) -> Path:
        return Path(self.tree["output"])

    def env_of(self, process: int) -> dict[str, str]:
        return {"RANK": str(process), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(process), "LOCAL_WORLD_SIZE": str(self.size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.ports[0])}


def _serve() -> None:
    """A process for each line, until there are no more."""
    import dfl.run.train  # noqa: F401
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    started = []
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where the parent tells its numbers
            assert ctypes.CDLL(None).trouble_use(job["wrong"].encode()) == 0
            members._work(job["tree"], job["env"], job["log"], job["resume"])
        started.append(child)
        print(child, flush=True)
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
