"""Callbacks of several processes: one that asks for a stop, or fails, on one process does so for all."""

import pytest
import tiny_runs
from processes import run_processes

import dfl
from dfl import config as configuration
from dfl.run.callbacks import CallbackError
from dfl.run.train import train

pytestmark = pytest.mark.distributed
EVENTS = {"on_train_begin": "begin", "on_round_end": "round", "on_evaluate": "evaluate", "on_save": "save", "on_train_end": "end"}


class Diary(dfl.Callback):
    """Every event with its round, and whether the records and evaluations were there."""

    def __init__(self):
        self.lines, self.none = [], []


def _note(event: str):
    def method(self, run, control, *given):
        self.lines.append(f"{EVENTS[event]} {run.round}")
        if event in ("on_round_end", "on_evaluate"):
            self.none.append(given == (None,))
    return method


for _event in EVENTS:
    setattr(Diary, _event, _note(_event))


class StopAfterTwo(dfl.Callback):
    """Asks on process 1 only."""

    def on_round_end(self, run, control, record):
        if run.process == 1 and run.round >= 2:
            control.should_training_stop = True


class Broken(dfl.Callback):
    """Fails on process 1 only."""

    def on_round_end(self, run, control, record):
        if run.process == 1 and run.round == 2:
            raise ZeroDivisionError("no such\nnumber")


def worker(rank: int, tree: dict, callback: type) -> tuple:
    """The status, or the error's words; what the diary holds."""
    diary = Diary()
    try:
        status = train(configuration.from_dict(tree), callbacks=[diary, callback()])
    except CallbackError as error:
        status = str(error)
    return status, diary.lines, diary.none


def test_processes_agree_on_a_stop_and_on_an_error(tmp_path):
    tiny_runs.make_folder(tmp_path)

    def tree(output):
        return tiny_runs.make_config(tmp_path / "bert", tmp_path / "data.csv", tmp_path / output, train__rounds=6,
                                     checkpoint__minutes=None).to_dict()  # when the clock saves is not what is agreed here

    first, second = run_processes(worker, 2, tree("stopped"), StopAfterTwo)
    assert first[0] == second[0] == 0 and first[1] == second[1]
    assert first[1] == ["begin 0", "evaluate 0", "round 1", "round 2", "evaluate 2", "round 3", "save 3", "end 3"]
    assert first[2] == second[2] == [False] * 5  # every process is given the records
    errors = [said for said, *_ in run_processes(worker, 2, tree("broken"), Broken)]
    assert errors[0] == errors[1] and "test_callbacks_agree:Broken failed in on_round_end after round 2" in errors[0]
