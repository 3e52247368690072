"""Signals: which ask for a stop, which end a process at once, and when local training stops in the middle of a round."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from dfl.run import survive
from dfl.run.survive import AllStop, Left, Process
from dfl.transport.stopping import ECHO_SECONDS, FINISH_SECONDS, Halt, Stopped, StopSignal


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_the_first_asks(name):
    stop = StopSignal()
    try:
        assert stop.received == 0
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.received == getattr(signal, name)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
    assert not any(thread.name == "dfl-signals" for thread in threading.enumerate())


def left(*came) -> list[int]:
    """The signals at which a process leaves, of (signal, seconds)."""
    found = []
    stop = StopSignal(found.append)
    try:
        for name, at in came:
            stop.hear(getattr(signal, name), at)
        assert stop.received == getattr(signal, came[0][0])
    finally:
        stop.restore()
    return found


def test_what_comes_soon_after_the_first_is_the_same_wish():
    ten = [(("SIGTERM", "SIGINT")[k % 2], 0.05 * k) for k in range(10)]
    assert left(*ten) == []
    assert left(*ten, ("SIGINT", ECHO_SECONDS + 0.01)) == [signal.SIGINT]
    assert left(("SIGINT", 0.0), ("SIGTERM", ECHO_SECONDS + 0.01)) == [signal.SIGTERM]


def test_a_warning_is_not_the_first_of_two():
    assert left(("SIGUSR1", 0.0), ("SIGUSR1", 9.0), ("SIGUSR2", 10.0), ("SIGTERM", 100.0), ("SIGTERM", 100.5)) == []
    assert left(("SIGUSR1", 0.0), ("SIGTERM", 100.0), ("SIGTERM", 102.0)) == [signal.SIGTERM]


LEAVES = """
import ctypes, sys, threading, time
from dfl.transport import stopping
stopping.ECHO_SECONDS = 0
hear = stopping.StopSignal.hear
stopping.StopSignal.hear = lambda *heard: (hear(*heard), print("heard", flush=True))
stop = stopping.StopSignal()
print("ready", flush=True)
{wait}
print("came back", flush=True)
"""
WAITS = {"sleeps": "time.sleep(60)", "computes": "sum(k * k for k in range(10 ** 10))",
         "waits in C": "libc, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
                       "libc.pthread_mutex_lock(lock)\nlibc.pthread_mutex_lock(lock)"}


@pytest.mark.long
@pytest.mark.parametrize("how", WAITS)
def test_a_second_one_leaves_within_a_second_whatever_the_process_does(how):
    """Also where the main thread does not come to run Python: a wait in C is taken up again after a signal, as gloo's are."""
    code = LEAVES.format(wait=WAITS[how])
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGTERM)
        assert job.stdout.readline() == "heard\n" and job.poll() is None
        second = time.monotonic()
        job.send_signal(signal.SIGINT)
        assert job.wait(10) == 128 + signal.SIGINT
        assert time.monotonic() - second < 1.0
        assert "dfl: left at once at a second SIGINT" in job.stderr.read() and job.stdout.read() == ""
    finally:
        job.kill()


UNREAD = {"full": "os.set_blocking(2, False)\nwhile True:\n    try:\n        os.write(2, bytes(4096))\n"
                  "    except BlockingIOError:\n        break\nos.set_blocking(2, True)",
          "closed": "reader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 2)"}


@pytest.mark.long
@pytest.mark.parametrize("how", UNREAD)
def test_a_second_one_leaves_also_where_nobody_reads_the_line(how):
    """As of a pager that waits for a key, or one that has ended."""
    code = LEAVES.format(wait=f"import os\n{UNREAD[how]}\nprint('unread', flush=True)\ntime.sleep(60)")
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert [job.stdout.readline() for _ in range(2)] == ["ready\n", "unread\n"]
        job.send_signal(signal.SIGTERM)
        assert job.stdout.readline() == "heard\n"
        job.send_signal(signal.SIGINT)
        assert job.wait(30) == 128 + signal.SIGINT
    finally:
        job.kill()


