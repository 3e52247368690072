"""A committed result names what was run, and no folder of the machine on which it was."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import stamp  # noqa: E402


def test_paths_of_a_machine_are_not_told(monkeypatch, tmp_path):
    monkeypatch.setattr(stamp, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "collect", "--out", "/home/somebody/runs", "--seed", "3", "runs/mine"])
    stored = json.loads(stamp.write("some", {}, {"found": 1}).read_text())
    assert stored["command"] == "python benchmarks/some.py collect --out DIR --seed 3 runs/mine" and stored["results"] == {"found": 1}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_commands_tell_no_path_of_a_machine(path):
    command = json.loads(path.read_text()).get("command", "")
    assert not any(Path(argument).is_absolute() for argument in command.split())
