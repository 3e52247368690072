"""What runs the parts of benchmarks/gpu.sh: each may fail, hang or crash alone, and what it said before is kept."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))  # behind all others: benchmarks is no installed package

from benchmarks.gpu import runner
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.runner import Part, Report, run_parts
from benchmarks.gpu.setting import Missing, Setting
from benchmarks.gpu.together import fork


def good(setting):
    setting.say("figure", 1.5)


def raises(setting):
    setting.say("before", 1)
    raise ZeroDivisionError("of nothing")


def hangs(setting):
    setting.say("before", 2)
    if os.fork() == 0:  # takes its own processes along
        (setting.folder / "grandchild").write_text(str(os.getpid()))
        time.sleep(60)
    time.sleep(60)


def crashes(setting):
    os.kill(os.getpid(), signal.SIGKILL)


def lacks(setting):
    raise Missing("no such package")


def wrong(setting):
    setting.check("right", True)
    setting.check("far", False, 0.5)
    setting.say("after", 3)


def run(tmp_path, parts, seconds=30.0):
    report = Report(tmp_path / "out" / "gpu.json", "the command")
    status = run_parts(parts, Setting("cpu", tmp_path), report, seconds)
    return status, json.loads(report.path.read_text())


def test_a_part_that_fails_hangs_or_crashes_takes_nothing_along(tmp_path, capfd):
    parts = [Part("raises", 10, raises), Part("hangs", 0.5, hangs), Part("crashes", 10, crashes), Part("lacks", 10, lacks),
             Part("wrong", 10, wrong), Part("good", 10, good)]
    status, found = run(tmp_path, parts)
    ends = {name: (part["outcome"], part.get("why"), part["found"]) for name, part in found["parts"].items()}
    assert status == 1 and found["finished"] and found["command"] == "the command"
    assert ends == {"raises": ("failed", "ZeroDivisionError: of nothing", {"before": 1}),
                    "hangs": ("time limit", "ended after 0 s", {"before": 2}),
                    "crashes": ("failed", "killed by SIGKILL", {}),
                    "lacks": ("left out", "no such package", {}),
                    "wrong": ("failed", "not as it should be: far",
                              {"right": {"good": True}, "far": {"good": False, "found": 0.5}, "after": 3}),
                    "good": ("done", None, {"figure": 1.5})}
    assert "1 of 6 parts done" in (out := capfd.readouterr().out) and "raises: failed: ZeroDivisionError: of nothing" in out
    grandchild = int((tmp_path / "grandchild").read_text())
    assert not Path(f"/proc/{grandchild}").exists() or "Z" in Path(f"/proc/{grandchild}/stat").read_text()


def test_what_does_not_fit_into_the_time_is_not_begun(tmp_path):
    began = time.monotonic()
    status, found = run(tmp_path, [Part("good", 10, good), Part("hangs", 60, hangs), Part("late", 10, good)], seconds=2.0)
    assert time.monotonic() - began < 30 and status == 1  # and not a minute
    assert [part["outcome"] for part in found["parts"].values()] == ["done", "time limit", "not begun"]


def test_only_left_out_is_no_failure(tmp_path):
    assert run(tmp_path, [Part("lacks", 10, lacks)])[0] == 0


def test_results_are_there_after_every_part(tmp_path):
    def look(setting):
        there = json.loads((tmp_path / "out" / "gpu.json").read_text())
        setting.say("before", [there["finished"], list(there["parts"])])

    assert run(tmp_path, [Part("good", 10, good), Part("look", 10, look)])[1]["parts"]["look"]["found"]["before"] == [False, ["good"]]


def test_a_process_that_has_asked_for_a_gpu_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="has asked for a GPU already"):
        runner.run_part(PARTS[0], Setting("cpu", tmp_path), 1.0)


def test_processes_of_a_part_say_how_they_ended(tmp_path):
    def work(rank):
        if rank == 1:
            raise ValueError("no\nroom")
        if rank == 2:
            time.sleep(60)
        return os.environ["MINE"]

    found = fork(Setting("cpu", tmp_path), 3, work, 1.0, lambda rank: {"MINE": f"r{rank}"})
    assert found == [{"found": "r0"}, {"error": "ValueError: no room"}, {"error": "time limit, or it was killed"}]


def test_limits_leave_the_checks_their_time():
    """The ten checks alone, at their worst, leave some of nine minutes; names are those of files."""
    assert sum(part.limit for part in PARTS[:10]) <= 500 and all(part.name.isidentifier() for part in PARTS)
