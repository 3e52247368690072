"""Disks that are slow, full, read-only, broken or away, and clocks that jump by hours, of one process of a run: nobody hangs,
nothing is lost that was saved, and a line says what it is. With and without the loss of a process being the end of the run."""

import errno
import re
import time
from pathlib import Path

import pytest
import trouble
from members import tree_of
from tiny_runs import adapter_digests, arguments, make_folder

from dfl.config import from_dict
from dfl.run.replay import replay
from dfl.run.train import train
from dfl.store.checkpoints import complete
from dfl.store.collect import collect

pytestmark = [pytest.mark.distributed, pytest.mark.clock, pytest.mark.skipif(bool(trouble.missing()), reason=str(trouble.missing()))]
ROUNDS, PATIENCE = 250, 3.0
HOUR = 3600


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("trouble"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with trouble.Server(tmp_path_factory.mktemp("library")) as server:
        yield server


def words(place, output, **fields) -> list[str]:
    given = {"peers": 3, "train__rounds": ROUNDS, "eval__every": 10**6, "checkpoint__every": 10, "measure__every": 0} | fields
    return arguments(place / "bert", place / "data.csv", output, **given)


@pytest.fixture(scope="module")
def undisturbed(place) -> dict[str, str]:
    """Adapters of the same run in one process."""
    assert train(from_dict(tree_of(words(place, place / "alone")))) == 0
    return adapter_digests(place / "alone")


def survivors(place, tmp_path, server, **fields) -> trouble.Troubled:
    given = {"membership__mode": "survive", "membership__patience": PATIENCE} | fields
    return trouble.Troubled(tmp_path, words(place, tmp_path / "run", **given), 3, server)


def together(place, tmp_path, server, **fields) -> trouble.Together:
    return trouble.Together(tmp_path, words(place, tmp_path / "run", **fields), 3, server)


def begin(run: trouble.Troubled, rounds: int = 3) -> trouble.Troubled:
    """All at work."""
    for process in range(3):
        run.start(process)
    run.until_round(0, rounds)
    return run


def last(run: trouble.Troubled, process: int) -> dict:
    return run.lines(process)[-1]


def until(true, run: trouble.Troubled, seconds: float = 60.0) -> float:
    """How long it took."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() < begun + seconds, run.everything()
        time.sleep(0.02)
    return time.monotonic() - begun


def only_lines(run: trouble.Troubled) -> None:
    assert not re.search("Traceback|terminate called|frame #|panicked", run.everything()), run.everything()


# -- a slow disk -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [100, pytest.param(2, marks=pytest.mark.nightly)])
def test_who_writes_for_longer_than_patience_is_waited_for_and_no_bit_changes(place, tmp_path, server, undisturbed, every):
    """Records, and at night checkpoints."""
    with begin(survivors(place, tmp_path, server, checkpoint__every=every)) as run:
        run.wrong[2].now(slow=1.5 * PATIENCE)
        run.until_round(0, last(run, 0)["round"] + 2, 160)
        run.wrong[2].now()
        assert [run.wait(process) for process in range(3)] == [0] * 3, run.everything()
        only_lines(run)
        assert "going on without" not in run.everything()
    assert collect(tmp_path / "run") == (ROUNDS, [0, 1, 2]) and adapter_digests(tmp_path / "run") == undisturbed


def test_who_writes_for_longer_than_the_time_out_is_left_behind_and_comes_back(place, tmp_path, server):
    with begin(survivors(place, tmp_path, server, timeout=6, train__rounds=10**6)) as run:
        run.wrong[2].now(slow=20)
        took = until(lambda: last(run, 0)["alive"] == last(run, 1)["alive"] == [0, 1], run)
        assert took < 15 and "lives, but did not answer for 6 s" in run.said(0) + run.said(1)
        run.wrong[2].now()
        assert run.wait(2) == 1 and "the others go on without this process" in run.said(2)
        comes_back(run)


@pytest.mark.parametrize("slow", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_without_survivors_all_wait_for_a_slow_disk(place, tmp_path, server, undisturbed, slow):
    with begin(together(place, tmp_path, server)) as run:
        run.wrong[slow].now(slow=1.0)
        run.until_round(0, last(run, 0)["round"] + 3, 100)
        run.wrong[slow].now()
        assert [run.wait(process) for process in range(3)] == [0] * 3, run.everything()
    assert adapter_digests(tmp_path / "run") == undisturbed


@pytest.mark.nightly
def test_without_survivors_a_disk_that_takes_longer_than_the_time_out_ends_the_run_by_name(place, tmp_path, server, undisturbed):
    with begin(together(place, tmp_path, server, timeout=6), 12) as run:
        run.wrong[0].now(slow=30)
        begun = time.monotonic()
        assert [run.wait(process) for process in (1, 2)] == [1, 1] and time.monotonic() - begun < 25
        for process in (1, 2):
            assert re.search(r"dfl: process 0 \(peer 0, host .*\) said nothing for [\d.]+ s", run.said(process)), run.everything()
        run.wrong[0].now()
        assert run.wait(0) == 1
        goes_on(run, undisturbed)


# -- a disk that fails -------------------------------------------------------------------------------------------------------------

FAULTS = {"full": (errno.ENOSPC, "No space left on device"), "read-only": (errno.EROFS, "Read-only file system"),
          "broken": (errno.EIO, "Input/output error"), "away": (0, "is no longer this run's")}


def fail(run: trouble.Troubled, process: int, how: str) -> None:
    if how == "away":
        run.output(process).rename(away(run, process))
    else:
        run.wrong[process].now(error=FAULTS[how][0])


def mend(run: trouble.Troubled, process: int, how: str) -> None:
    if how == "away":
        away(run, process).rename(run.output(process))
    run.wrong[process].now()


def away(run: trouble.Troubled, process: int) -> Path:
    return run.output(process).with_name("elsewhere")


def comes_back(run: trouble.Troubled) -> None:
    """Process 2, and all stop, and the record is that of a run."""
    run.start(2, resume=True)
    until(lambda: last(run, 0)["alive"] == last(run, 2)["alive"] == [0, 1, 2], run)
    for process in range(3):
        run.kill(process, 15)
    assert [run.wait(process) for process in range(3)] == [75] * 3, run.everything()
    only_lines(run)
    assert replay(Path(run.tree["output"])).all


@pytest.mark.parametrize("how", ["full", *(pytest.param(how, marks=pytest.mark.nightly) for how in list(FAULTS)[1:3]), "away"])
def test_who_cannot_write_says_so_and_goes_and_the_others_go_on(place, tmp_path, server, how):
    with begin(survivors(place, tmp_path, server, train__rounds=10**6), 25) as run:
        saved = [folder.name for folder in complete(run.output(2))]
        fail(run, 2, how)
        assert run.wait(2) == 1
        one_line(run, 2, how)
        until(lambda: last(run, 0)["alive"] == last(run, 1)["alive"] == [0, 1], run)
        assert re.search(r"going on without process 2 \(peer 2, host .*\): ", run.said(0)), run.said(0)
        mend(run, 2, how)
        assert {folder.name for folder in complete(run.output(2))} >= set(saved[-1:])
        comes_back(run)


def one_line(run: trouble.Troubled, process: int, how: str) -> None:
    lines = [line for line in run.said(process).splitlines() if line.startswith("dfl: ")]
    assert len(lines) == 1 and FAULTS[how][1] in lines[0] and str(run.output(process)) in lines[0], run.said(process)


def goes_on(run: trouble.Together, undisturbed: dict[str, str]) -> None:
    """To the bits of a run that nothing has happened to."""
    for process in range(3):
        run.start(process, resume=True)
    assert [run.wait(process) for process in range(3)] == [0] * 3, run.everything()
    only_lines(run)
    assert adapter_digests(run.output(0)) == undisturbed


@pytest.mark.nightly
@pytest.mark.parametrize("how, culprit", [*((how, 0) for how in FAULTS), ("full", 1)])
def test_without_survivors_all_end_and_say_so_and_nothing_that_was_saved_is_lost(place, tmp_path, server, undisturbed, how, culprit):
    """Also where the culprit is not the one that holds the store in which the others read why."""
    with begin(together(place, tmp_path, server), 25) as run:
        saved = [folder.name for folder in complete(run.output(0))]
        fail(run, culprit, how)
        begun = time.monotonic()
        assert [run.wait(process) for process in range(3)] == [1] * 3, run.everything()
        assert time.monotonic() - begun < 20
        for process in range(3):
            lines = [line for line in run.said(process).splitlines() if line.startswith("dfl: ")]
            assert len(lines) == 1 and FAULTS[how][1] in lines[0], run.said(process)
        mend(run, culprit, how)
        assert {folder.name for folder in complete(run.output(0))} >= set(saved[-1:])
        goes_on(run, undisturbed)


# -- a clock that jumps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [survivors, together])
def test_a_clock_that_jumps_by_hours_is_nothing(place, tmp_path, server, undisturbed, kind):
    """Forward and back, of one process, and of all; with the defaults for patience and time-out."""
    with begin(kind(place, tmp_path, server, membership__patience=30)) as run:
        for who, by in (([2], 6 * HOUR), ([2], -9 * HOUR), ([0, 1, 2], 24 * HOUR), ([0], 0)):
            for process in who:
                run.wrong[process].now(clock=by)
            run.until_round(0, last(run, 0)["round"] + 10)
        assert last(run, 0)["round"] < ROUNDS
        assert [run.wait(process) for process in range(3)] == [0] * 3, run.everything()
        only_lines(run)
        assert "going on without" not in run.everything()
    if kind is survivors:
        collect(tmp_path / "run")
    assert adapter_digests(tmp_path / "run") == undisturbed


CLOCK = """
import ctypes, sys, time
assert ctypes.CDLL(None).trouble_use(sys.argv[1].encode()) == 0
print(time.time() - float(sys.argv[2]) > 3000, abs(time.monotonic() - float(sys.argv[3])) < 1000)
"""


def test_the_clock_of_these_tests_does_jump(tmp_path):
    """So that what they show is not that nothing happened."""
    import subprocess
    import sys
    library = tmp_path / "trouble.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(trouble.SOURCE), "-ldl"], check=True)
    wrong = trouble.Wrong(tmp_path / "wrong", tmp_path)
    wrong.now(clock=HOUR)
    words = [sys.executable, "-c", CLOCK, str(wrong.path), str(time.time()), str(time.monotonic())]
    said = subprocess.run(words, env={"LD_PRELOAD": str(library)}, capture_output=True, text=True).stdout
    assert said == "True True\n"
