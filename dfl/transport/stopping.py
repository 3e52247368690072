"""Signals: the first asks a run to stop where its state can be saved, a second one ends the process at once, whatever it does.

SIGTERM and SIGINT (Ctrl-C) ask; SIGUSR1 and SIGUSR2 are the warnings that a job orders with `--signal=USR1@60`, and ask as well, but a
SIGTERM after them is no second signal. It is enough that one process of a run gets one. torchrun passes SIGTERM and SIGINT on to its
workers and kills them after 30 s; the others it passes on with `--signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGUSR2`.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress

# What comes within this time of the first signal is the same wish. Slurm signals every process of a step, and launchers pass on what
# they get, some tenths of a second later; an impatient person presses Ctrl-C several times. Much longer, and who really wants to leave
# at once would have to wait.
ECHO_SECONDS = 1.0
# when no more than this is left of the local steps of a round, the round is finished: less time than a checkpoint of its middle may
# take, which holds the round's start as well
FINISH_SECONDS = 2.0
_ASKING = (signal.SIGTERM, signal.SIGINT)
_WARNING = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal came while there was nothing to save. No Exception: what libraries catch while they load a model must not end it."""


class StopSignal:
    """`received`: the number of the first signal, 0 before. Only the main thread may make one; in another it never receives any.

    A thread reads what Python's own C handler writes into a pipe the moment a signal comes. So a second signal ends the process also
    while its main thread waits inside gloo or a model's file, where Python's handlers do not run: with status 128 + n, after a line.
    """

    def __init__(self, leave: Callable[[int], None] | None = None):
        self.received, self._asked_at, self._at_once = 0, None, False
        self._leave, self._before = leave or _leave, {}
        if threading.current_thread() is not threading.main_thread():
            return
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in _ASKING + _WARNING}
        self._thread = threading.Thread(target=self._watch, name="dfl-signals", daemon=True)
        self._thread.start()
        _made.append(self)

    def _watch(self) -> None:
        while numbers := os.read(self._reader, 64):
            for number in numbers:
                if number in self._before:
                    self.hear(number, time.monotonic())

    def hear(self, number: int, now: float) -> None:
        """A signal came at `now` seconds of a clock that does not go back."""
        self.received = self.received or number
        if number in _WARNING:
            return
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at > ECHO_SECONDS:
            self._leave(number)

    def _handle(self, number: int, frame) -> None:
        """In the main thread, as soon as Python runs there."""
        self.received = self.received or number
        if self._at_once:
            self._at_once = False
            raise Stopped(f"stopped by {signal.Signals(number).name}")

    @contextmanager
    def at_once(self):
        """Nothing would be lost in here: the first signal raises Stopped, also one that came before."""
        self._at_once = True  # before the look, or a signal between the two would be missed
        try:
            if self.received:
                raise Stopped(f"stopped by {signal.Signals(self.received).name}")
            yield
        finally:
            self._at_once = False

    def restore(self) -> None:
        if not self._before:
            return
        self._give_back()
        self._thread.join()
        os.close(self._reader)

    def _give_back(self) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)  # which ends the thread
        self._before = {}
        _made.remove(self)


_made: list[StopSignal] = []
_masks = threading.local()


def _before_fork() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING + _WARNING)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _in_child() -> None:
    """A fork of this process, as of multiprocessing in somebody's callback, would take no notice of its signals, write them into our
    pipe, where they count as ours, and keep that open."""
    for stop in reversed(_made.copy()):
        stop._give_back()
        os.close(stop._reader)
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _leave(number: int) -> None:
    last_words(f"left at once at a second {signal.Signals(number).name}; what was done since the last checkpoint is lost")
    os._exit(128 + number)


def last_words(text: str) -> None:
    """To standard error, where that takes it at once: nobody waits for the lock of the stream, nor for a reader, if there is one."""
    with suppress(OSError, ValueError):
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"\ndfl: {text}\n".encode())


class Halt:
    """Whether local training stops between two steps: where a stop is asked for and more than FINISH_SECONDS of steps are left.

    clock: seconds; the last step's are those that the others are taken to last.
    """

    def __init__(self, asked: Callable[[], bool], clock: Callable[[], float] = time.monotonic):
        self.asked, self.clock = asked, clock
        self.step_seconds: float | None = None
        self._at: float | None = None

    def begin(self) -> None:
        """A round's local steps begin: the time since the last of the round before was no step."""
        self._at = None

    def __call__(self, steps_left: int) -> bool:
        now = self.clock()
        if self._at is not None:
            self.step_seconds = now - self._at
        self._at = now
        return self.asked() and (self.step_seconds is None or steps_left * self.step_seconds > FINISH_SECONDS)
