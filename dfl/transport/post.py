"""Messages between the processes of a run that goes on without those it loses: a TCP connection for each pair, and no process, store
or port that all depend on. Beside them go signs of life, with whom a process waits for.

A connection begins with a hello of both sides, a line of JSON: who it is, what it was started with, and a proof that it knows the
secret of the run (HMAC-SHA256 over a number that the other has drawn); before that nothing else is read. It hides nothing: where
others can listen on the way, let it go through a tunnel.
"""

import contextlib
import fcntl
import json
import queue
import secrets
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dfl.transport.dialer import AGAIN_SECONDS, Dialer
from dfl.transport.hello import MAX_HELLO, Admission, checked_hello
from dfl.transport.mail import MAX_AWAITED, Address, Event, Life, RefusedError, packed

# kind of what follows, and its bytes
_HEAD = struct.Struct("<BQ")
_LIFE, _MESSAGE = 1, 2
HELLO_SECONDS = 5.0
_PIECE = 2**20


class Post:
    """This process's connections: a carrier (mail.py).

    about: what this process was started with; check(process, its about) -> why it does not belong here, or "". most: bytes of one.
    """

    def __init__(self, process: int, size: int, *, secret: bytes, about: Mapping[str, Any],
                 check: Callable[[int, Mapping[str, Any]], str], patience: float, listen: Address = ("", 0), host: str = "",
                 most: int = 2**31):
        self.process, self.most = process, most
        self.admission = Admission(process, size, secret, about, check)
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.life = Life(patience)
        self.waits: dict[int, tuple[int, ...]] = {}
        self.awaited: tuple[int, ...] = ()
        self.book: dict[int, Address] = {}
        self._dialer = Dialer(self.connect)
        self._instance = secrets.token_hex(8)  # of this start of the process
        self._lines: dict[int, _Line] = {}
        self._calling: dict[int, threading.Lock] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._socket = socket.create_server(listen, backlog=64)
        self.book[process] = (host or "127.0.0.1", self._socket.getsockname()[1])
        for work in (self._accept, self._show_life):
            threading.Thread(target=work, name=f"dfl-{work.__name__.strip('_')}", daemon=True).start()

    @property
    def refusals(self) -> list[str]:
        return self._dialer.refusals

    def meet(self, seeds: list[Address]) -> None:
        self._dialer.seeds = list(seeds)

    def call(self) -> None:
        book, there = dict(self.book), {*self.connected(), self.process}
        found = {book[process] for process in there if process in book}
        self._dialer.call({*self._dialer.seeds, *book.values()} - found)

    def connected(self) -> list[int]:
        with self._lock:
            return sorted(self._lines)

    def send(self, process: int, data: bytes) -> None:
        """Never waits; nothing happens where there is no connection, which an event has told."""
        with self._lock:
            line = self._lines.get(process)
        if line is not None:
            line.put(_MESSAGE, data)

    def connect(self, address: Address) -> int | None:
        """The process that listens there, connected; None where nobody answers. RefusedError where it does not want this one."""
        try:
            with contextlib.ExitStack() as undo:
                connection = undo.enter_context(socket.create_connection(address, timeout=HELLO_SECONDS))
                process = self._greet(connection, first=True)
                undo.pop_all()
                return process
        except RefusedError:
            raise
        except (OSError, ValueError):
            return None

    def cut(self, process: int) -> None:
        """Read nothing more of a process; a new connection of it begins anew."""
        with self._lock:
            line = self._lines.pop(process, None)
        if line is not None:
            line.close()

    def flush(self, seconds: float) -> None:
        """Until all has arrived, or so long."""
        until = time.monotonic() + seconds
        with self._lock:
            lines = list(self._lines.values())
        while not all(line.arrived for line in lines) and time.monotonic() < until:
            time.sleep(0.005)

    def close(self) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # an accept that waits notices
        self._socket.close()
        for process in self.connected():
            self.cut(process)

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or too many files are open just now
                self._ended.wait(AGAIN_SECONDS)
                continue
            threading.Thread(target=self._welcome, args=(connection,), name="dfl-welcome", daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        """A stranger gets a number that we have drawn, and then nothing."""
        try:
            connection.settimeout(HELLO_SECONDS)
            self._greet(connection, first=False)
        except (OSError, ValueError):
            connection.close()

    def _greet(self, connection: socket.socket, first: bool) -> int:
        """Hello of both sides; the other's process. first: this one has called.

        Of two processes the higher one calls the lower, so that there is one connection and both know which; a lower one that calls
        asks to be called.
        """
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = secrets.token_hex(16)
        _say(connection, {"dfl": 1, "nonce": nonce, "process": self.process, "instance": self._instance})
        opening = _hear(connection)
        if "dfl" not in opening:
            raise ValueError("no hello")
        if opening["instance"] == self._instance:
            raise OSError("this is the process itself, under another address")
        if not first:
            return self._answer(connection, opening, nonce)
        with self._calling.setdefault(opening["process"], threading.Lock()):
            if self._has(opening["process"], opening["instance"]):
                raise OSError("connected already")
            return self._call(connection, opening, nonce)

    def _has(self, process: int, instance: str) -> bool:
        with self._lock:
            line = self._lines.get(process)
        return line is not None and line.instance == instance

    def _hello(self, nonce: str, first: bool) -> dict[str, Any]:
        return self.admission.hello(f"{nonce} {first}", self.book[self.process])

    def _call(self, connection: socket.socket, opening: Mapping[str, Any], nonce: str) -> int:
        _say(connection, self._hello(opening["nonce"], True))
        process = self._checked_hello(connection, opening, nonce, False)
        if process > self.process:
            connection.close()
        else:
            self._take(process, connection, opening["instance"])
        return process

    def _answer(self, connection: socket.socket, opening: Mapping[str, Any], nonce: str) -> int:
        process = self._checked_hello(connection, opening, nonce, True)
        book = {str(other): at for other, at in dict(self.book).items()}  # other connections' threads add to it
        _say(connection, self._hello(opening["nonce"], False) | {"book": book})
        if process < self.process:
            connection.close()
            if not self._has(process, opening["instance"]):
                self.connect(self.book[process])
        else:
            self._take(process, connection, opening["instance"])
        return process

    def _checked_hello(self, connection: socket.socket, opening: Mapping[str, Any], nonce: str, first: bool) -> int:
        """The other's process. RefusedError, on both sides, for one that does not belong here."""
        hello = _hear(connection)
        if "refused" in hello:
            raise RefusedError(str(hello["refused"])[:1000])
        process = hello["process"]
        two_names = "" if process == opening["process"] else "it has two names"
        refused = self.admission.refused(process, hello, f"{nonce} {first}") or two_names
        if refused:
            self.events.put(Event("refused", process, text=refused))
            _say(connection, {"refused": refused})
            raise RefusedError(refused)
        self.admission.learn(self.book, process, hello)
        return process

    def _take(self, process: int, connection: socket.socket, instance: str) -> None:
        """From now on this is the connection with a process; one with an earlier start of it ends."""
        connection.settimeout(None)
        line = _Line(connection, instance)
        with self._lock:
            before, self._lines[process] = self._lines.get(process), line
        self.life.begin(process)
        if before is not None:
            before.close()
        threading.Thread(target=self._read, args=(process, line), name=f"dfl-from-{process}", daemon=True).start()

    def _read(self, process: int, line: "_Line") -> None:
        """All that comes on one connection."""
        try:
            while True:
                kind, size = _HEAD.unpack(self._bytes(process, line, _HEAD.size))
                most = self.most if kind == _MESSAGE else 8 * MAX_AWAITED
                if kind not in (_LIFE, _MESSAGE) or size > most:
                    raise ValueError(f"announced {size} bytes of kind {kind}; allowed: up to {most}")
                data = self._bytes(process, line, size)
                if kind == _MESSAGE:
                    self.events.put(Event("message", process, data))
                else:
                    self.waits[process] = struct.unpack(f"<{size // 8}q", data[:size // 8 * 8])
        except ValueError as error:
            self._lost(process, line, "harm", str(error))
        except OSError:
            self._lost(process, line, "gone", "its connection closed")
        finally:
            line.connection.close()

    def _bytes(self, process: int, line: "_Line", size: int) -> bytes:
        """Memory is taken as bytes come, not as they are announced."""
        found = bytearray()
        while len(found) < size:
            piece = line.connection.recv(min(_PIECE, size - len(found)))
            if not piece:
                raise OSError("closed")
            found += piece
            self.life.hear(process)
        return bytes(found)

    def _lost(self, process: int, line: "_Line", kind: str, text: str) -> None:
        line.close()
        with self._lock:
            ours = self._lines.get(process) is line
            if ours:
                del self._lines[process]
        if ours and not self._ended.is_set():
            self.events.put(Event(kind, process, text=text))

    def _show_life(self) -> None:
        while not self._ended.wait(self.life.tick):
            self.life.count()
            told = packed(self.awaited)
            with self._lock:
                lines = list(self._lines.values())
            for line in lines:
                if not line.busy:
                    line.put(_LIFE, told)


class _Line:
    """A connection, written by a thread of its own: who sends never waits for who reads."""

    def __init__(self, connection: socket.socket, instance: str):
        self.connection, self.instance, self._broken = connection, instance, False
        self._out: queue.Queue[tuple[int, bytes] | None] = queue.Queue()
        threading.Thread(target=self._write, name="dfl-write", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether something has not been written yet."""
        return not self._broken and self._out.unfinished_tasks > 0

    @property
    def arrived(self) -> bool:
        """Whether nothing is left to write, and all has been received at the other end."""
        return self._broken or not self.busy and _on_the_way(self.connection) == 0

    def put(self, kind: int, data: bytes) -> None:
        self._out.put((kind, data))

    def close(self) -> None:
        self._out.put(None)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        try:
            while (one := self._out.get()) is not None:
                self.connection.sendall(_HEAD.pack(one[0], len(one[1])))
                self.connection.sendall(one[1])
                self._out.task_done()
        except OSError:  # who reads notices
            pass
        self._broken = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)


def _on_the_way(connection: socket.socket) -> int:
    """Bytes that the other end has not acknowledged; what is closed before loses them where it has something unread itself."""
    try:
        return struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
    except (OSError, ValueError):  # it is closed
        return 0


def _say(connection: socket.socket, tree: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(tree).encode() + b"\n")


def _hear(connection: socket.socket) -> dict[str, Any]:
    """A line of JSON. ValueError for anything else, or a long one."""
    found, until = bytearray(), time.monotonic() + HELLO_SECONDS
    while not found.endswith(b"\n"):
        piece = connection.recv(1)  # not a byte of what comes behind it
        if not piece or len(found) > MAX_HELLO or time.monotonic() > until:
            raise ValueError("no hello")
        found += piece
    tree = json.loads(found)
    if not isinstance(tree, dict):
        raise ValueError("no hello")
    try:
        return _checked(tree)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("no hello") from None


def _checked(tree: dict[str, Any]) -> dict[str, Any]:
    if "refused" in tree:
        return tree
    if "dfl" in tree:
        if not all(isinstance(tree[name], kind) for name, kind in (("nonce", str), ("process", int), ("instance", str))):
            raise ValueError("no hello")
        return tree
    return checked_hello(tree)
