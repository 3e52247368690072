"""Who counts as silent, without a clock: processes that beat, that do not, a store that does not answer, a machine that slept."""

import threading
import time

import pytest
import torch.distributed as dist

from dfl.transport import lookout, watch
from dfl.transport.lookout import Lookout
from dfl.transport.watch import BEAT_SECONDS, POLL_SECONDS, SILENT_SECONDS, Watch, waits_for


class Store(dict):
    set = dict.__setitem__

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key].encode()


class Case:
    """Process 0 of three, which waits for the others; `pass_seconds` in looks of half a second."""

    def __init__(self, rank=0, holder=0):
        self.now, self.store = 0.0, Store()
        self.watch = Watch(self.store, rank, "run", lambda: False, holder, lambda: self.now)
        self.watch.begin(process for process in range(3) if process != rank)

    def pass_seconds(self, seconds, beating=(), answering=True) -> list[int]:
        found = []
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            for process in beating:
                self.store.set(f"run/beat/{process}", str(self.now))
            if answering:
                self.watch.look()
                self.watch.answers += 1
            found = found or self.watch.silent()
        return found


def test_who_does_not_beat_is_silent_after_a_minute_and_nobody_else():
    case = Case()
    assert case.pass_seconds(SILENT_SECONDS - 2, [1]) == []
    assert case.pass_seconds(3, [1]) == [2]
    case.watch.begin([1, 2])
    assert case.pass_seconds(1, [1]) == []  # another wait begins anew


def test_a_busy_process_is_not():
    assert Case().pass_seconds(20 * SILENT_SECONDS, [1, 2]) == []


def test_a_store_that_does_not_answer_is_who_holds_it():
    case = Case(rank=1)
    assert case.pass_seconds(10, [0, 2]) == []
    assert case.pass_seconds(SILENT_SECONDS + 3, [], answering=False) == [0]
    assert Case(rank=1, holder=None).pass_seconds(9 * SILENT_SECONDS, [], answering=False) == []  # torchrun's: nobody of ours
    case = Case(rank=1)
    assert case.pass_seconds(SILENT_SECONDS / 2, answering=False) == [] == case.pass_seconds(SILENT_SECONDS, [0, 2])


def test_when_this_process_slept_so_did_the_others():
    case = Case()
    assert case.pass_seconds(10, [1, 2]) == []
    case.now += 10 * SILENT_SECONDS
    assert case.pass_seconds(10) == []
    assert case.pass_seconds(SILENT_SECONDS) == [1, 2]


def test_whom_a_process_waits_for_is_told_as_soon_as_it_lasts():
    """Others may have a time-out shorter than the time between two beats, and name the one that holds up all."""
    case = Case()

    def told(after):
        case.now += after
        case.watch.beat()
        return waits_for(case.store.get(case.watch.key(0)))

    assert told(0.0) == [] and told(POLL_SECONDS) == [1, 2]
    case.watch.begin([])
    assert told(POLL_SECONDS) == []
    for process in (1, 2, 1, 2):  # quick rounds tell nothing
        case.watch.begin([process])
        before = case.store.get(case.watch.key(0))
        assert told(POLL_SECONDS / 2) == [] and case.store.get(case.watch.key(0)) == before
    case.watch.begin([])
    assert told(BEAT_SECONDS) == [] and case.store.get(case.watch.key(0)) != before  # it lives


@pytest.mark.parametrize("who", ["asked", "told"])
def test_a_stop_is_known_to_all(who):
    store, asked = Store(), [False]
    one, two = (Watch(store, rank, "run", lambda rank=rank: asked[0] and rank == 0, None) for rank in (0, 1))
    for each in (one, two):
        each.look()
        assert not each.told
    asked[0] = True
    one.look()
    two.look()
    assert (one if who == "asked" else two).told
    other = Watch(store, 2, "another run", lambda: False, None)
    other.look()
    assert not other.told


@pytest.mark.parametrize("always", [False, True])
def test_a_process_is_not_ended_for_one_that_it_does_not_wait_for(always, monkeypatch):
    """Process 1 never shows life. A script's own group may wait at any time; elsewhere only steps of ours do."""
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(lookout, "LOOK_SECONDS", 0.05)
    said, ended = [], threading.Event()
    monkeypatch.setattr(lookout, "end_process", lambda text: (said.append(text), ended.set(), found.end()))
    found = Lookout(dist.HashStore(), 0, [1], None, always=always, lost=lambda silent: f"lost {silent}")
    try:
        if not always:
            time.sleep(0.6)
            assert said == []
            found.begin()
        assert ended.wait(20) and said == ["lost [1]"]
    finally:
        found.end()


def test_the_thread_is_out_of_the_store_when_a_watch_has_ended(monkeypatch):
    """One that comes back from C++ into an interpreter that ends aborts the process. One that hangs there is not waited for."""
    class Slow(dist.HashStore):
        def __init__(self):
            super().__init__()
            self.inside, self.free, self.left = threading.Event(), threading.Event(), threading.Event()

        def check(self, keys):
            self.inside.set()
            self.free.wait(60)
            self.left.set()
            return False

    def begun() -> Watch:
        watch = Watch(Slow(), 0, "run", lambda: False, None)
        watch.start()
        assert watch.store.inside.wait(60)
        return watch

    watch = begun()
    monkeypatch.setattr("dfl.transport.watch.LEAVE_SECONDS", 60)
    threading.Timer(0.3, watch.store.free.set).start()
    watch.end()
    assert watch.store.left.is_set() and not watch._thread.is_alive()
    hanging = begun()
    monkeypatch.setattr("dfl.transport.watch.LEAVE_SECONDS", 0.05)
    hanging.end()
    assert not hanging.store.left.is_set() and hanging._thread.is_alive()
    hanging.store.free.set()
    hanging._thread.join(60)
