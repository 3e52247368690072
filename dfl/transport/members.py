"""The processes of a run that goes on without those it loses: frames between its members, and how they settle who these are.

In place of a process group (group.py): `begin` and `end` send and receive what a step of the run needs, or raise ViewChange as soon
as anybody is known to be gone, broken, or to have joined. Then every member stops where it is and calls `settle`, from which all come
back with the same members, and with what each has told of itself.
"""

import json
import math
import struct
import sys
import time
from collections.abc import Callable
from queue import Empty
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfl.transport import frames
from dfl.transport.mail import Event, Mail
from dfl.transport.view import Known, Member, Settling, of_one_run
from dfl.transport.watch import LARGEST_GAP, held_up_by

# what a message is, and the start of the process that sends it
_HEAD = struct.Struct("<BI")
_HAIL, _BOOK, _STATE, _FRAME, _LEAVE, _DONE = range(1, 7)
# of a frame: the view that it belongs to, and its number among those of this sender in it
_PLACE = struct.Struct("<8sQ")
# who is accused has this long to answer before the others go on without it
ANSWER_SECONDS = 0.2
# what is known is told again after this time, while it is being settled
AGAIN_SECONDS = 1.0
# frames of one sender that nobody has asked for yet
MAX_AHEAD = 256


class ViewChange(Exception):  # noqa: N818 - nothing is wrong: the members have to settle
    """The members are not those of the last settlement any more. No OSError: nobody may take it for a failed write."""


class LeftOutError(ConnectionError):
    """The others go on without this process."""


class FinishedError(Exception):
    """A member says that all have come to the end, so there is nobody left to wait for."""


class FaultError(ConnectionError):
    """A process sent what no member sends."""

    def __init__(self, process: int, text: str):
        super().__init__(text)
        self.process = process


class Step(NamedTuple):
    """places: of what is received, its view and number, by process."""

    sent: dict[int, Tensor]
    received: dict[int, Tensor]
    places: dict[int, tuple[bytes, int]]


