"""When checkpoints by time come: early, every few minutes, never for more than a fiftieth of the time."""

import itertools
import random

import pytest

from dfl.run.pace import LOST, SHARE, SaveClock


class Time:
    """A clock that stands until it is told to go on."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def run(clock: SaveClock, time: Time, rounds: int, round_seconds: float, costs) -> list[tuple[float, float]]:
    """(seconds since the start, seconds it took) of every checkpoint of a run."""
    began, found, costs = time.seconds, [], iter(costs)
    for _ in range(rounds):
        time.seconds += round_seconds
        if clock.due():
            at, cost = time.seconds - began, next(costs)
            with clock.measured():
                time.seconds += cost
            found.append((at, cost))
    return found


def test_the_first_comes_after_a_round_where_little_is_written():
    time = Time()
    assert run(SaveClock(5.0, 1e6, time), time, 1, 0.5, itertools.repeat(0.01)) == [(0.5, 0.01)]


def test_a_large_first_one_waits_until_it_is_a_small_part():
    time = Time()
    found = run(SaveClock(5.0, 1e9, time), time, 1000, 1.0, itertools.repeat(10.0))  # 10 s at the rate that is assumed
    assert found[0] == (500.0, 10.0)


@pytest.mark.parametrize("minutes, round_seconds", [(5.0, 0.3), (5.0, 20.0), (1.0, 2.0), (30.0, 5.0)])
def test_a_kill_costs_minutes_at_most_and_a_part_of_a_young_run(minutes, round_seconds):
    time = Time()
    found = [0.0] + [at for at, _ in run(SaveClock(minutes, 1e5, time), time, 3000, round_seconds, itertools.repeat(0.005))]
    for before, after in itertools.pairwise(found):
        limit = min(60 * minutes, LOST * after)
        # a checkpoint comes at the end of a round, and is decided on before its exchange
        assert after - before <= max(limit, 1.0) + 2 * round_seconds
        assert before == 0 or after - before >= limit - 1e-6
    assert len(found) > 10


@pytest.mark.parametrize("cost", [0.002, 0.05, 1.0, 40.0, "spread"])
@pytest.mark.parametrize("round_seconds", [0.1, 3.0, 200.0])
def test_all_of_them_take_no_more_than_their_share(cost, round_seconds):
    """Beyond what cannot be known before: the first, and one that takes longer than the one before it."""
    time, chance = Time(), random.Random(0)
    costs = itertools.repeat(cost) if cost != "spread" else (chance.uniform(0.01, 20) for _ in itertools.count())
    found = run(SaveClock(0.5, 1e6, time), time, 4000, round_seconds, costs)
    spent, last = 0.0, found[0][1]
    for at, took in found[1:]:
        spent += last
        assert spent + last <= SHARE * at + 1e-9
        last = took
    # and they do not stay away: the last could have come no sooner
    assert time.seconds - 100 - found[-1][0] <= max(30, (spent + 2 * last) / SHARE) + 2 * round_seconds + last


def test_none_by_time():
    time = Time()
    assert run(SaveClock(None, 0, time), time, 1000, 100.0, itertools.repeat(0.0)) == []
