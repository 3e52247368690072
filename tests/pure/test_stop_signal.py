"""Which signals ask for a stop at the round's end, and which end a process at once."""

import os
import signal
import time

import pytest

from dfl import runtime


def status(*words: str) -> int:
    """What a process holds for the wish that got these one after the other; negative: the signal that ended it."""
    child = os.fork()
    if not child:
        stop = runtime.StopSignal()
        for word in words:
            if word == "wait":
                runtime.ECHO_SECONDS = 0.0
                time.sleep(0.01)
            else:
                os.kill(os.getpid(), getattr(signal, word))
        os._exit(stop.received)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_the_first_is_a_wish(name):
    stop = runtime.StopSignal()
    try:
        assert stop.received == 0
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.received == getattr(signal, name)
    finally:
        stop.restore()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_comes_twice():
    """A launcher's echo is no second wish, a warning before SIGTERM is none either; a keyboard's is, and a late SIGTERM."""
    assert status("SIGTERM", "SIGTERM") == signal.SIGTERM
    assert status("SIGUSR1", "wait", "SIGUSR1", "SIGTERM") == signal.SIGTERM
    assert status("SIGTERM", "SIGINT") == -signal.SIGINT
    assert status("SIGTERM", "wait", "SIGTERM") == -signal.SIGTERM