class Members:
    """mail: connections to others; process: which of `size` this is; timeout: seconds that a living member may take for a step.

    members: those of the last settlement, by process; alone before the first. reasons: why others have gone, by member.
    """

    store = device = None  # nothing is needed after the start
    wire = torch.device("cpu")

    def __init__(self, mail: Mail, process: int, size: int, timeout: float):
        self.mail, self.rank, self.size, self.timeout = mail, process, size, timeout
        self.me = Member(process)
        self.members: tuple[Member, ...] = (self.me,)
        self.reasons: dict[Member, str] = {}
        self.describe: Callable[[int], str] = lambda q: f"process {q}"
        self._settling = Settling(self.me, Known().with_joined(self.me), None)
        self._changed, self.open, self._view = False, True, b""
        self._accused_at = 0.0
        self.connect: Callable[[], None] = lambda: None  # makes connections to those that are known and not connected
        # what others have answered, before this one has joined
        self._heard: dict[int, tuple[Member, Known, bool]] | None = None
        self.ending = False  # this process has come to the end, and waits for the others
        self._finished = False
        self._told_out: dict[int, float] = {}  # when each that is out was told so
        self._outnumbered: str | None = None  # another run goes on without this one, and before it
        self._looked_at = 0.0
        self._last_words: list[bytes] = []
        self._inbox: dict[int, dict[tuple[bytes, int], bytes]] = {}
        self._reset()

    def _reset(self) -> None:
        """A view begins: frames count anew, and those of others that are in it already wait."""
        self._sent: dict[int, int] = {}
        self._wanted: dict[int, int] = {}
        self._inbox = {q: {place: data for place, data in found.items() if place[0] == self._view} for q, found in self._inbox.items()}

    @property
    def processes(self) -> list[int]:
        """Of the members, ascending."""
        return [member.process for member in self.members]

    def hail(self, seconds: float) -> bool:
        """Ask who is there, and take a start that none before this one of the process has had; whether the run goes on already.

        Where nobody is at work yet, all are waited for.
        """
        until, self._heard = time.monotonic() + seconds, {}
        asked: dict[int, float] = {}
        while time.monotonic() < until and not self._enough():
            self.connect()
            for process in set(self.mail.connected()) - set(self._heard):
                if time.monotonic() > asked.get(process, 0.0) + AGAIN_SECONDS:
                    asked[process] = time.monotonic()
                    self._send(process, _HAIL)
            self._take(0.02)
        books, self._heard = self._heard.values(), None
        starts = [member.start for _, known, _ in books for member in known.joined if member.process == self.rank]
        self.me = Member(self.rank, max(starts, default=-1) + 1)
        known = of_one_run((sender, known) for sender, known, _ in books)
        self.members, self._settling = (self.me,), Settling(self.me, known.with_joined(self.me), None)
        self._tell_all()
        return any(begun for *_, begun in books)

    def _enough(self) -> bool:
        """All have answered, or, of a run that goes on, all that are connected."""
        begun = any(begun for *_, begun in self._heard.values())
        wanted = self.mail.connected() if begun else set(range(self.size)) - {self.rank}
        return set(wanted) <= set(self._heard)

    def await_all(self, seconds: float) -> None:
        """Until all processes have joined, or so long: who comes later comes to a run that goes on."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(self._settling.known.latest()) < self.size:
            self.connect()
            self._take(0.02)

    def settle(self, info: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """Agree with all others on the members, and get what each of them told of itself, by process.

        LeftOutError where the others go on without this one. Who lives and does not come within the time-out is left behind.
        """
        self._settling.info, told = info, 0.0
        deadline = _Deadline(time.monotonic() + self.timeout)
        while True:
            if time.monotonic() > told + AGAIN_SECONDS:
                told = time.monotonic()
                self._tell_all()
            self.connect()
            self._take(0.02)
            self._ends()
            self._look_for_silent()
            if self.me not in self._settling.known.members():
                self._begin_anew()
            missing = [member.process for member in self._settling.waits_for()]
            self.mail.awaited = tuple(missing)
            if not missing and time.monotonic() > self._accused_at + ANSWER_SECONDS and not self._will_answer():
                return self._settled()
            if deadline.passed() and missing:
                for process in missing:
                    self.accuse(process, f"did not settle with the others within {self.timeout:g} s")
                deadline = _Deadline(time.monotonic() + self.timeout)

    def _will_answer(self) -> bool:
        """Whether another accuses somebody who may answer: for one patience more, as the machine may be busy, and of a liar whom two
        put out at once each would else lose the other. Of somebody who shows life here, where the other is a member; where it is
        none, it may be a liar, and all that are not silent have that long."""
        known, life = self._settling.known, self.mail.life
        if time.monotonic() > self._accused_at + life.patience:
            return False
        members, connected = known.members(), self.mail.connected()
        mine = {one.of for one in known.accused if one.by == self.me}
        open_ones = [one for one in known.accused - known.denied
                     if self.me not in one and one.of not in mine and not {one.by, one.of} & known.out]
        return any(one.of.process in connected and life.shown(one.of.process) if one.by in members else
                   not life.silent(one.of.process) for one in open_ones)

    def _settled(self) -> dict[int, dict[str, Any]]:
        infos: dict[int, Any] = {member.process: info for member, info in self._settling.infos().items()}
        known = self._settling.known.settled()
        # who has missed them may know already who is out since
        self._last_words = [_state(one, self._settling.info, again=True) for one in (self._settling.known, known)]
        self.members, self._view = known.members(), known.digest()
        self._settling, self._changed = Settling(self.me, known, None), False
        for process in set(self.mail.connected()) - set(self.processes):
            if any(member.process == process for member in known.out):
                self._send(process, _STATE, self._state())  # so that it knows
        self._reset()
        return infos

    def _begin_anew(self) -> None:
        """Another start of this process was a member, of which it did not know. LeftOutError for one that was a member itself."""
        if self._view:
            raise LeftOutError(self._why_left_out())
        known, info = self._settling.known, self._settling.info
        self.me = Member(self.rank, 1 + max(member.start for member in known.joined if member.process == self.rank))
        self._settling = Settling(self.me, known.with_joined(self.me), info)
        self._tell_all()

    def _why_left_out(self) -> str:
        by = sorted({one.by.process for one in self._settling.known.accused if one.of == self.me})
        why = f"{' and '.join(map(self.describe, by))} could not hear it in time" if by else "it could not hear some whom others hear"
        return f"the others go on without this process: {why}; started again, it comes back"

    def accuse(self, process: int, text: str) -> None:
        """Go on without a process; after the word that all have ended nobody is missed."""
        member = next((one for one in self._settling.known.members() if one.process == process), None)
        if member is None or member == self.me or self._finished:
            return
        self.reasons.setdefault(member, text)
        print(f"dfl: going on without {self.describe(process)}: {text}", file=sys.stderr, flush=True)
        self._accused_at = time.monotonic()
        if self._settling.learn(Known().accuse(self.me, member)):
            self._changed = True
            self._tell_all()

    def check(self) -> None:
        """ViewChange where the members have to settle; asked now and then while there is something else to do."""
        self._take(0.0)
        self._ends()
        self._look_for_silent()
        self._look_for_lost()
        if self._changed:
            raise ViewChange

    def _ends(self) -> None:
        if self._finished:
            raise FinishedError
        if self._outnumbered is not None:
            raise LeftOutError(self._outnumbered)

    def begin(self, sent: dict[int, Tensor], received: dict[int, Tensor]) -> "Step":
        """Send all of it; what is received is waited for by `end`."""
        assert {*sent, *received} <= set(self.processes), (sorted({*sent, *received}), self.processes)
        for q, tensor in sent.items():
            number = self._sent[q] = self._sent.get(q, 0) + 1
            self._send(q, _FRAME, _PLACE.pack(self._view, number) + tensor.numpy().tobytes())
        places = {}
        for q in received:
            number = self._wanted[q] = self._wanted.get(q, 0) + 1
            places[q] = (self._view, number)
        return Step(sent, received, places)

    def end(self, step: "Step", deadline: float, watch, waiter) -> tuple[list[int], bool]:
        """Wait for all that is received, or ViewChange."""
        places, late = step.places, _Deadline(deadline)
        while missing := [q for q, place in places.items() if place not in self._inbox.get(q, {})]:
            self.mail.awaited = tuple(missing)
            if late.passed():
                for q in held_up_by(missing, self.rank, lambda process: self.mail.waits.get(process, ())):
                    self.accuse(q, f"lives, but did not answer for {self.timeout:g} s")
            self._take(0.05)
            self.check()
        self.mail.awaited = ()
        self.check()
        for q, place in places.items():
            self._put(q, self._inbox[q].pop(place), step.received[q])
        return [], False

    def _put(self, q: int, data: bytes, buffer: Tensor) -> None:
        if not frames.HEADER <= len(data) <= len(buffer):
            raise FaultError(q, f"sent a message of {len(data)} bytes; allowed: {frames.HEADER} to {len(buffer)}")
        buffer[:len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def _look_for_silent(self) -> None:
        for member in self._settling.known.members():
            if member != self.me and self.mail.life.silent(member.process):
                self.accuse(member.process, f"has shown no life for {self.mail.life.patience:g} s")

    def _look_for_lost(self) -> None:
        """Now and then call those that went, as they may only have been out of reach, and tell those that are no members what is
        known here: of two runs that go on without each other one ends."""
        now = time.monotonic()
        if now > self._looked_at + max(self.mail.life.patience, AGAIN_SECONDS):
            self._looked_at = now
            self.connect()
            for process in set(self.mail.connected()) - set(self.processes):
                self._send(process, _STATE, self._state())

    def _send(self, process: int, kind: int, data: bytes = b"") -> None:
        self.mail.send(process, _HEAD.pack(kind, self.me.start) + data)

    def _state(self) -> bytes:
        return _state(self._settling.known, self._settling.info)

    def _tell_all(self) -> None:
        told = self._state()
        for process in self.mail.connected():
            self._send(process, _STATE, told)

    def _take(self, seconds: float) -> None:
        """All that has arrived; waits so long for the first."""
        try:
            event = self.mail.events.get(timeout=seconds) if seconds else self.mail.events.get_nowait()
            while True:
                self._handle(event)
                event = self.mail.events.get_nowait()
        except Empty:
            pass

    def _handle(self, event: Event) -> None:
        if event.kind == "refused":
            print(f"dfl: refused: {event.text}", file=sys.stderr, flush=True)
        elif event.kind != "message":
            self.accuse(event.process, self._last_word(event) if event.kind == "gone" else event.text)
        else:
            try:
                self._read(event.process, event.data)
            except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
                self.mail.cut(event.process)
                self.accuse(event.process, f"sent what no member sends: {' '.join(str(error).split())[:200]}")

    def _last_word(self, event: Event) -> str:
        """Why a process has gone, as it told itself."""
        member = next((one for one in self._settling.known.members() if one.process == event.process), None)
        return event.text if member is None else self.reasons.get(member, event.text)

    def _read(self, process: int, data: bytes) -> None:
        kind, start = _HEAD.unpack_from(data)
        sender = Member(process, start)
        if kind == _HAIL:
            known = Known() if self._heard is not None else self._settling.known
            self._send(process, _BOOK, json.dumps({"known": known.text(), "begun": bool(self._view)}).encode())
        elif kind == _BOOK:
            tree = json.loads(data[_HEAD.size:])
            if self._heard is not None:
                self._heard[process] = sender, Known.parse(tree["known"], self.size), bool(tree["begun"])
        elif self._heard is not None:  # this process has not joined yet
            pass
        elif kind == _STATE:
            self._learn(sender, json.loads(data[_HEAD.size:]))
        elif kind == _LEAVE:
            self.reasons[sender] = " ".join(str(json.loads(data[_HEAD.size:])).split())[:1000]
        elif kind == _DONE:
            if not self.ending:
                raise ValueError("the word that all have ended, which this process has not")
            self._finished = True
        elif kind == _FRAME:
            view, number = _PLACE.unpack_from(data, _HEAD.size)
            held = self._inbox.setdefault(process, {})
            if len(held) >= MAX_AHEAD:
                raise ValueError(f"{len(held)} messages that nobody waits for")
            held[view, number] = data[_HEAD.size + _PLACE.size:]
        else:
            raise ValueError(f"a message of kind {kind}")

    def _learn(self, sender: Member, tree: dict[str, Any]) -> None:
        known, info = Known.parse(tree["known"], self.size), tree["info"]
        if info is not None and not isinstance(info, dict):
            raise ValueError(f"what it tells of itself is no table: {str(info)[:80]}")
        if sender not in known.joined:
            raise ValueError("it has not joined itself")
        verdict = self._settling.verdict(sender, known) if self._view else "learn"
        if verdict == "leave":
            there, here = len(known.members()), len(self._settling.known.members())
            self._outnumbered = f"the others go on without this process: {there} with {self.describe(sender.process)}, here are " \
                                f"{here}; started again, it comes back"
        elif verdict == "accuse":
            self.accuse(sender.process, "goes on without this process")
        elif verdict == "tell" or sender in self._settling.known.out:
            self._tell_it_is_out(sender.process)
        else:
            self._join(sender, known, info, bool(tree["again"]))

    def _join(self, sender: Member, known: Known, info: dict[str, Any] | None, again: bool) -> None:
        before = self._settling.known
        if self._settling.receive(sender, known, info):
            self._changed = True
            for member in self._settling.known.joined - before.joined:  # it has so long to be heard here
                self.mail.life.begin(member.process)
            if self._settling.known.accused != before.accused:
                self._accused_at = time.monotonic()
            self._tell_all()
        elif info is not None and not again and self._settling.info is None and self._view:
            # it has missed what this one said when it settled
            for word in self._last_words:
                self._send(sender.process, _STATE, word)

    def _tell_it_is_out(self, process: int) -> None:
        """It may think the same of this one: an answer to every answer would never end."""
        if time.monotonic() > self._told_out.get(process, -math.inf) + AGAIN_SECONDS:
            self._told_out[process] = time.monotonic()
            self._send(process, _STATE, self._state())

    def leave(self, text: str) -> None:
        """Tell the others why, and go."""
        for process in self.mail.connected():
            self._send(process, _LEAVE, json.dumps(text).encode())
        self.close()

    def finish(self) -> None:
        """All have come to the end: tell it those who still wait, and go."""
        for process in self.mail.connected():
            self._send(process, _DONE)
        self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self.mail.flush(2.0)
            self.mail.close()

    abort = close


class _Deadline:
    """A time that every gap in our own time between two looks moves, as where a job was suspended: the others of it were, too, and are
    not late."""

    def __init__(self, at: float):
        self._at, self._looked = at, time.monotonic()

    def passed(self) -> bool:
        before, self._looked = self._looked, time.monotonic()
        self._at += max(0.0, self._looked - before - LARGEST_GAP)
        return self._looked > self._at


def _state(known: Known, info: Any, again: bool = False) -> bytes:
    """again: it repeats what was said when the members settled. Nobody is to answer: two that have settled would without end."""
    return json.dumps({"known": known.text(), "info": info, "again": again}).encode()
