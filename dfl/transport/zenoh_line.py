"""One connection over zenoh (zenoh_mail.py): what its messages look like, and the thread that writes them."""

import contextlib
import secrets
import struct
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from dfl.transport.zenoh_session import MAX_PIECE, library

# kind; the connection, by the name that its receiver has given it; the number of the piece, or of a sign of life: of
# the last piece that has come; bytes of the whole message
HEAD = struct.Struct("<B8sQQ")
HELLO, REFUSED, LIFE, PIECE, ASK = range(1, 6)
NO_LINE = bytes(8)


class Line:
    """A connection with a start of a process, written by a thread of its own: who sends never waits for who reads.

    mine, theirs: what each end calls it; ready: both know both. number: of this one among all that this process began;
    newest: the highest that has been heard of the other's. given, received: pieces sent and taken; arrived: pieces that
    the other says that it has.
    """

    def __init__(self, session: Any, key: str, start: str, number: int, newest: int):
        self.start, self.mine, self.theirs = start, secrets.token_bytes(8), NO_LINE
        self.number, self.newest = number, newest
        self.ready = self.refused = False
        self.given = self.received = self.arrived = 0
        self._parts = bytearray()
        self._out: SimpleQueue[bytes | None] = SimpleQueue()
        zenoh = library()
        self._life = session.declare_publisher(key, priority=zenoh.Priority.INTERACTIVE_HIGH,
                                               congestion_control=zenoh.CongestionControl.DROP)
        self._publisher = session.declare_publisher(key, priority=zenoh.Priority.DATA,
                                                    reliability=zenoh.Reliability.RELIABLE,
                                                    congestion_control=zenoh.CongestionControl.BLOCK)
        self.writer = threading.Thread(target=self._write, name="dfl-write", daemon=True)
        self.writer.start()

    def message(self, data: bytes) -> None:
        for begin in range(0, len(data), MAX_PIECE) or (0,):
            self.given += 1
            self.put(HEAD.pack(PIECE, self.theirs, self.given, len(data)) + data[begin:begin + MAX_PIECE])

    def put(self, data: bytes) -> None:
        self._out.put(data)

    def life(self, data: bytes) -> None:
        """Past all that waits; where even that is not possible, nothing."""
        self._quietly(self._life.put, data)

    def take(self, number: int, size: int, data: bytes) -> bytes | None:
        """A piece; the message that it ends, or None. ValueError where one is missing. Memory is taken as pieces
        come."""
        if number != self.received + 1:
            raise ValueError(f"piece {number} came after piece {self.received}")
        self.received = number
        self._parts += data
        if len(self._parts) > size or not data and size:
            raise ValueError(f"sent {len(self._parts)} bytes where {size} were announced")
        if len(self._parts) < size:
            return None
        found, self._parts = bytes(self._parts), bytearray()
        return found

    def close(self) -> None:
        self.ready = False
        self._out.put(None)

    def _write(self) -> None:
        while (data := self._out.get()) is not None:
            self._quietly(self._publisher.put, data)
        self._quietly(self._publisher.undeclare)
        self._quietly(self._life.undeclare)

    def _quietly(self, function: Callable[..., None], *args: bytes) -> None:
        with contextlib.suppress(library().ZError):  # the session is closed, or the link: the token says so
            function(*args)
