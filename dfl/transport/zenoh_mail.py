"""Messages between the processes of a run that goes on without those it loses, over zenoh: a carrier (mail.py) for
several sites.

zenoh finds the others from the address of any of them, keeps the links, encrypts them and lets nobody in without a
certificate of the run (zenoh_session.py). Those that it has lost, or cannot find, it is led to by the addresses that
members tell (forwarder.py). A liveliness token says that a process is there, and that it has gone. Above
it lies what zenoh does not promise: both ends say hello before anything counts, pieces are numbered, so that a lost one
is noticed, and an old connection's are ignored.
"""

import contextlib
import itertools
import json
import secrets
import struct
import threading
import time
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, NamedTuple

from dfl.transport.certificates import Identity
from dfl.transport.forwarder import Forwarder
from dfl.transport.hello import MAX_HELLO, Admission, checked_hello
from dfl.transport.mail import MAX_AWAITED, Address, Event, Life, packed
from dfl.transport.zenoh_line import ASK, HEAD, HELLO, LIFE, NO_LINE, PIECE, REFUSED, Line
from dfl.transport.zenoh_session import alive_key, full_queue_seconds, key_of, library, open_session, reserve

CLOSE_SECONDS = 5.0


class _Seen(NamedTuple):
    """What zenoh reports: a token that is there or has gone, or what a process sent."""

    process: int
    start: str = ""
    there: bool = False
    data: bytes | None = None


