"""Cells one after the other or several at a time, within a budget, and resumable: what is done is skipped, what was
stopped goes on.

A cell that is done is one file, written whole. One runner works in a folder at a time.
"""

import fcntl
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from evidence.cells import Children, StoppedError, execute
from evidence.grid import Cell, plan


def stored(out: Path) -> dict[str, dict]:
    """The cells that are done, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))}


def keep(out: Path, name: str, cell: dict) -> None:
    folder = out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    torn = folder / f".{name}.part"
    torn.write_text(json.dumps(cell, indent=1) + "\n")
    torn.replace(folder / f"{name}.json")


def ready(found: dict[str, dict], phases: tuple[str, ...], only: str) -> list[Cell]:
    """The cells that can be begun now, in order, each once."""
    cells = {cell.name: cell for cell in plan(found, phases) if re.search(only, cell.name)}
    return [cell for name, cell in cells.items() if name not in found]


def run(out: Path, jobs: int, budget: float | None, phases: tuple[str, ...], only: str,
        work: Callable[[Cell, Path, Children], dict] = execute) -> int:
    """Begin cells until none is left, the budget (seconds) is used up, or a signal comes; the exit status.

    At the end of the budget the runs at work are told to stop; they save their state, and the next call goes on with
    them. A cell that fails is named and left out of this call. 0: all is done; 1: something failed; 75: stopped before
    the end.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another runner is at work in {out}") from None
        children, deadline = Children(), None if budget is None else time.monotonic() + budget
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, lambda *_: children.stop()) for number in signals}
        try:
            return _run(out, jobs, deadline, phases, only, children, work)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _run(out, jobs, deadline, phases, only, children, work) -> int:
    running: dict[Future, Cell] = {}
    failed: set[str] = set()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            taken = {cell.name for cell in running.values()} | failed
            todo = [] if children.stopped else ready(stored(out), phases, only)
            todo = [cell for cell in todo if cell.name not in taken]
            for cell in todo[:jobs - len(running)]:
                print(f"{_now()} begins {cell.name}", flush=True)
                running[pool.submit(work, cell, out, children)] = cell
            if not running:
                break
            done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                _finish(out, running.pop(future), future, failed)
            if deadline is not None and time.monotonic() > deadline and not children.stopped:
                children.stop()
    return 1 if failed else 75 if children.stopped else 0


def _finish(out: Path, cell: Cell, future: Future, failed: set[str]) -> None:
    try:
        found = future.result()
    except StoppedError:
        print(f"{_now()} stopped {cell.name}", flush=True)
        failed.discard(cell.name)
        return
    except Exception as error:
        failed.add(cell.name)
        print(f"{_now()} FAILED {cell.name}: {error}", file=sys.stderr, flush=True)
        return
    keep(out, cell.name, found)
    said = found.get("test") or found.get("final") or {"mean": 0.0}
    print(f"{_now()} done {cell.name}: {100 * said['mean']:.1f}", flush=True)


def _now() -> str:
    return time.strftime("%H:%M:%S", time.gmtime())


def check_data() -> None:
    """SystemExit where the data are not there."""
    folder = os.environ.get("DFL_DATA")
    if not folder or not (Path(folder) / "trec6" / "train.tsv").is_file():
        raise SystemExit("set DFL_DATA to the folder with trec6/, sst2/ and minilm-l6-fp16/, which the heads of "
                         "launch/recipes describe")
