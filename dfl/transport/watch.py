"""A thread in every process that tells the others, in the store where all have met, that it lives, and whether it has to stop.

Gossip itself cannot tell: a process that trains for an hour sends nothing, nor does one whose machine hangs. What is dead is noticed
by its closed connection and needs no thread.
"""

import threading
import time
from collections.abc import Callable, Iterable

from dfl.transport.notes import note_key

POLL_SECONDS = 0.25  # until a wish to stop is known everywhere
BEAT_SECONDS = 5.0
LEAVE_SECONDS = 1.0  # for what the thread asks of the store as it is told to end
SILENT_SECONDS = 60.0  # longer than anything holds up a live process: a thread of it needs only the interpreter, now and then
# a gap in our own time (the machine slept, Ctrl-Z) is none in which another was silent
LARGEST_GAP = 1.0


def no_life() -> str:
    """What is said of who is silent."""
    return f"has shown no life for {SILENT_SECONDS:.0f} s: it is stopped, or its machine or network hangs"


class Watch:
    """`store`: any with `set`, `get` and `check`, for this alone. `prefix`: of the run. `asked`: whether this process is told to stop.

    `holder`: the process that holds the store, which takes the store along when it falls silent; None where it is none of these.
    """

    def __init__(self, store, rank: int, prefix: str, asked: Callable[[], bool], holder: int | None, clock=time.monotonic):
        self.store, self.rank, self.prefix, self.asked, self.holder, self.clock = store, rank, prefix, asked, holder, clock
        self.told = False  # somebody has been told to stop
        self.beats: dict[int, bytes] = {}  # the last of those that are waited for
        self.answers = 0  # of the store
        self._failed: set[int] = set()
        self._waiting: tuple[tuple[int, ...], float] = ((), 0.0)  # for whom, and since when
        self._beats_told, self._next_beat = 0, 0.0
        self._last_told: tuple[int, ...] = ()
        self._quiet: dict[int, float] = {}
        self._marks: dict[int, object] = {}
        self._at = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="dfl-watch", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """A thread that is inside the store when the interpreter ends would abort the process. One that hangs is not waited for."""
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(LEAVE_SECONDS)

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self.look(beats=self.answers % 4 == 0)
                self.beat()
                self.answers += 1
                self._ended.wait(POLL_SECONDS)
        except RuntimeError:  # the store has gone: so has who held it, which the others' connections say
            pass

    def beat(self) -> None:
        """A heartbeat now and then, and soon after whom this process waits for has changed: the time-out of others may be short."""
        now, (awaited, since) = self.clock(), self._waiting
        waits = awaited if now - since >= POLL_SECONDS else ()
        if now >= self._next_beat or waits != self._last_told:
            self._beats_told, self._next_beat, self._last_told = self._beats_told + 1, now + BEAT_SECONDS, waits
            self.store.set(self.key(self.rank), " ".join(map(str, (self._beats_told, *waits))))

    def key(self, process: int) -> str:
        """Where a process tells its heartbeats, and whom it waits for."""
        return f"{self.prefix}/beat/{process}"

    def look(self, beats: bool = True) -> None:
        """Tell and ask once."""
        if not self.told:
            if self.asked():
                self.store.set(f"{self.prefix}/stop", str(self.rank))
                self.told = True
            else:
                self.told = self.store.check([f"{self.prefix}/stop"])
        for process in self._waiting[0] if beats else ():
            if self.store.check([self.key(process)]):
                self.beats[process] = self.store.get(self.key(process))
            if self.store.check([note_key(process)]):
                self._failed.add(process)

    def failed(self) -> list[int]:
        """Those among the awaited that have left a note of an error."""
        return [process for process in self._waiting[0] if process in self._failed]

    def begin(self, processes: Iterable[int]) -> None:
        """The main thread waits for these from now on."""
        awaited, now = tuple(processes), self.clock()
        self._waiting = (awaited, now)
        self._quiet = dict.fromkeys([*awaited, -1], 0.0)
        self._marks, self._at = {}, now

    def silent(self) -> list[int]:
        """Those among the awaited that have shown no life for SILENT_SECONDS; asked again and again, about twice a second."""
        now = self.clock()
        gap, self._at = min(now - self._at, LARGEST_GAP), now
        answered = self._count(-1, self.answers, gap)
        if not answered:  # then nobody's beats can be seen; -1 stands for the store
            late = self._quiet[-1] >= SILENT_SECONDS and self.holder is not None and self.holder != self.rank
            return [self.holder] if late else []
        awaited = self._waiting[0]
        for process in awaited:
            self._count(process, self.beats.get(process), gap)
        return [process for process in awaited if self._quiet[process] >= SILENT_SECONDS]

    def _count(self, process: int, mark, gap: float) -> bool:
        """Whether there is another mark than the last time; for how long there has been none."""
        changed = process not in self._marks or self._marks[process] != mark
        self._quiet[process] = 0.0 if changed else self._quiet[process] + gap
        self._marks[process] = mark
        return changed or self._quiet[process] < 4 * POLL_SECONDS


def waits_for(beat: bytes | None) -> list[int]:
    """The processes that one waits for, by its last heartbeat."""
    return [int(process) for process in (beat or b"").split()[1:]]


def held_up_by(missing: list[int], me: int, waits: Callable[[int], Iterable[int]]) -> list[int]:
    """Those that the missing wait for themselves, and so on; who waits for nobody holds up all. waits: for whom a process waits."""
    found: set[int] = set()
    seen, left = {me}, list(missing)
    while left:
        process = left.pop()
        others = set(waits(process)) - {process}
        seen.add(process)
        left += sorted(others - seen)
        found |= set() if others else {process}
    return sorted(found) or missing
