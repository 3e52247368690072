"""A run that goes on without the processes that it loses, whichever they are, down to one, and that is run again from its record."""

import os
import random
import signal
import socket

import pytest
from members import Group
from tiny_runs import adapter_digests, arguments, make_folder

from dfl.run.replay import replay
from dfl.store.collect import collect

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("survivors"))


def group(place, tmp_path, size=4, **fields) -> Group:
    given = {"membership__mode": "survive", "membership__patience": 1.5, "train__rounds": 30, "eval__every": 10} | fields
    return Group(tmp_path, arguments(place / "bert", place / "data.csv", tmp_path / "run", **given), size)


def check_records(run: Group, finished: list[int], rounds: int = 30) -> None:
    """Everybody who was there at the end has recorded all rounds, once each and in order, with the same living."""
    told = [[(line["round"], line["alive"]) for line in run.lines(process)] for process in finished]
    assert [number for number, _ in told[0]] == list(range(rounds + 1))
    assert all(one == told[0] for one in told)
    for process in range(run.size):
        assert "Traceback" not in run.said(process) and "terminate called" not in run.said(process)
    found = replay(run.folder / "run")
    assert found.all and found.peers == told[0][-1][1], found


def test_nobody_leaves_and_the_bits_are_those_of_a_run_that_cannot_lose_anybody(place, tmp_path):
    from members import tree_of

    from dfl.config import from_dict
    from dfl.run.train import train
    words = arguments(place / "bert", place / "data.csv", tmp_path / "fixed", train__rounds=4)
    assert train(from_dict(tree_of(words))) == 0
    with group(place, tmp_path, train__rounds=4) as run:
        for process in range(4):
            run.start(process)
        assert [run.wait(process) for process in range(4)] == [0] * 4, run.everything()
    assert collect(tmp_path / "run") == (4, [0, 1, 2, 3])
    assert adapter_digests(tmp_path / "run") == adapter_digests(tmp_path / "fixed")


