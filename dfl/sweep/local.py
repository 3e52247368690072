"""The runs of a sweep on this machine: each in a python process (or under torchrun), some at a time."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm import tqdm

from dfl.run import workers
from dfl.run.runtime import num_cores, place_from_environment
from dfl.run.train import STOPPED, train
from dfl.store.sweeps import SweepRun
from dfl.sweep.grid import Sweep
from dfl.sweep.manifest import note_failure, write, write_recipe

# seconds that torchrun leaves its processes to finish a round after a signal, where the environment does not say
_GRACE = "600"
_REFUSED = 2  # the exit status of what will not work a second time either


class Resources(NamedTuple):
    """How many runs at a time, processes in each (None: each spreads over its share of the cores itself), and how often a failed one
    is tried again."""

    jobs: int = 1
    processes: int | None = None
    retries: int = 1

    def check(self) -> None:
        for name, least in (("jobs", 1), ("processes", 1), ("retries", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} is not allowed; allowed: a whole number from {least}")


class Attempt(NamedTuple):
    run: SweepRun
    number: int
    slot: int
    process: subprocess.Popen
    started: float
    log: BinaryIO
    offset: int  # where its output begins in the log


class Progress:
    """A bar with the time left on a terminal, and a line for everything that happens."""

    def __init__(self, total: int, done: int, stream=None):
        self.stream, self.total, self.done = stream or sys.stderr, total, done
        self.first, self.started = done, time.monotonic()
        self.bar = tqdm(total=total, initial=done, file=self.stream, unit="run", dynamic_ncols=True) if self.stream.isatty() else None

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def ended(self, text: str) -> None:
        """One run more will not be touched again."""
        self.done += 1
        left = (time.monotonic() - self.started) / (self.done - self.first) * (self.total - self.done)
        self.say(f"[{self.done}/{self.total}] {text}, left {tqdm.format_interval(left)}")
        if self.bar:
            self.bar.update()

    def close(self) -> None:
        if self.bar:
            self.bar.close()


class Runner:
    """Starts what is not finished, stops its processes when asked to, and says how everything ended."""

    def __init__(self, runs: list[SweepRun], resources: Resources, stream=None):
        resources.check()
        self.runs, self.resources = runs, resources
        todo = [run for run in runs if run.state != "finished"]
        self.waiting: deque[tuple[SweepRun, int, BinaryIO | None]] = deque((run, 1, None) for run in todo)
        self.active: list[Attempt] = []
        self.failed: dict[str, tuple[SweepRun, str]] = {}
        self.unfinished: list[str] = []
        self.stops, self.passed_on = 0, 0  # signals that came, and those that our processes have been sent
        self.slots = min(resources.jobs, max(1, len(todo)))
        self.cores = max(1, num_cores() // self.slots)
        self.devices = visible_devices()
        self.progress = Progress(len(runs), len(runs) - len(todo), stream)

    def run(self) -> int:
        """The exit status: 0 all finished, 1 some failed, 75 stopped or some are at work elsewhere."""
        if self.waiting:
            each = self.resources.processes or f"up to {self.cores}"
            self.progress.say(f"{len(self.runs)} runs, {self.progress.done} finished; {self.slots} at a time with "
                              f"{each} process(es) each; logs in {self.runs[0].log.parent}")
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            while self.active or (self.waiting and not self.stops):
                self._fill()
                self._pass_on()
                time.sleep(0.05)
                for attempt in [a for a in self.active if a.process.poll() is not None]:
                    self.active.remove(attempt)
                    self._ended(attempt)
        finally:
            for attempt in self.active:  # an error of our own: nothing is left at work behind our back
                attempt.process.send_signal(signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
            self.progress.close()
        self._conclude()
        return 1 if self.failed else STOPPED if self.stops or self.unfinished else 0

    def _stop(self, number, frame) -> None:
        self.stops += 1

    def _pass_on(self) -> None:
        """At the first signal the runs save and leave; a second one ends them at once.

        Not in the handler: it may come between the start of a process and our knowing it.
        """
        if self.stops == self.passed_on:
            return
        for attempt in self.active:
            if self.stops == 1:  # torchrun passes it on to its own
                attempt.process.send_signal(signal.SIGTERM)
            else:
                kill(attempt.process)
        self.passed_on = self.stops

    def _fill(self) -> None:
        while self.waiting and len(self.active) < self.slots and not self.stops:
            run, number, log = self.waiting.popleft()
            free = next(slot for slot in range(self.slots) if all(a.slot != slot for a in self.active))
            attempt = self._start(run, number, free, log)
            if attempt is None:
                self.unfinished.append(run.name)
                self.progress.say(f"{run.name}  is at work in another process")
            else:
                self.active.append(attempt)

    def _start(self, run: SweepRun, number: int, slot: int, log: BinaryIO | None) -> Attempt | None:
        """None when somebody else has the run. log: of its last attempt."""
        run.log.parent.mkdir(parents=True, exist_ok=True)
        write_recipe(run)
        command = command_of(run, self.resources.processes, self.cores)
        environment = os.environ | self._environment(slot)
        log = log or _locked(run.log)
        if log is None:
            return None
        note_failure(run, None)
        log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} attempt {number}: {' '.join(command)}\n".encode())
        log.flush()
        offset = log.seek(0, os.SEEK_END)
        # a session of its own: Ctrl-C in the terminal reaches us alone, and we pass it on once
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                   start_new_session=True)
        return Attempt(run, number, slot, process, time.monotonic(), log, offset)

    def _environment(self, slot: int) -> dict[str, str]:
        changed = {} if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ else {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": _GRACE}
        if self.devices and self.slots > 1:
            changed["CUDA_VISIBLE_DEVICES"] = ",".join(devices_of(slot, self.resources.processes or 1, self.devices))
        return changed

    def _ended(self, attempt: Attempt) -> None:
        run, status = attempt.run, attempt.process.returncode
        took = tqdm.format_interval(time.monotonic() - attempt.started)
        if status == 0:
            self.progress.ended(f"{run.name}  finished in {took}")
        elif self.stops or status == STOPPED:
            self.unfinished.append(run.name)
            self.progress.say(f"{run.name}  stopped after {took}")
        elif self._failed(attempt, first_error(run.log, attempt.offset, status), took):
            return  # its log is the next attempt's
        attempt.log.close()

    def _failed(self, attempt: Attempt, error: str, took: str) -> bool:
        """Whether it will be tried again."""
        run = attempt.run
        if attempt.number <= self.resources.retries and attempt.process.returncode != _REFUSED:
            self.waiting.append((run, attempt.number + 1, attempt.log))
            self.progress.say(f"{run.name}  failed after {took} and will be tried again: {error}")
            return True
        note_failure(run, error)
        self.failed[run.name] = run, error
        self.progress.ended(f"{run.name}  failed after {took}: {error}")
        return False

    def _conclude(self) -> None:
        if self.failed:
            self.progress.say(f"\n{len(self.failed)} of {len(self.runs)} runs failed:")
        for name, (run, error) in self.failed.items():
            self.progress.say(f"  {name}\n    {error}\n    {run.log}")
        left = len(self.waiting) + len(self.unfinished)
        if left:
            self.progress.say(f"{left} runs are not finished; the same command goes on where they stopped")
        elif not self.failed:
            folder = self.runs[0].output.parent
            self.progress.say(f"all {len(self.runs)} runs are finished; compare them: python -m dfl report {folder}")


def run_here(sweep: Sweep, runs: list[SweepRun], index: int) -> int:
    """One run in this process (under torchrun or srun, in all of them together); the exit status of `dfl train`."""
    run, first = runs[index], place_from_environment().rank == 0
    if first:
        write(sweep, runs)
    if run.state == "finished":
        if first:
            print(f"run {run.index} ({run.name}) is finished: {run.output}")
        return 0
    if first:
        note_failure(run, None)
    try:
        return train(run.config, resume=True, spread=True)
    except Exception as error:
        if first:
            note_failure(run, f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise


def _locked(path: Path) -> BinaryIO | None:
    """The log of a run, or None when somebody else has it: a lock on it is held until the run is not tried again, by us, and as long
    as one of its processes lives. A lock of each attempt's own would be refused while the one before is on its way out."""
    log = path.open("ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    except OSError:  # a file system without locks
        pass
    return log


def kill(process: subprocess.Popen) -> None:
    """End a process and its children, which torchrun starts in sessions of their own, at once."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = listed.read_text().split() if listed.exists() else []
    for pid in [process.pid, *map(int, children)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name for name in given.split(",") if name] if given is not None else [str(k) for k in range(torch.cuda.device_count())]


def devices_of(slot: int, processes: int, devices: list[str]) -> list[str]:
    """The GPUs of the run in a slot, one for each of its processes while they last; slots go around them."""
    return list(dict.fromkeys(devices[(slot * processes + k) % len(devices)] for k in range(processes)))


def command_of(run: SweepRun, processes: int | None, cores: int) -> list[str]:
    """`processes` under torchrun; one alone; None: those that the recipe says, else as many of its own as fit on `cores` cores."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if (processes or 1) > 1 else []
    chosen = []
    if not launcher and (processes or run.config.processes is None):
        chosen = ["--processes", str(processes or workers.count(run.config, automatic=True, cores=cores))]
    return [sys.executable, *launcher, "-m", "dfl", "train", str(run.recipe), "--resume", *chosen]


def first_error(log: Path, offset: int, status: int) -> str:
    """The first line of an attempt's output that says what went wrong."""
    with log.open("rb") as file:
        file.seek(offset)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    for pattern in (r"dfl: ", r"[\w.]+(Error|Exception)\b"):
        said = [line for line in lines if re.match(pattern, line)]
        if said:
            return said[0].removeprefix("dfl: ")
    if status < 0:
        return f"ended by signal {-status} ({signal.Signals(-status).name})"
    return f"exit status {status}" + (f": {lines[-1]}" if lines else "")