class ZenohMail:
    """about, check, secret: as Admission has them; identity: certificates, or None within one machine; most: bytes of
    one message."""

    def __init__(self, process: int, size: int, *, secret: bytes, about: Mapping[str, Any],
                 check: Callable[[int, Mapping[str, Any]], str], patience: float, listen: Address = ("127.0.0.1", 0),
                 host: str = "127.0.0.1", identity: Identity | None = None, most: int = 2**31):
        library()
        self.process, self.size, self.identity, self.most = process, size, identity, most
        self.admission = Admission(process, size, secret, about, check)
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.life = Life(patience)
        self.waits: dict[int, tuple[int, ...]] = {}
        self.awaited: tuple[int, ...] = ()
        self.refusals: list[str] = []
        self._held, self._listen = reserve(listen, host)
        self.book: dict[int, Address] = {process: (host, self._listen[1])}
        self._start = secrets.token_hex(8)  # of this start of the process
        self._lines: dict[int, Line] = {}
        self._there: dict[int, str] = {}  # the start of each process whose token came last and has not gone
        self._numbers = itertools.count(1)
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._seen: SimpleQueue[_Seen | None] = SimpleQueue()
        self._session: Any = None
        self._forwarder: Forwarder | None = None
        self._missed: dict[int, float] = {}  # since when each is known and not connected

    def meet(self, seeds: list[Address]) -> None:
        self._held.close()
        others = [seed for seed in dict.fromkeys(seeds) if seed != self.book[self.process]]
        self._forwarder = Forwarder(set(range(self.size)) - {self.process}, self._wanted)
        addresses = [*others, *self._forwarder.places.values()]
        self._session = open_session(self._listen, addresses, self.size, self.life.patience, self.identity)
        zenoh = library()

        def direct(function: Callable[[Any], None]):  # zenoh's own way makes threads that keep the process from ending
            return zenoh.handlers.Callback(function, indirect=False)

        self._session.declare_subscriber(key_of(self.process, "*"), direct(self._on_sample))
        self._session.liveliness().declare_subscriber(alive_key("*", "*"), direct(self._on_token), history=True)
        self._token = self._session.liveliness().declare_token(alive_key(self.process, self._start))
        for work in (self._handle_all, self._show_life):
            threading.Thread(target=work, name=f"dfl-{work.__name__.strip('_')}", daemon=True).start()

    # zenoh calls these in its own threads, where nothing may wait
    def _on_sample(self, sample: Any) -> None:
        self._seen.put(_Seen(_number(str(sample.key_expr).rsplit("/", 1)[1]), data=sample.payload.to_bytes()))

    def _on_token(self, sample: Any) -> None:
        _, process, start = str(sample.key_expr).rsplit("/", 2)
        self._seen.put(_Seen(_number(process), start, sample.kind == library().SampleKind.PUT))

    def call(self) -> None:
        """zenoh connects; hellos go with the signs of life."""

    def _wanted(self, process: int) -> Address | None:
        """Where a process is that zenoh does not find. Of two that miss each other the higher one calls first."""
        with self._lock:
            missed, address = self._missed.get(process), self.book.get(process)
        late = self.life.patience / (4 if process < self.process else 2)
        return address if missed is not None and time.monotonic() - missed >= late else None

    def _look_for_missed(self) -> None:
        """Since when each is not connected that belongs here and has told, or was told, where it is."""
        for process in self.book.keys() - {self.process}:
            line = self._lines.get(process)
            if line is not None and (line.ready or line.refused):
                self._missed.pop(process, None)
            else:
                self._missed.setdefault(process, time.monotonic())

    def connected(self) -> list[int]:
        with self._lock:
            return sorted(process for process, line in self._lines.items() if line.ready)

    def send(self, process: int, data: bytes) -> None:
        with self._lock:
            line = self._lines.get(process)
            if line is not None and line.ready:
                line.message(data)

    def cut(self, process: int) -> None:
        with self._lock:
            if process in self._lines:
                self._begin(process, self._lines[process].start)

    def flush(self, seconds: float) -> None:
        """Until all has arrived."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with self._lock:
                late = [line for line in self._lines.values() if line.ready and line.arrived < line.given]
            if not late:
                return
            for line in late:
                line.put(HEAD.pack(ASK, line.theirs, 0, 0))
            time.sleep(0.005)

    def close(self) -> None:
        self._ended.set()
        self._seen.put(None)
        with self._lock:
            lines, self._lines = self._lines, {}
        for line in lines.values():
            line.close()
        self._held.close()
        if self._forwarder is not None:
            self._forwarder.close()
        if self._session is not None:
            with contextlib.suppress(library().ZError):  # a link takes nothing, and zenoh has waited long enough
                self._session.close()
        # a thread that is still in zenoh when the interpreter ends takes the process with it
        until = time.monotonic() + full_queue_seconds(self.life.patience) + CLOSE_SECONDS
        for line in lines.values():
            line.writer.join(max(0.0, until - time.monotonic()))

    def _begin(self, process: int, start: str) -> None:
        """A new connection with a start of a process, in place of the one there was."""
        before = self._lines.get(process)
        newest = before.newest if before is not None and before.start == start else 0
        if before is not None:
            before.close()
        self._lines[process] = line = Line(self._session, key_of(process, self.process), start, next(self._numbers), newest)
        line.put(self._hello(line))

    def _lost(self, process: int, line: Line, kind: str, text: str, start: str = "") -> None:
        """The end of a connection. With a start of the process another one begins."""
        was_ready = line.ready
        if start:
            self._begin(process, start)
        else:
            line.close()
            del self._lines[process]
        if was_ready:
            self.events.put(Event(kind, process, text=text))

    def _hello(self, line: Line) -> bytes:
        """challenge: the names that both ends have drawn. Without the other's there is no proof yet."""
        tree = self.admission.hello(_challenge(line.start, line.mine), self.book[self.process])
        tree |= {"start": self._start, "to": line.start, "line": line.mine.hex(), "number": line.number, "received": line.theirs.hex(),
                 "book": {str(other): at for other, at in self.book.items()}}
        return HEAD.pack(HELLO, NO_LINE, 0, 0) + json.dumps(tree).encode()

    def _handle_all(self) -> None:
        while (seen := self._seen.get()) is not None:
            if seen.process != self.process and 0 <= seen.process < self.size:
                with self._lock:
                    if not self._ended.is_set():
                        self._handle(seen)

    def _handle(self, seen: _Seen) -> None:
        line = self._lines.get(seen.process)
        if seen.data is None:
            self._handle_token(seen, line)
            return
        try:
            kind, name, number, size = HEAD.unpack_from(seen.data)
            if kind in (HELLO, REFUSED):
                self._handle_hello(seen.process, kind, seen.data[HEAD.size:])
            elif line is not None and line.ready and name == line.mine:
                self.life.hear(seen.process)
                self._handle_word(seen.process, line, kind, number, size, seen.data[HEAD.size:])
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if line is not None and line.ready:
                self._lost(seen.process, line, "harm", " ".join(str(error).split())[:200], line.start)

    def _handle_token(self, seen: _Seen, line: Line | None) -> None:
        if seen.there:
            self._there[seen.process] = seen.start
            if line is None:
                self._begin(seen.process, seen.start)
            elif line.start != seen.start:
                self._lost(seen.process, line, "gone", "it was started again", seen.start)
            return
        if self._there.get(seen.process) == seen.start:
            del self._there[seen.process]
        if line is not None and line.start == seen.start:
            self._lost(seen.process, line, "gone", "its connection closed", self._there.get(seen.process, ""))

    def _handle_hello(self, process: int, kind: int, data: bytes) -> None:
        tree = json.loads(data) if len(data) <= MAX_HELLO else None
        if not isinstance(tree, dict):
            raise ValueError("no hello")
        if kind == REFUSED:
            line, text = self._lines.get(process), str(tree["refused"])[:1000]
            if line is not None and not line.ready and text not in self.refusals:
                self.refusals.append(text)
            return
        hello, theirs, received = checked_hello(tree), bytes.fromhex(tree["line"]), bytes.fromhex(tree["received"])
        start, number = tree["start"], tree["number"]
        if len(theirs) != 8 or not isinstance(start, str) or not isinstance(number, int):
            raise ValueError("no hello")
        if tree["to"] != self._start:
            return  # for an earlier start of this process: no proof for this one
        line = self._lines.get(process)
        if line is not None and line.start == start and number < line.newest:
            return  # of a connection that has ended: two connections' hellos may overtake each other
        if line is None:
            self._begin(process, start)
        elif line.start != start or line.ready and line.theirs != theirs:
            self._lost(process, line, "gone", "its connection closed", start)
        line = self._lines[process]
        line.newest = number
        self._meet(process, line, hello, theirs, received)

    def _meet(self, process: int, line: Line, hello: Mapping[str, Any], theirs: bytes, received: bytes) -> None:
        """A hello of the other end of a connection that is to be."""
        refused = self.admission.refused(process, hello, _challenge(self._start, theirs))
        if hello["process"] != process:
            refused = f"process {process} calls itself {hello['process']}"
        if refused:
            if not line.refused:
                line.refused = True
                self.events.put(Event("refused", process, text=refused))
            line.put(HEAD.pack(REFUSED, NO_LINE, 0, 0) + json.dumps({"refused": refused}).encode())
            return
        line.theirs = theirs
        self.admission.learn(self.book, process, hello)
        begins = received == line.mine and not line.ready
        if begins or received != line.mine:
            line.put(self._hello(line))
        if begins:  # before anything else goes out
            line.ready = True
            self.life.begin(process)

    def _handle_word(self, process: int, line: Line, kind: int, number: int, size: int, data: bytes) -> None:
        if kind == LIFE and len(data) == size <= 8 * MAX_AWAITED:
            line.arrived = number
            self.waits[process] = struct.unpack(f"<{size // 8}q", data[:size // 8 * 8])
        elif kind == ASK:
            self._tell_life(line)
        elif kind == PIECE:
            if size > self.most:
                raise ValueError(f"announced {size} bytes; allowed: up to {self.most}")
            found = line.take(number, size, data)
            if found is not None:
                self.events.put(Event("message", process, found))
        else:
            raise ValueError(f"sent {len(data)} bytes of kind {kind}")

    def _show_life(self) -> None:
        while not self._ended.wait(self.life.tick):
            self.life.count()
            with self._lock:
                self._look_for_missed()
                for line in self._lines.values():
                    if line.ready:
                        self._tell_life(line)
                    elif not line.refused:
                        line.put(self._hello(line))

    def _tell_life(self, line: Line) -> None:
        told = packed(self.awaited)
        line.life(HEAD.pack(LIFE, line.theirs, line.received, len(told)) + told)


def _challenge(start: str, line: bytes) -> str:
    """What a proof is of: the start of the process that checks it, and the name of the connection of the one that gives
    it."""
    return f"{start} {line.hex()}"


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 9 else -1


