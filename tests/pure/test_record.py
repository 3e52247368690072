"""What a run writes beside its adapters: lines that survive a kill, a description of the run, trackers, the console."""

import io
import json
import math
import os
import subprocess
import sys
import time
import types

import pytest

from dfl.config.trackers import check_trackers
from dfl.report.lines import clock
from dfl.run import description
from dfl.run.console import Console
from dfl.run.description import describe_run
from dfl.run.trackers import Trackers
from dfl.store.directory import records_of
from dfl.store.records import JsonLines, finite, flatten, of_peers, read_lines


def line(t, **more):
    return {"round": t, "loss": {"mean": t / 3}} | more


def test_each_record_is_on_disk_when_write_returns(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    for t in range(3):
        lines.write(line(t))
        assert read_lines(tmp_path / "m.jsonl")[-1] == line(t)
    lines.close()


@pytest.mark.parametrize("torn", [b'{"round": 3, "los', b"\x00\x00\x00", b'{"round": 3, "a": "\xff', b""])
def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    whole = "".join(json.dumps(line(t)) + "\n" for t in range(3)).encode()
    path.write_bytes(whole + torn)
    assert read_lines(path) == [line(t) for t in range(3)]
    lines = JsonLines(path, keep_before=4)
    lines.write(line(3))
    lines.close()
    assert [json.loads(text) for text in path.read_text().splitlines()] == [line(t) for t in range(4)]


def test_a_last_line_without_its_end_is_whole(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(line(0)))
    lines = JsonLines(path, keep_before=5)
    lines.write(line(1))
    lines.close()
    assert read_lines(path) == [line(0), line(1)]


@pytest.mark.parametrize("before, kept", [(0, []), (2, [0, 1]), (4, [0, 1, 2, 3]), (None, [0, 1, 2, 3])])
def test_rounds_to_be_run_again_are_dropped(tmp_path, before, kept):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line(t)) + "\n" for t in range(4)))
    JsonLines(path, keep_before=before).close()
    assert [r["round"] for r in read_lines(path)] == kept
    assert os.listdir(tmp_path) == ["m.jsonl"]  # no draft is left


def test_numbers_come_back_as_they_were(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    values = {"round": 0, "a": 0.1 + 0.2, "b": 5e-324, "c": 2**53 + 1, "d": [1e-3, None, "text"], "e": {"f": True}}
    lines.write(values)
    lines.close()
    assert read_lines(tmp_path / "m.jsonl") == [values]


def test_what_is_not_finite_becomes_null_since_json_has_no_word_for_it(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write({"round": 1, "eval": {"perplexity": {"max": math.inf, "mean": math.nan}}, "peers": [1.0, -math.inf]})
    lines.close()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    found = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert found == {"round": 1, "eval": {"perplexity": {"max": None, "mean": None}}, "peers": [1.0, None]}
    assert finite((1, 2.5)) == [1, 2.5]


def test_a_full_disk_names_the_file(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.write(line(0))
    lines._file.close()
    lines._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError, match=r"m\.jsonl") as caught:
        lines.write(line(1))
    assert "No space left" in str(caught.value)
    lines.close()  # does not try again
    assert read_lines(tmp_path / "m.jsonl") == [line(0)]


def test_a_run_describes_itself():
    about = describe_run({"peers": 4}, {"base": "x"})
    json.dumps(about, allow_nan=False)
    assert about["config"] == {"peers": 4} and about["facts"] == {"base": "x"}
    assert {"python", "torch", "transformers", "peft", "numpy", "networkx", "safetensors"} == set(about["versions"])
    assert about["hardware"]["threads"] == 1 and about["hardware"]["processor"]
    time.strptime(about["started"], "%Y-%m-%dT%H:%M:%SZ")


def git(folder, *words):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_the_project_and_of_no_other_checkout(tmp_path):
    assert description._git_commit(tmp_path / "code.py") is None
    (tmp_path / "code.py").write_text("")
    (tmp_path / "installed.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "x")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert description._git_commit(tmp_path / "code.py") == head
    assert description._git_commit(tmp_path / "installed.py") is None  # lies in somebody's checkout, is not part of it


RECORD = {"round": 3, "trains": "A", "lr": 0.1, "eval": {"accuracy": {"mean": 0.5}, "peers": {"accuracy": [0.5, 0.5]}},
          "good": True, "measures": {"cross_term": math.nan}}
NUMBERS = {"round": 3, "lr": 0.1, "eval/accuracy/mean": 0.5}


def test_only_finite_numbers_are_tracked():
    assert flatten(RECORD) == NUMBERS


def test_tensorboard_files_hold_the_numbers_of_each_round(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = Trackers(["tensorboard"], tmp_path, {})
    trackers.log(3, RECORD)
    trackers.log(4, RECORD | {"lr": 0.2})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()  # before close: each round is flushed
    assert set(events.Tags()["scalars"]) == set(NUMBERS)
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("lr")] == [(3, 0.1), (4, 0.2)]
    trackers.close()


class Spy(types.ModuleType):
    """A module that notes its calls; `fails` names one that raises."""

    __file__ = "spy.py"

    def __init__(self, name, fails=None):
        super().__init__(name)
        self.calls, self.fails = [], fails

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.fails:
                raise RuntimeError("no account;\nlog in first")
            return self
        return call


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_configuration_numbers_and_the_end(tmp_path, monkeypatch, name):
    spy = Spy(name)
    monkeypatch.setitem(sys.modules, name, spy)
    check_trackers([name])
    trackers = Trackers([name], tmp_path / "run", {"peers": 4})
    trackers.log(3, RECORD)
    trackers.close()
    assert [name for name, _, _ in spy.calls] == ["init", "log", "finish"]
    assert spy.calls[0][2]["config"] == {"peers": 4} and spy.calls[0][2]["name"] == "run"
    assert spy.calls[1][1:] == ((NUMBERS,), {"step": 3})


def test_mlflow_gets_configuration_numbers_and_the_end(tmp_path, monkeypatch):
    spy = Spy("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", spy)
    trackers = Trackers(["mlflow"], tmp_path / "run", {"peers": 4, "method": {"name": "tad"}})
    trackers.log(3, RECORD)
    trackers.close()
    assert [name for name, _, _ in spy.calls] == ["start_run", "log_params", "log_metrics", "end_run"]
    assert spy.calls[1][1] == ({"peers": "4", "method": "{'name': 'tad'}"},)
    assert spy.calls[2][1:] == ((NUMBERS,), {"step": 3})


def test_trackers_are_refused_before_a_run_when_unknown_or_not_installed(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"'tensorbord' is not known \(did you mean 'tensorboard'\?\); allowed: tensorboard, wandb"):
        check_trackers(["tensorbord"])
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    with pytest.raises(ValueError, match="'wandb': the package is not installed; pip install wandb"):
        check_trackers(["wandb"])
    (tmp_path / "mlflow").mkdir()  # a folder of results in the working directory imports as an empty package
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'mlflow': the package is not installed"):
        check_trackers(["mlflow"])
    check_trackers(["none"])
    assert Trackers(["none"], tmp_path, {}).sinks == []


def test_a_tracker_that_will_not_start_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Spy("wandb", fails="init"))
    with pytest.raises(ValueError, match="report_to = 'wandb' does not start: no account; log in first"):
        Trackers(["wandb"], tmp_path, {})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_plain_lines_and_a_terminal_a_bar():
    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        console = Console(10, stream=stream)
        console.say("hello")
        for t in range(10):
            console.round(t, f"loss {t}", important=t == 4)
        console.close()
    lines = log.getvalue().splitlines()
    assert lines[0] == "hello" and not any("\r" in text for text in lines)
    # every fifth of the run, and what is important
    assert [text.split()[1] for text in lines[1:]] == ["2/10", "4/10", "5/10", "6/10", "8/10", "10/10"]
    assert lines[-1].endswith("left 0:00")
    assert "\r" in terminal.getvalue() and "10/10" in terminal.getvalue() and "hello" in terminal.getvalue()


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3725, "1:02:05")])
def test_time_left_reads_as_a_clock(seconds, text):
    assert clock(seconds) == text


