"""One cell: `dfl train` on the task's recipe, the test file once at the end, and what is kept of both.

Everything heavy happens in processes of its own, so that a cell can be stopped (SIGTERM: the run saves its state) and
goes on at the same step when it is asked for again.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dfl.store.records import read_lines
from evidence.grid import Cell

ROOT = Path(__file__).parents[2]
STOPPED = 75  # the exit status of a run that a signal has ended, its state saved
# runs a module that ends with this process, however this one ends: two runners would meet in one run directory
BOUND = ("import os, runpy, sys; from dfl.run.parent import end_with; end_with(os.getppid()); del sys.argv[0]; "
         "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)")
TEST = {"trec6": "$DFL_DATA/trec6/test.tsv", "sst2": "$DFL_DATA/sst2/test.tsv"}
MEASURES = ("consensus_distance_A", "consensus_distance_B", "product_distance", "cross_term_relative")


class StoppedError(Exception):
    """A signal or the end of the budget came first; the cell goes on the next time."""


class Children:
    """The processes at work, so that they can be told to stop."""

    def __init__(self):
        self._lock, self._running, self.stopped = threading.Lock(), set(), False

    def run(self, *words: str) -> subprocess.CompletedProcess:
        """`python -m WORDS` from the project's root with captured text; StoppedError once `stop` was called."""
        command = [sys.executable, "-c", BOUND, *words]
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self._lock:
            if self.stopped:
                raise StoppedError
            # a session of its own: an interrupt at the terminal is for the runner, which hands it on once
            child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                     text=True, start_new_session=True)
            self._running.add(child)
        out, err = child.communicate()
        with self._lock:
            self._running.discard(child)
        if self.stopped and child.returncode:
            raise StoppedError
        return subprocess.CompletedProcess(command, child.returncode, out, err)

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
            for child in self._running:
                child.terminate()


def words(overrides: dict[str, Any]) -> list[str]:
    """`--dotted.key value`, values as JSON, which is YAML; texts as they are."""
    return [word for key, value in overrides.items()
            for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))]


def train_command(cell: Cell, output: str) -> list[str]:
    recipe = f"launch/recipes/{cell.task}.yaml"
    return ["dfl", "train", recipe, "--resume", "--output", output, *words(cell.overrides())]


def execute(cell: Cell, out: Path, children: Children) -> dict:
    """The finished cell as it is stored. StoppedError where it was stopped, RuntimeError with what the run said where
    it failed.
    """
    output, started = out / "runs" / cell.name, time.time()
    trained = _dfl(children, train_command(cell, str(output)))
    seconds = time.time() - started
    if trained.returncode and "diverged" in trained.stderr:
        return describe(cell) | {"diverged": trained.stderr.strip().splitlines()[-1][-300:]}
    if trained.returncode:
        raise RuntimeError(f"{cell.name} ended with {trained.returncode}:\n{trained.stderr[-3000:]}")
    tested = None
    if cell.tested:
        done = _dfl(children, ["dfl", "eval", str(output), "--data", os.path.expandvars(TEST[cell.task])])
        if done.returncode:
            raise RuntimeError(f"{cell.name}: its test evaluation ended with {done.returncode}:\n{done.stderr[-3000:]}")
        tested = json.loads(done.stdout)
    return summarise(cell, output, tested, seconds)


def _dfl(children: Children, command: list[str]) -> subprocess.CompletedProcess:
    done = children.run(*command)
    if done.returncode == STOPPED:
        raise StoppedError
    return done


def describe(cell: Cell) -> dict:
    """What the cell is, and how to run it by hand."""
    overrides = cell.overrides()
    place = f"runs/{cell.name}"
    commands = [" ".join(_quoted(word) for word in train_command(cell, place))]
    commands += [f"dfl eval {place} --data {TEST[cell.task]}"] if cell.tested else []
    return {"phase": cell.phase, "task": cell.task, "method": cell.method, "setting": cell.setting, "p": cell.p,
            "seed": cell.seed, "lr": overrides["train.lr"], "ratio": overrides["train.lr_ratio.B"],
            "rounds": cell.rounds, "commands": commands}


def _quoted(word: str) -> str:
    return f"'{word}'" if set(word) & set(" {}[]\"") else word


def summarise(cell: Cell, output: Path, tested: dict | None, seconds: float) -> dict:
    """The stored form of a finished run: curve on validation, test at the end, bytes, diagnostics, and its stamp."""
    from evidence import recorder

    records = read_lines(output / "metrics.jsonl")
    about = json.loads((output / "run.json").read_text())
    rounds = [record for record in records if record["round"]]
    curve = _curve(records)
    late = [record["measures"] for record in rounds[-max(1, len(rounds) // 3):] if record.get("measures")]
    return rounded({
        **describe(cell), "curve": curve, "final": curve[-1], "test": None if tested is None else accuracy(tested),
        "last_third": {key: sum(m[key] for m in late) / len(late) for key in MEASURES if late and key in late[0]},
        "diagnostics": recorder.read(output), "message_bytes": sum(record["message_bytes"] for record in rounds),
        "edges": sum(record["edges"] for record in rounds),
        "seconds": {"last_start": seconds, "local": sum(record["seconds"].get("local", 0.0) for record in rounds)},
        **{key: about[key] for key in ("versions", "hardware", "git_commit", "started")},
        "resumed": about.get("resumed", [])})


def _curve(records: list[dict]) -> list[dict]:
    sent, points = 0, []
    for record in records:
        sent += record.get("message_bytes", 0)
        if "eval" in record:
            points.append({"round": record["round"], "message_bytes": sent, **accuracy(record["eval"])})
    return points


def accuracy(evaluation: dict) -> dict[str, float]:
    """Of an evaluation: mean, worst and best peer, consensus model, the mean over peers on their own distributions."""
    found = {**evaluation["accuracy"], "consensus": evaluation["consensus"]["accuracy"]}
    return found | ({"own": evaluation["own"]["accuracy"]["mean"]} if "own" in evaluation else {})


def rounded(value, digits: int = 6):
    """Six significant digits: what is stored is read by people."""
    if isinstance(value, dict):
        return {key: rounded(v, digits) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
