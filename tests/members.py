"""Processes of a run with `membership: survive`, each started by itself as a service manager would, on one machine."""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from ports import free_ports
from processes import begin
from tiny_runs import train_worker

from dfl import config as configuration
from dfl.config.recipes import parse_overrides


def tree_of(words: list[str]) -> dict:
    return configuration.resolve({}, parse_overrides(words)).to_dict()


def _work(tree: dict, env: dict[str, str], log: str, resume: bool) -> None:
    import torch
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        if 'DFL_DUMP' in os.environ:
            import faulthandler
            faulthandler.dump_traceback_later(float(os.environ['DFL_DUMP']), file=file)
        status = 1
        try:
            status = train_worker(0, tree, resume)
        except SystemExit as error:
            status = error.code
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"dfl: {error}", file=file, flush=True)
        except BaseException:
            traceback.print_exc(file=file)
        finally:
            print(f"status {status}", file=file, flush=True)
    os._exit(status)


class Group:
    """`size` processes of a run; `with` it, and none outlives it."""

    def __init__(self, folder: Path, words: list[str], size: int, env: dict[str, str] | None = None):
        self.folder, self.tree, self.size, self.env = folder, tree_of(words), size, env or {}
        self.ports, self.workers = free_ports(size), {}

    def start(self, process: int, resume: bool = False, work=_work, **more: str) -> None:
        self.workers[process] = begin(work, self.tree, self.env_of(process) | more, str(self.log_of(process)), resume)

    def env_of(self, process: int) -> dict[str, str]:
        others = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return {"DFL_PROCESS": f"{process}/{self.size}", "DFL_MEMBERS": others,
                "DFL_LISTEN": f"127.0.0.1:{self.ports[process]}", **self.env}

    def log_of(self, process: int) -> Path:
        return self.folder / f"log-{process}.txt"

    def said(self, process: int) -> str:
        return self.log_of(process).read_text()

    def output(self, process: int) -> Path:
        return Path(self.tree["output"]) / f"process-{process}"

    def lines(self, process: int) -> list[dict]:
        path = self.output(process) / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def until_round(self, process: int, rounds: int, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not any(line["round"] >= rounds for line in self.lines(process)):
            assert time.monotonic() < until, f"process {process} did not come to round {rounds}:\n{self.everything()}"
            time.sleep(0.01)

    def everything(self) -> str:
        return "\n".join(f"--- {k}\n{self.said(k)}" for k in range(self.size) if self.log_of(k).exists())

    def kill(self, process: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.workers[process].pid, number)

    def wait(self, process: int, seconds: float = 90.0) -> int:
        self.workers[process].join(seconds)
        assert self.workers[process].exitcode is not None, f"process {process} goes on:\n{self.everything()}"
        return self.workers[process].exitcode

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_) -> None:
        for worker in self.workers.values():
            if worker.is_alive():
                worker.kill()
            worker.join(5)