def test_nothing_to_save_is_left_at_once():
    stop = StopSignal()
    try:
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            with stop.at_once():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(5)
                except Exception:  # what a library makes of an error while it loads
                    pass
        with pytest.raises(Stopped):  # and where it came before
            with stop.at_once():
                raise AssertionError
    finally:
        stop.restore()


def test_in_another_thread_nothing_is_received():
    found = []
    thread = threading.Thread(target=lambda: (stop := StopSignal(), found.append(stop.received), stop.restore()))
    thread.start()
    thread.join()
    assert found == [0] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_round_is_finished_when_little_is_left():
    now, asked = [0.0], [False]
    halt = Halt(lambda: asked[0], lambda: now[0])

    def after(seconds: float, steps_left: int) -> bool:
        now[0] += seconds
        return halt(steps_left)

    halt.begin()
    assert not after(0, 100)
    asked[0] = True
    assert after(0.5, 99)  # half a second each: fifty seconds
    assert after(0.5, int(2 * FINISH_SECONDS) + 1) and not after(0.5, int(2 * FINISH_SECONDS))
    halt.begin()
    assert not after(1000.0, 3)  # what was between two rounds is no step
    fresh = Halt(lambda: True, lambda: 0.0)
    fresh.begin()
    assert fresh(1)  # nobody knows how long a step takes


def test_a_signal_to_a_process_that_is_forked_meanwhile_is_not_ours():
    """As multiprocessing's pools send one to their processes when they end: it ends them, and they end."""
    stop = StopSignal()
    try:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join(20)
        assert child.exitcode == -signal.SIGTERM and stop.received == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    finally:
        child.kill()
        child.join()
        stop.restore()


@pytest.mark.timeout(30)
def test_a_process_that_is_forked_meanwhile_and_stays_does_not_hold_us_up():
    stop = StopSignal()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    try:
        stop.restore()
        assert child.exitcode is None
    finally:
        child.kill()
        child.join()


class Between(StopSignal):
    """A signal comes right behind the first look at whether one has come."""

    looks = 0

    @property
    def received(self) -> int:
        found, self.looks = self._received, self.looks + 1
        if self.looks == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    @received.setter
    def received(self, number: int) -> None:
        self._received = number


def test_a_signal_on_the_way_into_what_is_left_at_once_is_not_lost():
    stop = Between()
    try:
        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            with stop.at_once():
                raise AssertionError
    finally:
        stop.restore()


class Survivor:
    """A process of a run that survives, with another that has been told to stop already where `other`. It is told itself after so
    many looks at what has arrived."""

    def __init__(self, told_at: int | None, other: bool):
        self.looks, self.told_at, self.other, self.coming, self.asked = 0, told_at, other, {}, 0
        self.stop = SimpleNamespace(received=signal.SIGTERM if told_at == 0 else 0)
        self.transport, self.record, self.run = self, self, SimpleNamespace(peers=SimpleNamespace(ids=[0]))
        self.alive = [0, 1]

    def round(self, line):
        pass

    def check(self):
        self.looks += 1
        if self.looks == self.told_at:
            self.stop.received = signal.SIGTERM

    def agree(self, value, most):
        self.asked += 1
        return max(value, int(self.other) if self.asked == 1 else int(not self.other))

    def _leave_or_stop(self):
        Process._leave_or_stop(self)


@pytest.mark.parametrize("told_at, other, ends", [(0, True, AllStop), (3, True, AllStop), (None, True, None), (0, False, Left),
                                                  (None, False, None)])
def test_survivors_that_are_told_one_after_the_other_stop_at_the_same_round(told_at, other, ends, monkeypatch):
    monkeypatch.setattr(survive, "ECHO_SECONDS", 0.2 if told_at is None else 60.0)
    one = Survivor(told_at, other)
    with pytest.raises(ends) if ends else contextlib.nullcontext():
        Process._record(one, {"round": 1})
    assert one.asked == 1 if not ends and not other else 2