def test_the_time_left_of_a_continued_run_counts_only_its_own_rounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = io.StringIO()
    shown = Console(100, done=90, stream=log)
    now[0] = 10.0
    shown.round(90, "", important=True)  # one of ten rounds took ten seconds
    assert log.getvalue().split()[-1] == "1:30"


# -- records of several processes -----------------------------------------------------------------------------------------


def whole_record(t: int, values: list) -> dict:
    """What one process that hosts all peers writes."""
    return {"round": t, "train_loss": {"mean": 1.0}, "train_loss_peers": values, "eval": {
        "accuracy": {"mean": 0.5}, "peers": {"accuracy": values}, "consensus": {"accuracy": 0.7},
        "own": {"peers": {"accuracy": values}, "gap": {"accuracy": {"mean": 0.1}, "peers": {"accuracy": values}}}}}


def part(record: dict, peers: list[int]) -> dict:
    """The same as a process that hosts `peers` has it."""
    def cut(value):
        if isinstance(value, dict):
            return {key: cut(one) for key, one in value.items()}
        return [value[peer] for peer in peers] if isinstance(value, list) else value
    return {"round": record["round"], "hosted": peers} | cut(record)


def write_parts(folder, hosts, rounds=(1, 2)):
    for process, peers in enumerate(hosts):
        lines = JsonLines(folder / records_of(process))
        for t in rounds:
            mine = part(whole_record(t, [float(t), 2.0, 3.0, 4.0, 5.0]), peers)
            lines.write(of_peers(mine) if process else mine)
        lines.close()


def test_records_of_processes_are_read_as_one(tmp_path):
    write_parts(tmp_path, [[0, 1], [2, 3], [4]])
    assert read_lines(tmp_path / "metrics.jsonl") == [whole_record(t, [float(t), 2.0, 3.0, 4.0, 5.0]) for t in (1, 2)]
    others = [json.loads(line) for line in (tmp_path / "metrics-1.jsonl").read_text().splitlines()]
    assert others[0].keys() == {"round", "hosted", "train_loss_peers", "eval"} and "consensus" not in others[0]["eval"]


def test_what_a_process_has_not_written_yet_is_missing_and_the_rest_is_there(tmp_path):
    write_parts(tmp_path, [[0, 1], [2, 3], [4]])
    path = tmp_path / "metrics-1.jsonl"
    path.write_bytes(path.read_bytes()[:-20])  # killed while it wrote its second round
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert first["train_loss_peers"] == [1.0, 2.0, 3.0, 4.0, 5.0] and second["train_loss_peers"] == [2.0, 2.0, None, None, 5.0]


def test_a_run_may_go_on_in_other_processes(tmp_path):
    write_parts(tmp_path, [[0, 1], [2, 3], [4]], rounds=[1])
    write_parts(tmp_path, [[0, 1, 2], [3, 4]], rounds=[2])
    assert [line["train_loss_peers"] for line in read_lines(tmp_path / "metrics.jsonl")] == [
        [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 2.0, 3.0, 4.0, 5.0]]
