"""What carries the messages of a run that goes on without those it loses, whatever the way: what a carrier offers
(`Mail`), what it reports (`Event`), and how silence is counted (`Life`). post.py carries over TCP connections.
"""

import struct
import time
from queue import SimpleQueue
from typing import NamedTuple, Protocol

# a sign of life names at most so many whom a process waits for
MAX_AWAITED = 4096
Address = tuple[str, int]


class Event(NamedTuple):
    """What happened: "message" with its bytes; "gone", "harm" or "refused" with a text. About whom."""

    kind: str
    process: int
    data: bytes = b""
    text: str = ""


def packed(awaited: tuple[int, ...]) -> bytes:
    """What a sign of life says. Given the tuple, as the main thread may put another in its place meanwhile."""
    return struct.pack(f"<{len(awaited)}q", *awaited)


class RefusedError(ValueError):
    """The other side does not want this process, and says why."""


class Life:
    """How long others have shown no sign of life. A gap in our own time, as of a machine that was asleep, is nobody's
    silence."""

    def __init__(self, patience: float):
        self.patience, self.tick = patience, min(1.0, patience / 8)
        self._heard: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._quiet: dict[int, float] = {}
        self._at = time.monotonic()

    def hear(self, process: int) -> None:
        self._heard[process] = self._heard.get(process, 0) + 1

    def begin(self, process: int) -> None:
        self._quiet[process] = 0.0

    def count(self) -> None:
        """Once a tick."""
        now = time.monotonic()
        gap, self._at = min(now - self._at, 2 * self.tick), now
        for process in list(self._quiet):
            heard = self._heard.get(process, 0)
            self._quiet[process] = 0.0 if heard != self._seen.get(process) else self._quiet[process] + gap
            self._seen[process] = heard

    def shown(self, process: int) -> bool:
        """Whether it has been heard within the last two ticks."""
        return self._quiet.get(process, 0.0) < 2 * self.tick

    def silent(self, process: int) -> bool:
        return self._quiet.get(process, 0.0) >= self.patience


class Mail(Protocol):
    """events: what arrives, in the order of each sender. waits: by process, whom it says that it waits for; awaited:
    whom this one does, which its signs of life say. book: where processes can be reached, as far as known. refusals:
    why members do not want this process, as they said."""

    events: SimpleQueue[Event]
    life: Life
    waits: dict[int, tuple[int, ...]]
    awaited: tuple[int, ...]
    book: dict[int, Address]

    @property
    def refusals(self) -> list[str]: ...

    def meet(self, seeds: list[Address]) -> None:
        """Begin to look for others: at these addresses, and at those that they tell."""

    def call(self) -> None:
        """Connect to those that are known and not connected. Never waits; to be called again and again."""

    def connected(self) -> list[int]:
        """Whom messages reach now, ascending."""
        ...

    def send(self, process: int, data: bytes) -> None:
        """Never waits; nothing happens where there is no connection, which an event has told."""

    def cut(self, process: int) -> None:
        """Read nothing more of a process, which notices; a new connection of it begins anew."""

    def flush(self, seconds: float) -> None:
        """Until all has left, or so long."""

    def close(self) -> None: ...
