"""Runs parts one after the other, each in a fork with a time limit, and stamps after each what is known by then.

The forks inherit imports, which take most of the time of a short part. This process never asks for a GPU: a fork of one that has
could not use it.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.setting import Missing, PartError, Setting

_POLL_SECONDS = 0.02
_TAIL = 3000  # characters of what a failed part wrote
_MISSING = 77


class Part(NamedTuple):
    """run(setting) says what it finds; `limit`: seconds after which it is ended."""

    name: str
    limit: float
    run: Callable[[Setting], None]


class Report:
    """The result file, written anew after every part: command, versions and hardware, then what each part said."""

    def __init__(self, path: Path, command: str):
        self.path = path
        self.tree: dict[str, Any] = {"command": command, "finished": False, "parts": {}}

    def about(self, facts: dict[str, Any]) -> None:
        self.tree = {"command": self.tree["command"], **facts, **{key: self.tree[key] for key in ("finished", "parts")}}

    def add(self, name: str, entry: dict[str, Any]) -> None:
        self.tree["parts"][name] = entry
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        other = self.path.with_suffix(".tmp")
        other.write_text(json.dumps(self.tree, indent=1) + "\n")
        other.replace(self.path)


def run_parts(parts: Sequence[Part], setting: Setting, report: Report, seconds: float) -> int:
    """0 when no part failed. `seconds`: of all together; a part that begins late gets what is left."""
    began = time.monotonic()
    for part in parts:
        left = seconds - (time.monotonic() - began)
        if left < 1:
            report.add(part.name, {"outcome": "not begun", "why": f"all {seconds:.0f} s were used"})
            continue
        print(f"{part.name} (up to {min(part.limit, left):.0f} s)", flush=True)
        entry = run_part(part, setting, min(part.limit, left))
        print(f"  {entry['outcome']} after {entry['seconds']} s{': ' + entry['why'] if 'why' in entry else ''}", flush=True)
        if part.name == "versions" and "about" in entry["found"]:
            setting.facts = entry["found"].pop("about")
            report.about(setting.facts)
        report.add(part.name, entry)
    report.tree |= {"finished": True, "seconds": round(time.monotonic() - began, 1)}
    report.write()
    return closing(report)


def closing(report: Report) -> int:
    """Says what failed, and where the figures are."""
    parts = report.tree["parts"]
    bad = [name for name, entry in parts.items() if entry["outcome"] not in ("done", "left out")]
    done = sum(entry["outcome"] == "done" for entry in parts.values())
    print(f"{done} of {len(parts)} parts done in {report.tree['seconds']} s; written: {report.path}")
    for name in bad:
        print(f"{name}: {parts[name]['outcome']}: {parts[name].get('why', '')}")
    return 1 if bad else 0


def run_part(part: Part, setting: Setting, limit: float) -> dict[str, Any]:
    """What it said, and how it ended: done, left out, failed, ended at its time limit, or by a signal."""
    if torch.cuda.is_initialized():
        raise RuntimeError("something that was imported has asked for a GPU already, which no fork could use then")
    setting.said, log = setting.folder / f"{part.name}.jsonl", setting.folder / f"{part.name}.log"
    setting.said.touch()
    started = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _live(part, setting, log)
    status = _wait(child, started + limit)
    seconds = round(time.monotonic() - started, 2)
    _end_group(child)
    found = {key: value for line in setting.said.read_text().splitlines() for key, value in json.loads(line).items()}
    return {**_outcome(status, log, limit), "seconds": seconds, "found": found}


def _outcome(status: int | None, log: Path, limit: float) -> dict[str, str]:
    tail = log.read_text(errors="replace")[-_TAIL:] if log.exists() else ""
    last = tail.strip().splitlines()[-1] if tail.strip() else "nothing was written"
    if status == 0:
        return {"outcome": "done"}
    if status == _MISSING:
        return {"outcome": "left out", "why": last}
    if status is None:
        return {"outcome": "time limit", "why": f"ended after {limit:.0f} s", "log": tail}
    if status < 0:
        return {"outcome": "failed", "why": f"killed by {signal.Signals(-status).name}", "log": tail}
    return {"outcome": "failed", "why": last, "log": tail}


def _wait(child: int, until: float) -> int | None:
    """The exit status, negative for a signal; None where there is none by then."""
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_SECONDS)
    _end_group(child)
    os.waitpid(child, 0)
    return None


def _end_group(child: int) -> None:
    """The part and the processes that it started, which are a group of their own."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _live(part: Part, setting: Setting, log: Path) -> None:
    """The life of a fork: it never returns into the runner."""
    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        part.run(setting)
        if setting.failed:
            raise PartError(f"not as it should be: {', '.join(setting.failed)}")
        status = 0
    except Missing as why:
        print(why, flush=True)
        status = _MISSING
    except PartError as error:
        print(error, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
