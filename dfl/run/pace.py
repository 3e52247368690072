"""When a run saves by itself: early, then every few minutes, and never for more than a fiftieth of its time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# of the time since the start, what checkpoints by time may take together
SHARE = 1 / 50
# in the beginning as well, a kill costs no more than this part of what was done
LOST = 1 / 5
# the first checkpoint is thought to take what writing it at this rate takes; then what the last one took
BYTES_PER_SECOND = 1e8


class SaveClock:
    """Says when a checkpoint by time is due. One process's clock decides for all of a run.

    A checkpoint comes once `minutes` have passed since the last one, or sooner while the run is young: when a fifth of the time since
    the start would be lost. It waits while all checkpoints so far and one more would take more than a fiftieth of that time, so that
    a slow disk spreads them, whatever `minutes` says. None: never by time.
    """

    def __init__(self, minutes: float | None, num_bytes: float, now: Callable[[], float] = time.monotonic):
        """Begins now. num_bytes: what a checkpoint holds, about."""
        self._most, self._now = None if minutes is None else 60 * minutes, now
        self._began = self._last = now()
        self._spent, self._next = 0.0, num_bytes / BYTES_PER_SECOND  # seconds

    def due(self) -> bool:
        if self._most is None:
            return False
        now = self._now()
        elapsed = now - self._began
        return now - self._last >= min(self._most, LOST * elapsed) and self._spent + self._next <= SHARE * elapsed

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the writing of any checkpoint: what it takes counts, and the next one waits from its end."""
        started = self._now()
        yield
        self._last = self._now()
        self._next = self._last - started
        self._spent += self._next
