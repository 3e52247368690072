"""Messages between processes: one packed buffer per pair of processes and round."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dfl.transport import frames, wire
from dfl.transport.aside import Aside
from dfl.transport.base import ANY, EXCHANGE, FREE, SENT, Arrived, hosting
from dfl.transport.control import MOST, ControlPlane
from dfl.transport.group import Begun, Group
from dfl.transport.link import Link, total_bytes
from dfl.transport.packet import Packet
from dfl.transport.wire import Entry

_SIZES = "announcement of sizes"


class Distributed:
    """The data plane: packed point-to-point exchange, of which both ends derive the same lists from the same edges. Beside it lies
    the control plane (control.py), over the same connections.

    num_peers are spread over the processes of the group; `device` is where peers live. `run` is a number that all processes of a
    run share: a message of another run, round or peer is refused. aside: what is begun goes on there, where it would else wait
    for the host or for the GPU's own work.
    """

    def __init__(self, num_peers: int, group: Group, *, device: torch.device, run: int = 0, timeout: float = 300.0,
                 aside: Aside | None = None):
        self.process, self.device, self.wire, self.most = group.rank, device, group.wire, MOST
        self.aside = aside
        self.hosts = hosting(num_peers, group.size)
        self.hosted = self.hosts[self.process]
        self.process_of = {peer: process for process, peers in enumerate(self.hosts) for peer in peers}
        self.link = self._make_link(group, run, timeout)
        self.control = ControlPlane(self.link)
        self.wire_bytes = self.looked_bytes = 0
        self._told = [0] * len(SENT)
        self._lengths: dict[tuple[str, str, int], int] = {}  # of the last frame to and from every other process, the same at both ends
        self._readers: dict[tuple[str, int], wire.Reader] = {}
        self._last_sent: tuple[dict, dict, dict] = ({}, {}, {})
        self._last_expected: tuple[dict, dict] = ({}, {})
        self._lent: dict[int, wire.Lent] = {}  # rows by where they begin

    def _make_link(self, group, run: int, timeout: float) -> Link:
        return Link(group, self.hosts, run=run, timeout=timeout)

    @property
    def rank(self) -> int:
        return self.link.members.index(self.process)

    @property
    def size(self) -> int:
        return len(self.link.members)

    @property
    def round(self) -> int | None:
        return self.link.round

    @round.setter
    def round(self, t: int | None) -> None:
        self.link.round = t

    @property
    def run(self) -> int:
        return self.link.run

    @run.setter
    def run(self, number: int) -> None:
        self.link.run = number

    @property
    def control_bytes(self) -> int:
        return self.control.sent

    @property
    def measured_bytes(self) -> int:
        return self.looked_bytes + self.control.summed

    def watch(self, asked: Callable[[], bool]) -> None:
        self.link.watch(asked)

    @property
    def told_to_stop(self) -> bool:
        return self.link.told_to_stop

    def exchange(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
                 due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Arrived:
        """ConnectionError names who has gone, was silent for `timeout` s, or sent what is no whole message of this run and round.

        What arrives may lie in buffers that the next exchange overwrites: who keeps a message clones it.
        """
        return self._begin(t, packets, addressed, due, expected, what)()

    def begin(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
              due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str = EXCHANGE) -> Callable[[], Arrived]:
        if self.aside is None:
            return self._begin(t, packets, addressed, due, expected, what)
        return self.aside.begin(lambda: self._begin(t, packets, addressed, due, expected, what)())

    def _begin(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
               due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]], what: str) -> Callable[[], Arrived]:
        self.round = t
        incoming, sent = self._incoming(expected), self._packed(what, self._outgoing(packets, addressed, due))
        self._count(what, total_bytes(sent))
        arrived: Arrived = {peer: {} for peer in expected}
        for sender, receivers in addressed.items():
            for receiver in receivers:
                if self.process_of[receiver] == self.process:
                    arrived[receiver][sender] = packets[sender]
        received = self._begin_unknown(what, sent, incoming)
        return lambda: self._arrive(what, received(), incoming, arrived)

    def _packed(self, what: str, outgoing: dict[int, list[Entry]]) -> dict[int, Tensor]:
        """The sealed frame for each other process: one for all that are sent the same."""
        sent, made = {}, dict[tuple, Tensor]()
        for q, entries in outgoing.items():
            same = tuple((entry.peer, id(entry.packet), entry.receivers and tuple(entry.receivers)) for entry in entries)
            if same not in made:
                draft = wire.draft(entries)
                frame = self._in_place(entries, draft)
                if frame is None:
                    frame = self.link.buffer("sent", what, q, draft.size, self.wire, locked=self.device.type == "cuda")
                    wire.fill(frame, draft)
                made[same] = frame
            sent[q] = made[same]
        if made and self.device.type == "cuda" and self.wire.type == "cpu":
            torch.cuda.current_stream(self.device).synchronize()  # one wait for all copies
        for frame in made.values():
            frames.seal(frame, self.link.label(what, self.process))
        return sent

    def lend(self, rows: Tensor) -> None:
        if rows.device.type == self.wire.type == "cpu":
            self._lent = {row.data_ptr(): wire.lent(row, FREE * row.itemsize) for row in rows}

    def _in_place(self, entries: list[Entry], draft: wire.Draft) -> Tensor | None:
        """The frame of one message that lies in a lent row already: a copy of a large one takes longer than its digest."""
        first = entries[0].packet
        if len(entries) > 1 or first is None or not first.payload:
            return None
        row = self._lent.get(next(iter(first.payload.values())).data_ptr())
        return row and wire.in_place(draft, row)

    def _arrive(self, what: str, received: dict[int, Tensor], incoming: dict[int, dict[int, list[int]]], arrived: Arrived) -> Arrived:
        for q, senders in incoming.items():
            reader = self._readers.setdefault((what, q), wire.Reader())
            try:
                self._deliver(q, reader.read(received[q], self.device), senders, arrived)
            except wire.WireError as error:
                raise self.link.fault(q, f"{self.link.describe(q)} sent {error}, {self.link.when()}") from None
        return arrived

    def _outgoing(self, packets, addressed, due) -> dict[int, list[Entry]]:
        """By other process: what each of my peers that are due there says. Each once, ascending: no byte is sent twice."""
        return {q: [Entry(sender, packets[sender] if speaks else None, wanted) for sender, speaks, wanted in entries]
                for q, entries in self._sent_where(addressed, due).items()}

    def _sent_where(self, addressed, due) -> dict[int, list[tuple[int, bool, list[int] | None]]]:
        """By other process: my senders that are due there, whether each speaks, and to whom if not to all that are due. Made anew
        where it is not as it was the last time."""
        if self._last_sent[:2] == (addressed, due):
            return self._last_sent[2]
        found: dict[int, list] = {}
        for sender in sorted(due):
            there: dict[int, list[int]] = {}
            for receiver in due[sender]:
                there.setdefault(self.process_of[receiver], []).append(receiver)
            spoken_to = set(addressed.get(sender, ()))
            for q, receivers in there.items():
                wanted = sorted(set(receivers) & spoken_to)
                if q != self.process:
                    found.setdefault(q, []).append((sender, bool(wanted), None if wanted in ([], receivers) else wanted))
        self._last_sent = _copied(addressed), _copied(due), {q: found[q] for q in sorted(found)}
        return self._last_sent[2]

    def _incoming(self, expected) -> dict[int, dict[int, list[int]]]:
        """By other process: its peers that are due here, and for which of mine. Made anew where it is not as it was the last time."""
        if self._last_expected[0] == expected:
            return self._last_expected[1]
        found: dict[int, dict[int, list[int]]] = {}
        for receiver, senders in expected.items():
            for sender in senders:
                if self.process_of[sender] != self.process:
                    found.setdefault(self.process_of[sender], {}).setdefault(sender, []).append(receiver)
        self._last_expected = _copied(expected), {q: dict(sorted(found[q].items())) for q in sorted(found)}
        return self._last_expected[1]

    def _deliver(self, q: int, entries: list[Entry], senders: dict[int, list[int]], arrived: Arrived) -> None:
        if [entry.peer for entry in entries] != list(senders):
            raise self.link.fault(q, f"{self.link.describe(q)} sent messages of peers {[entry.peer for entry in entries]} "
                                     f"{self.link.when()}; expected {list(senders)}")
        for entry in entries:
            wanted = senders[entry.peer] if entry.receivers is None else entry.receivers
            if not set(wanted) <= set(senders[entry.peer]):
                raise self.link.fault(q, f"{self.link.describe(q)} sent peer {entry.peer}'s message to {list(wanted)} "
                                         f"{self.link.when()}; expected some of {senders[entry.peer]}")
            if entry.packet is not None:
                for receiver in wanted:
                    arrived[receiver][entry.peer] = entry.packet

    def _begin_unknown(self, what: str, sent: dict[int, Tensor], incoming) -> Callable[[], dict[int, Tensor]]:
        """Frames whose length their receivers do not know; what waits for what is in those received.

        gloo takes a shorter message than there is room for. Both ends know how much room there is (`_room`): more goes in a second
        step. NCCL wants equal lengths, which are therefore told first.
        """
        if self.wire.type == "cuda":
            return lambda: self._move_on_gpu(what, sent, incoming)
        first = {q: frame[:self._room("sent", what, q)] for q, frame in sent.items()}
        received = {q: self.link.buffer("received", what, q, self._room("received", what, q), self.wire) for q in incoming}
        begun = self.link.group.begin(first, received)
        return lambda: self._end_unknown(what, begun, sent, received, incoming)

    def _move_on_gpu(self, what: str, sent: dict[int, Tensor], incoming) -> dict[int, Tensor]:
        lengths = {q: torch.zeros(1, dtype=torch.int64, device=self.wire) for q in incoming}
        told = {q: torch.tensor([len(frame)], device=self.wire) for q, frame in sent.items()}
        self._count(what, self.link.transfer(_SIZES, told, lengths))
        for q, found in lengths.items():
            self.link.check_size(q, int(found), self._most(incoming[q]))
        return self.link.move(what, sent, {q: int(found) for q, found in lengths.items()}, self.wire)

    def _end_unknown(self, what: str, begun: Begun, sent: dict[int, Tensor], received: dict[int, Tensor], incoming
                     ) -> dict[int, Tensor]:
        self.link.end(what, begun)
        more = {q: frame[room:] for q, frame in sent.items() if frame.numel() > (room := self._room("sent", what, q))}
        missing = {}
        for q, buffer in received.items():
            room = self._room("received", what, q)
            size = self.link.checked(what, q, frames.length, buffer, self._most(incoming[q]))
            if size > room:
                whole = torch.empty(size, dtype=torch.uint8)
                whole[:room] = buffer
                self.link.keep("received", what, q, whole)
                received[q] = whole
                missing[q] = whole[room:]
            received[q] = received[q][:size]
        if more or missing:
            self.link.complete(what, more, missing)
        self._lengths |= {("sent", what, q): frame.numel() for q, frame in sent.items()}
        self._lengths |= {("received", what, q): frame.numel() for q, frame in received.items()}
        return {q: self.link.checked(what, q, frames.contents, frame, frame.numel(), self.link.label(what, q))
                for q, frame in received.items()}

    def _count(self, what: str, num_bytes: int) -> None:
        if what == EXCHANGE:
            self.wire_bytes += num_bytes
        else:
            self.looked_bytes += num_bytes

    def _most(self, senders: dict[int, list[int]]) -> int:
        """The bytes of a frame with messages of these senders to as many receivers as they may have here."""
        return frames.HEADER + sum(self.most + 4 * len(receivers) for receivers in senders.values())

    def _room(self, kind: str, what: str, q: int) -> int:
        """The bytes that a frame to or from another process may have at once: by the last one, which both ends know."""
        return frames.room(self._lengths.get((kind, what, q), 0), self.wire)

    def newly_sent(self) -> list[int]:
        before, self._told = self._told, [getattr(self, name) for name in SENT]
        return [now - then for now, then in zip(self._told, before, strict=True)]

    def agree(self, value: int, most: int = ANY) -> int:
        return self.control.agree(value, most)

    def summary(self, values: Tensor) -> Tensor:
        return self.control.summary(values)

    def total(self, rows: Tensor) -> Tensor:
        return self.control.total(rows)

    def share(self, data: bytes) -> list[bytes]:
        return self.control.share(data)

    def spread(self, data: bytes) -> bytes:
        return self.control.spread(data)

    def describe(self, process: int) -> str:
        return self.link.describe(self.link.members[process])

    def introduce(self, name: str) -> None:
        """Tell all processes the name of this one's host."""
        self.link.names = [data.decode() for data in self.share(name.encode())]

    def leave(self, error: BaseException) -> None:
        self.link.leave(error)
        self._end_aside()

    def close(self) -> None:
        self.agree(0)
        self.link.close()
        self._end_aside()

    def _end_aside(self) -> None:
        if self.aside is not None:
            self.aside.end()


def tensors_of(arrived: Arrived) -> Iterator[Tensor]:
    """Of all messages of an exchange."""
    for inbox in arrived.values():
        for packet in inbox.values():
            yield from (part for part in packet.payload.values() if part.is_cuda)


def _copied(lists: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    return {peer: list(others) for peer, others in lists.items()}