@pytest.mark.parametrize("how", ["one", "several", "stopped"])
def test_the_others_go_on_without_whoever_is_killed_or_stopped(place, tmp_path, how):
    seed = {"one": 5, "several": 6, "stopped": 7}[how]
    rng = random.Random(seed)
    lost = {"one": [0], "several": rng.sample(range(4), 3), "stopped": [rng.randrange(4)]}[how]
    with group(place, tmp_path) as run:
        for process in range(4):
            run.start(process)
        for process in lost:
            if how != "several" or process == lost[0]:
                run.until_round(process, rng.randint(1, 12))
            run.kill(process, signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        left = [process for process in range(4) if process not in lost]
        assert [run.wait(process) for process in left] == [0] * len(left), run.everything()
        check_records(run, left)
        assert run.lines(left[0])[-1]["alive"] == left
        if how == "stopped":  # it learns that it is out, and says so in a line
            run.kill(lost[0], signal.SIGCONT)
            assert run.wait(lost[0]) != 0
            # whoever notices first says why; the others may have heard it from that one
            assert any("has shown no life for 1.5 s" in run.said(process) for process in left), run.everything()


def test_who_was_killed_comes_back_while_the_others_go_on(place, tmp_path):
    with group(place, tmp_path, train__rounds=120) as run:
        for process in range(4):
            run.start(process)
        run.until_round(1, 3)
        run.kill(2)
        run.wait(2)
        run.start(2, resume=True)
        assert [run.wait(process) for process in range(4)] == [0] * 4, run.everything()
        lines = run.lines(0)
        assert lines[-1]["alive"] == [0, 1, 2, 3] and any(line["alive"] == [0, 1, 3] for line in lines), run.everything()
        [came] = [line["came"] for line in lines if "came" in line]
        assert came["2"]["from"] == "neighbours" and set(came["2"]["of"]) == {"1", "3"}
        missed = [line["round"] for line in lines if 2 not in line["alive"]]
        assert not set(missed) & {line["round"] for line in run.lines(2)}
        check_records(run, [0, 1, 3], 120)


def test_a_new_process_joins_a_run_that_goes_on(place, tmp_path):
    with group(place, tmp_path, train__rounds=150, membership__wait=8) as run:
        for process in range(3):
            run.start(process)
        run.until_round(0, 3, seconds=100)
        run.start(3)
        assert [run.wait(process) for process in range(4)] == [0] * 4, run.everything()
        assert run.lines(0)[1]["alive"] == [0, 1, 2] and run.lines(0)[-1]["alive"] == [0, 1, 2, 3]
        check_records(run, [0, 1, 2], 150)


def test_all_stop_and_go_on_with_equal_bits(place, tmp_path):
    with group(place, tmp_path, train__rounds=20) as run:
        for process in range(4):
            run.start(process)
        assert [run.wait(process) for process in range(4)] == [0] * 4, run.everything()
    whole = adapter_digests_of(run)
    (tmp_path / "again").mkdir()
    with group(place, tmp_path / "again", train__rounds=20) as run:
        for process in range(4):
            run.start(process)
        run.until_round(3, 5)
        for process in range(4):
            run.kill(process, signal.SIGTERM)
        assert [run.wait(process) for process in range(4)] == [75] * 4, run.everything()
        for process in range(4):
            run.start(process, resume=True)
        assert [run.wait(process) for process in range(4)] == [0] * 4, run.everything()
        assert adapter_digests_of(run) == whole


def adapter_digests_of(run: Group) -> list[dict[str, str]]:
    return [adapter_digests(run.output(process)) for process in range(run.size)]


def _diverge(tree, env, log, resume):
    """`_work`, but for a peer of its own whose factors are no numbers from some round on."""
    from members import _work

    from dfl.training.phase import ModelTrainer
    run = ModelTrainer.run

    def diverging(self, x, plans, corrections, t, **more):
        if t == 5:
            x[0] = float("inf")
        return run(self, x, plans, corrections, t, **more)

    ModelTrainer.run = diverging
    _work(tree, env, log, resume)


def test_who_diverges_goes_with_a_line_and_the_others_go_on(place, tmp_path):
    with group(place, tmp_path, 3, peers=3) as run:
        for process in (0, 1):
            run.start(process)
        run.start(2, work=_diverge)
        assert run.wait(2) == 1 and "dfl: peer 2 diverged in round 6: " in run.said(2), run.everything()
        assert [run.wait(process) for process in (0, 1)] == [0, 0], run.everything()
        assert "going on without process 2 (peer 2, host " in run.said(0) and "diverged in round 6" in run.said(0), run.everything()
        assert run.lines(0)[5]["alive"] == [0, 1, 2] and run.lines(0)[6]["alive"] == [0, 1]
        check_records(run, [0, 1])


def _told_while_it_loads(tree, env, log, resume):
    from members import _work

    from dfl.run import survive
    load = survive.load

    def told(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*args)

    survive.load = told
    _work(tree, env, log, resume)


@pytest.mark.parametrize("when", ["while it loads", "while it waits for the others"])
def test_who_is_told_to_stop_before_it_has_joined_stops_at_once_with_a_line(place, tmp_path, when):
    with group(place, tmp_path, 2, peers=2) as run:
        run.start(0, **({"work": _told_while_it_loads} if when == "while it loads" else {}))
        if when == "while it waits for the others":
            with socket.create_server(("127.0.0.1", run.ports[1])) as other:
                other.settimeout(60)
                other.accept()[0].close()  # it calls
            run.kill(0, signal.SIGTERM)
        assert run.wait(0, 60) == 75, run.everything()
        assert "dfl: " not in run.said(0) and "Traceback" not in run.said(0), run.everything()
        assert "stopped by SIGTERM before it joined the others" in run.said(0)
