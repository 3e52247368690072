"""Checkpoints as a recipe without a word about them gets them: in the same rounds everywhere, in time, and of no consequence."""

import os
import signal
from pathlib import Path

import pytest
import tiny_runs
from processes import begin, run_processes

from dfl import config as configuration
from dfl.run import train as running
from dfl.run.checkpoint import read_state
from dfl.run.pace import SaveClock
from dfl.store import records
from dfl.store.checkpoints import complete, latest

pytestmark = [pytest.mark.distributed, pytest.mark.clock]
ROUNDS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("by_time"))


def tree_of(root, output, **fields) -> dict:
    """Moments and a phase of the rule are carried. Nothing is said about checkpoints."""
    fields = {"method": "{name: tad, T: 2}", "train__state": "carried", "train__rounds": ROUNDS, "timeout": 20} | fields
    tree = tiny_runs.make_config(root / "bert", root / "data.csv", output, **fields).to_dict()
    assert fields.keys() & {"checkpoint__every"} or tree["checkpoint"] == configuration.Config().to_dict()["checkpoint"]
    return tree


def end_of(output: Path) -> tuple:
    """What has to be the same: adapters, state, records but for the clock and the traffic."""
    state = {name: value.numpy().tobytes() for name, value in read_state(latest(output), range(4)).items()}
    return tiny_runs.adapter_digests(output), state, list(map(tiny_runs.lasting, records.read_lines(output / "metrics.jsonl")))


@pytest.fixture(scope="module")
def straight(root):
    """A run that saves at its end alone."""
    tree = tree_of(root, root / "straight")
    tree["checkpoint"]["minutes"] = None
    assert run_processes(tiny_runs.train_worker, 1, tree) == [0]
    assert [folder.name for folder in complete(root / "straight")] == [f"round-{ROUNDS:05}"]
    return end_of(root / "straight")


def killed_worker(rank: int, tree: dict, last: int) -> str:
    """`dfl train` whose process 0 is killed when it has recorded round `last`."""
    write = records.JsonLines.write

    def write_and_die(self, line):
        write(self, line)
        if rank == 0 and line["round"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    records.JsonLines.write = write_and_die
    try:
        return str(running.train(configuration.from_dict(tree)))
    except OSError as error:
        return str(error)


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("last", [3, ROUNDS])
def test_killed_in_the_last_round_most_is_there_and_the_end_is_the_same(root, straight, tmp_path, processes, last):
    tree = tree_of(root, tmp_path / "run")
    if processes == 1:
        alone = begin(killed_worker, 0, tree, last)
        alone.join(60)
        assert alone.exitcode == -signal.SIGKILL
    else:
        said = run_processes(killed_worker, processes, tree, last, lost=[0])
        assert all("process 0" in text for text in said[1:])
    saved = complete(tmp_path / "run")
    assert saved and 0 < int(saved[-1].name[-5:]) < last
    assert run_processes(tiny_runs.train_worker, processes, tree, True) == [0] * processes
    assert end_of(tmp_path / "run") == straight


def clock_worker(rank: int, tree: dict) -> tuple[int, list[str], int]:
    """Process 0's clock wants a checkpoint in rounds 2, 3 and 5; that of another process would like one in every round."""
    asked, saved = [], []
    save = running.save
    running.save = lambda run, saver: saved.append(run.completed) or save(run, saver)

    def due(self) -> bool:
        asked.append(1)
        return rank > 0 or len(asked) in (2, 3, 5)

    SaveClock.due = due
    return running.train(configuration.from_dict(tree)), saved, len(asked)


def test_the_clock_of_process_0_decides_for_all(root, straight, tmp_path):
    results = run_processes(clock_worker, 3, tree_of(root, tmp_path / "run"))
    assert [(status, saved) for status, saved, _ in results] == [(0, [2, 3, 5, ROUNDS])] * 3
    assert [asked for *_, asked in results] == [ROUNDS, 0, 0]
    assert end_of(tmp_path / "run") == straight


def test_rounds_are_a_choice_and_then_the_clock_is_not_asked(root, straight, tmp_path):
    results = run_processes(clock_worker_by_rounds, 2, tree_of(root, tmp_path / "run", checkpoint__every=5))
    assert results == [[5, 10, ROUNDS]] * 2
    assert end_of(tmp_path / "run") == straight


def clock_worker_by_rounds(rank: int, tree: dict) -> list[int]:
    saved, save = [], running.save
    running.save = lambda run, saver: saved.append(run.completed) or save(run, saver)
    assert running.train(configuration.from_dict(tree)) == 0
    return saved
