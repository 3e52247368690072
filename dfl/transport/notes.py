"""Notes that a failing process leaves in the store where all have met, so that everybody names the same culprit.

Who waits in vain writes whom it waited for; who fails by itself writes its error. Others then see a closed connection, and read why.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# seconds in which the notes of those who noticed at the same time have to be there
GRACE = 2.0
# seconds for which who holds the store waits at most for those that have yet to read why
LINGER = 10.0


class Note(NamedTuple):
    """`text`: what `process` has to say; `accused`: the processes it waited for in vain; `error`: the class of an error of its own."""

    process: int
    text: str
    accused: Sequence[int] = ()
    error: str | None = None


class Notes:
    """`store` is anything with `set`, `get` and `check`; `address` (host, port): where it listens, if it does.

    Nothing here raises or waits much longer than GRACE: the store may have died with the process that held it.
    """

    def __init__(self, store, process: int, address: tuple[str, int] | None = None):
        self.store, self.process, self.address, self.written = store, process, address, False

    def write(self, note: Note) -> None:
        """Only the first note counts: what comes later follows from it."""
        if not self.written:
            self.written = True
            self._ask(lambda: self.store.set(note_key(self.process), json.dumps(note._asdict())))

    def cause(self, mine: Note) -> Note:
        """The note that explains `mine`: from those waited for in vain to those they waited for, and so on."""
        note, seen, until = mine, {self.process}, time.monotonic() + GRACE
        while not note.error and time.monotonic() < until:
            found = next((q for q in note.accused if q not in seen and self._has(q)), None)
            if found is None:
                time.sleep(0.05)
                continue
            seen.add(found)
            note = self._read(found) or note
        self._ask(lambda: self.store.set(_read_key(self.process), ""))
        return note

    def linger(self, others: Iterable[int]) -> None:
        """The store is in this process: until the others have read why it ends, or have an error of their own. Who is accused and
        says nothing itself has gone."""
        left, accused, begun = set(others), set[int](), time.monotonic()
        while left and self.store is not None and time.monotonic() < begun + LINGER:
            for q in sorted(left):
                note = self._read(q) if self._has(q) else None
                accused.update(note.accused if note else ())
                if note and note.error or self._ask(lambda q=q: self.store.check([_read_key(q)])):
                    left.discard(q)
            if time.monotonic() > begun + GRACE:
                left -= accused
            time.sleep(0.05)

    def _has(self, process: int) -> bool:
        return bool(self._ask(lambda: self.store.check([note_key(process)])))

    def _read(self, process: int) -> Note | None:
        raw = self._ask(lambda: self.store.get(note_key(process)))
        return Note(**json.loads(raw)) if raw else None

    def look_up(self, key: str) -> bytes | None:
        """What lies under a key of the store; None where there is nothing, or no store any more."""
        return self._ask(lambda: self.store.get(key)) if self._ask(lambda: self.store.check([key])) else None

    def _ask(self, request: Callable):
        """The store's answer; None when there is none in time, and then nobody asks again."""
        answers: list = []

        def ask() -> None:
            try:
                answers.append(request())
            except RuntimeError:  # its connection is closed
                self.store = None

        if self.store is None or not self._listens():
            return None
        # a store whose process was stopped blocks for ever, inside C++
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(GRACE)
        if thread.is_alive():
            self.store = None
        return answers[0] if answers else None

    def _listens(self) -> bool:
        """A store that has died would answer with pages of C++ frames on standard error."""
        if self.address is not None:
            try:
                socket.create_connection(self.address, timeout=GRACE).close()
            except OSError:
                self.store = None
        return self.store is not None


def note_key(process: int) -> str:
    return f"dfl/note/{process}"


def _read_key(process: int) -> str:
    """There once a process has read why a run ends."""
    return f"dfl/note/{process}/read"
