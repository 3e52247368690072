"""Messages between processes over torch.distributed: one packed buffer per pair of processes and round."""

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dfl.transport import frames, wire
from dfl.transport.base import SENT, Arrived, hosting
from dfl.transport.notes import GRACE, Note, Notes
from dfl.transport.packet import Packet
from dfl.transport.stopping import Stopped
from dfl.transport.watch import SILENT_SECONDS, Watch
from dfl.transport.wire import Entry

# what a transfer is, for its frames and for errors
_EXCHANGE, _SIZES, _TABLE, _TOLD, _ROWS = "exchange", "announcement of sizes", "agreement", "what process 0 tells", "gathering of rows"
MOST = 2**31  # bytes of a message, unless a run knows better
# between two looks at who is silent, while something is waited for
_LOOK_SECONDS = 0.5


class Distributed:
    """Packed point-to-point exchange. Both ends derive the same lists from the same edges.

    num_peers are spread over the processes of the default group; `device` is where peers live, `wire` where buffers must lie
    (the accelerator for NCCL, the CPU for gloo). `run` is a number that all processes of a run share: a message of
    another run, round or peer is refused.
    """

    def __init__(self, num_peers: int, *, device: torch.device, wire: torch.device, run: int = 0, timeout: float = 300.0):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.hosts = hosting(num_peers, self.size)
        self.hosted = self.hosts[self.rank]
        self.process_of = {peer: process for process, peers in enumerate(self.hosts) for peer in peers}
        self.device, self.wire, self.run = device, wire, run % 2**64
        self.timeout, self.round, self.most = timeout, None, MOST
        self.names = ["not told"] * self.size
        store = dist.distributed_c10d._get_default_store()
        self.notes = Notes(store, self.rank, _address(store))
        # process 0 holds it, unless it is a file or torchrun's
        ours = self.notes.address is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._store_holder = 0 if ours else None
        self._store, self._watch, self._waiter = store, None, None
        self.wire_bytes = self.control_bytes = self.gathered_bytes = 0
        self._told = [0] * len(SENT)
        self._buffers: dict[tuple[str, str, int], Tensor] = {}
        self._lengths: dict[tuple[str, int], int] = {}  # of the last frame to and from every other process, the same at both ends

    def watch(self, asked: Callable[[], bool]) -> None:
        # clones: a connection to the store is for one thread
        self._watch = Watch(self._store.clone(), self.rank, f"dfl/watch/{self.run:x}", asked, self._store_holder)
        self._waiter = Waiter()
        self._watch.start()

    @property
    def told_to_stop(self) -> bool:
        return self._watch is not None and self._watch.told

    def exchange(self, t: int, packets: Mapping[int, Packet], addressed: Mapping[int, Sequence[int]],
                 due: Mapping[int, Sequence[int]], expected: Mapping[int, Sequence[int]]) -> Arrived:
        """ConnectionError names who has gone, was silent for `timeout` s, or sent what is no whole message of this run and round.

        What arrives may lie in buffers that the next exchange overwrites: who keeps a message clones it.
        """
        self.round = t
        incoming, sent = self._incoming(expected), {}
        for q, entries in self._outgoing(packets, addressed, due).items():
            draft = wire.draft(entries)
            sent[q] = self._buffer("sent", _EXCHANGE, q, draft.size, self.wire)
            wire.fill(sent[q], draft)
            frames.seal(sent[q], self._label(_EXCHANGE, self.rank))
        received = self._move_unknown(sent, incoming)
        self.wire_bytes += _total(sent)
        arrived: Arrived = {peer: {} for peer in expected}
        for q, senders in incoming.items():
            try:
                self._deliver(q, wire.read(received[q], self.device), senders, arrived)
            except wire.WireError as error:
                raise ConnectionError(f"{self.describe(q)} sent {error}, {self._when()}") from None
        for sender, receivers in addressed.items():
            for receiver in receivers:
                if self.process_of[receiver] == self.rank:
                    arrived[receiver][sender] = packets[sender]
        return arrived

    def _outgoing(self, packets, addressed, due) -> dict[int, list[Entry]]:
        """By other process: what each of my peers that are due there says. Each once, ascending: no byte is sent twice."""
        found: dict[int, list[Entry]] = {}
        for sender in sorted(due):
            there: dict[int, list[int]] = {}
            for receiver in due[sender]:
                there.setdefault(self.process_of[receiver], []).append(receiver)
            for q, receivers in there.items():
                wanted = sorted(set(receivers) & set(addressed.get(sender, ())))
                if q != self.rank:
                    entry = Entry(sender, packets[sender], None if wanted == receivers else wanted) if wanted else Entry(sender)
                    found.setdefault(q, []).append(entry)
        return {q: found[q] for q in sorted(found)}

    def _incoming(self, expected) -> dict[int, dict[int, list[int]]]:
        """By other process: its peers that are due here, and for which of mine."""
        found: dict[int, dict[int, list[int]]] = {}
        for receiver, senders in expected.items():
            for sender in senders:
                if self.process_of[sender] != self.rank:
                    found.setdefault(self.process_of[sender], {}).setdefault(sender, []).append(receiver)
        return {q: dict(sorted(found[q].items())) for q in sorted(found)}

    def _deliver(self, q: int, entries: list[Entry], senders: dict[int, list[int]], arrived: Arrived) -> None:
        if [entry.peer for entry in entries] != list(senders):
            raise ConnectionError(f"{self.describe(q)} sent messages of peers {[entry.peer for entry in entries]} {self._when()}; "
                                  f"expected {list(senders)}")
        for entry in entries:
            wanted = senders[entry.peer] if entry.receivers is None else entry.receivers
            if not set(wanted) <= set(senders[entry.peer]):
                raise ConnectionError(f"{self.describe(q)} sent peer {entry.peer}'s message to {list(wanted)} {self._when()}; "
                                      f"expected some of {senders[entry.peer]}")
            if entry.packet is not None:
                for receiver in wanted:
                    arrived[receiver][entry.peer] = entry.packet

    def _move_unknown(self, sent: dict[int, Tensor], incoming) -> dict[int, Tensor]:
        """Frames whose length their receivers do not know, and what is in those received.

        gloo takes a shorter message than there is room for. Both ends know how much room there is (`_room`): more goes in a second
        step. NCCL wants equal lengths, which are therefore told first.
        """
        if self.wire.type == "cuda":
            lengths = {q: torch.zeros(1, dtype=torch.int64, device=self.wire) for q in incoming}
            self.wire_bytes += self._transfer(_SIZES, {q: torch.tensor([len(f)], device=self.wire) for q, f in sent.items()}, lengths)
            for q, found in lengths.items():
                self._check_size(q, int(found), self._most(incoming[q]))
            return self._move(_EXCHANGE, sent, {q: int(found) for q, found in lengths.items()})
        first = {q: frame[:self._room("sent", q)] for q, frame in sent.items()}
        received = {q: self._buffer("received", _EXCHANGE, q, self._room("received", q), self.wire) for q in incoming}
        self._complete(_EXCHANGE, first, received)
        more = {q: frame[self._room("sent", q):] for q, frame in sent.items() if len(frame) > self._room("sent", q)}
        missing = {}
        for q, buffer in received.items():
            size, room = self._checked(_EXCHANGE, q, frames.length, buffer, self._most(incoming[q])), self._room("received", q)
            if size > room:
                whole = torch.empty(size, dtype=torch.uint8)
                whole[:room] = buffer
                self._buffers["received", _EXCHANGE, q] = received[q] = whole
                missing[q] = whole[room:]
            received[q] = received[q][:size]
        self._complete(_EXCHANGE, more, missing)
        self._lengths |= {("sent", q): len(frame) for q, frame in sent.items()}
        self._lengths |= {("received", q): len(frame) for q, frame in received.items()}
        return {q: self._checked(_EXCHANGE, q, frames.contents, frame, len(frame), self._label(_EXCHANGE, q))
                for q, frame in received.items()}

    def _most(self, senders: dict[int, list[int]]) -> int:
        """The bytes of a frame with messages of these senders to as many receivers as they may have here."""
        return frames.HEADER + sum(self.most + 4 * len(receivers) for receivers in senders.values())

    def _room(self, kind: str, q: int) -> int:
        """The bytes that a frame to or from another process may have at once: by the last one, which both ends know."""
        return frames.room(self._lengths.get((kind, q), 0), self.wire)

    def _buffer(self, use: str, what: str, process: int, num_bytes: int, device: torch.device) -> Tensor:
        """A buffer that is kept from round to round: fresh memory costs a page fault every 4 KiB."""
        kept = self._buffers.get((use, what, process))
        if kept is None or len(kept) < num_bytes or kept.device != device:
            self._buffers[use, what, process] = kept = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return kept[:num_bytes]

    def _check_size(self, process: int, size: int, most: int = MOST) -> None:
        """Before memory is asked for."""
        if not 0 <= size <= most:
            raise ConnectionError(f"{self.describe(process)} announced {size} bytes {self._when()}; allowed: up to {most}")

    def newly_sent(self) -> list[int]:
        before, self._told = self._told, [getattr(self, name) for name in SENT]
        return [now - then for now, then in zip(self._told, before, strict=True)]

    def _label(self, what: str, sender: int) -> frames.Label:
        return frames.Label(what, sender, self.run, self.round)

    def agree(self, value: int) -> int:
        return int(self._table(torch.tensor([value])).max())

    def share(self, data: bytes) -> list[bytes]:
        sizes = self._table(torch.tensor([len(data)]))[:, 0].tolist()
        for process, size in enumerate(sizes):
            self._check_size(process, size)
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[:len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
        return [bytes(row[:size].numpy()) for row, size in zip(self._table(mine), sizes, strict=True)]

    def spread(self, data: bytes) -> bytes:
        size = int(self._table(torch.tensor([len(data)]))[0])
        self._check_size(0, size)
        if self.rank:
            found = torch.empty(size, dtype=torch.uint8)
            self._transfer(_TOLD, {}, {0: found}, patience=2)
            return bytes(found.numpy())
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        self.control_bytes += self._transfer(_TOLD, dict.fromkeys(range(1, self.size), mine), {})
        return data

    def _table(self, mine: Tensor) -> Tensor:
        """The rows (K,) of all processes, as (processes, K) on all of them, over process 0 and on the CPU.

        Process 0 waits for everybody, and the others for process 0: for twice as long, since it may be waiting itself. So
        who is missing is known, as it would not be after an all-reduce, in which everybody waits for a neighbour that waits.
        """
        rows = mine.new_empty(self.size, len(mine))
        others = range(1, self.size)
        if self.rank:
            self.control_bytes += self._transfer(_TABLE, {0: mine}, {0: rows}, patience=2)
        else:
            rows[0] = mine
            self._transfer(_TABLE, {}, {q: rows[q] for q in others})
            self.control_bytes += self._transfer(_TABLE, dict.fromkeys(others, rows), {})
        return rows

    def gather(self, rows: Tensor) -> Tensor | None:
        """Rows (P, D) of every process to process 0, as (N, D) in peer order."""
        mine = rows.to(self.wire).contiguous()
        if self.rank != 0:
            self.gathered_bytes += self._transfer(_ROWS, {0: mine}, {}, patience=2)
            return None
        parts = [mine] + [mine.new_empty(len(peers), rows.shape[1]) for peers in self.hosts[1:]]
        self._transfer(_ROWS, {}, dict(enumerate(parts[1:], 1)))
        return torch.cat(parts).to(rows.device)

    def _transfer(self, what: str, sent: dict[int, Tensor], received: dict[int, Tensor], patience: float = 1) -> int:
        """Tensors in frames of their own, those received written in place; the bytes sent. A tensor for several is sealed once."""
        sealed: dict[int, Tensor] = {}
        for q, tensor in sent.items():
            if id(tensor) not in sealed:
                total = frames.HEADER + tensor.nbytes
                frame = self._buffer("sent", what, q, total, tensor.device)
                frame[frames.HEADER:] = tensor.contiguous().view(-1).view(torch.uint8)
                sealed[id(tensor)] = frames.seal(frame, self._label(what, self.rank))
        outgoing = {q: sealed[id(tensor)] for q, tensor in sent.items()}
        expected = {q: frames.HEADER + tensor.nbytes for q, tensor in received.items()}
        device = next((tensor.device for tensor in (*sent.values(), *received.values())), self.wire)
        for q, inside in self._move(what, outgoing, expected, patience, device).items():
            received[q].copy_(inside.view(received[q].dtype).view(received[q].shape))
        return _total(outgoing)

    def _move(self, what: str, sent: dict[int, Tensor], expected: dict[int, int], patience: float = 1,
              device: torch.device | None = None) -> dict[int, Tensor]:
        """All frames of a step together, other processes in ascending order at both ends; the contents of those received.

        expected: the bytes of the frame from each process. ConnectionError names the processes that have gone, or were not there
        within `patience` times the time-out, or the one that sent something else.
        """
        device = device or self.wire
        received = {q: frames.expect(self._buffer("received", what, q, frames.room(size, device), device), size)
                    for q, size in expected.items()}
        self._complete(what, sent, received, patience)
        return {q: self._checked(what, q, frames.contents, received[q], size, self._label(what, q)) for q, size in expected.items()}

    def _complete(self, what: str, sent: dict[int, Tensor], received: dict[int, Tensor], patience: float = 1) -> None:
        """All sends and receives of a step."""
        started, limit = time.monotonic(), patience * self.timeout
        if not sent and not received:
            return
        if self._watch:
            self._watch.begin({*sent, *received})
        move = _move_on_gpu if next(iter((*sent.values(), *received.values()))).device.type == "cuda" else _move_on_cpu
        missing, silent = move(sent, received, started + limit, self._watch, self._waiter)
        if missing:
            raise self._lost(missing, what, time.monotonic() - started, limit, silent)

    def _checked(self, what: str, q: int, step, *arguments):
        try:
            return step(*arguments)
        except frames.FrameError as error:
            raise ConnectionError(f"{self.describe(q)} sent {error}, {self._when()} ({what})") from None

    def _lost(self, missing: list[int], what: str, seconds: float, limit: float, silent: bool) -> ConnectionError:
        """What happened, as far as the notes of the other processes explain it."""
        who = " and ".join(map(self.describe, missing))
        gone = f"is gone: its connection closed after {seconds:.1f} s of waiting"
        how = gone if seconds < limit else f"said nothing for {seconds:.1f} s"
        if silent:
            how = f"has shown no life for {SILENT_SECONDS:.0f} s: it is stopped, or its machine or network hangs"
        mine = Note(self.rank, f"{who} {how}, {self._when()} ({what})", missing)
        if 0 in missing:
            time.sleep(0.2)  # it may hold the store, and a process that dies closes one socket after the other
        self.notes.write(mine)
        cause = self.notes.cause(mine)
        noticed = "" if cause.error or cause.process == self.rank else f" (noticed by process {cause.process})"
        kinds = {"ValueError": ValueError, "Stopped": Stopped}
        return kinds.get(cause.error, ConnectionError)(cause.text + noticed)

    def describe(self, process: int) -> str:
        peers = self.hosts[process]
        ids = f"peer {peers[0]}" if len(peers) == 1 else f"peers {peers[0]} to {peers[-1]}"
        return f"process {process} ({ids}, host {self.names[process]})"

    def _when(self) -> str:
        return "before the first round" if self.round is None else f"in round {self.round + 1}"

    def introduce(self, name: str) -> None:
        """Tell all processes the name of this one's host."""
        self.names = [data.decode() for data in self.share(name.encode())]

    def leave(self, error: BaseException) -> None:
        """Write down why, and close the connections, so that the others notice at once. Nobody is waited for."""
        kind = next((kind.__name__ for kind in (Stopped, ValueError) if isinstance(error, kind)), "OSError")
        what = " ".join(str(error).split()) or type(error).__name__
        self.notes.write(Note(self.rank, f"{self.describe(self.rank)} stopped {self._when()}: {what}", error=kind))
        self._end_watch()
        if self.wire.type == "cuda":
            dist.distributed_c10d._abort_process_group()  # what waits on the device would make a mere destruction wait as well
        elif dist.is_initialized():
            dist.destroy_process_group()
        if self.rank == self._store_holder:
            time.sleep(GRACE)  # the store is in this process, and the others have yet to read it

    def close(self) -> None:
        """Leave together: without the barrier gloo aborts now and then when one process is gone before another."""
        self.agree(0)
        self._end_watch()
        dist.barrier()
        dist.destroy_process_group()

    def _end_watch(self) -> None:
        if self._watch:
            self._watch.end()


class Waiter:
    """Waits for gloo in a thread of its own. Its waits cannot be broken off: a timeout breaks all connections, so one cannot wait in
    slices. The main thread can, and sees meanwhile who shows no life; it keeps all tensors until the wait is over."""

    def __init__(self):
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="dfl-wait", daemon=True).start()

    def _run(self) -> None:
        while True:
            works, deadline, done, missing = self.jobs.get()
            missing += _wait(works, deadline)
            del works
            done.set()

    def wait(self, works: list, deadline: float, watch: Watch) -> tuple[list[int], bool]:
        done, missing = threading.Event(), []
        self.jobs.put((works, deadline, done, missing))
        while not done.wait(_LOOK_SECONDS):
            if silent := watch.silent():
                return silent, True
        return missing, False


def _move_on_cpu(sent: dict[int, Tensor], received: dict[int, Tensor], deadline: float, watch: Watch | None,
                 waiter: Waiter | None) -> tuple[list[int], bool]:
    """Over gloo; the processes that did not do their part, and whether they are silent."""
    works = []
    for q in sorted(sent.keys() | received.keys()):
        try:
            if q in received:
                works.append((q, dist.irecv(received[q], q)))
            if q in sent:
                works.append((q, dist.isend(sent[q], q)))
        except RuntimeError:  # its connection was closed before
            return [q], False
    return waiter.wait(works, deadline, watch) if waiter else (_wait(works, deadline), False)


def _wait(works: list, deadline: float) -> list[int]:
    missing = set()
    for q, work in works:
        try:
            work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError:
            missing.add(q)
            if time.monotonic() < deadline:  # it has gone, which explains enough
                break
    return sorted(missing)


def _move_on_gpu(sent: dict[int, Tensor], received: dict[int, Tensor], deadline: float, watch: Watch | None,
                 waiter: Waiter | None) -> tuple[list[int], bool]:
    """Over NCCL, which does not say who is missing: all that take part. Asking instead of waiting leaves the time-out to us,
    and the watchdog of NCCL, which would end the process, has a longer one."""
    partners = sorted(sent.keys() | received.keys())
    ops = []
    for q in partners:
        ops += [dist.P2POp(dist.irecv, received[q], q)] if q in received else []
        ops += [dist.P2POp(dist.isend, sent[q], q)] if q in sent else []
    try:
        works, look = dist.batch_isend_irecv(ops), time.monotonic() + _LOOK_SECONDS
        while not all(work.is_completed() for work in works):
            if time.monotonic() > deadline:
                return partners, False
            if watch and time.monotonic() > look:
                look = time.monotonic() + _LOOK_SECONDS
                if silent := watch.silent():
                    return silent, True
            time.sleep(0.0005)
        for work in works:
            work.wait()
    except RuntimeError:
        return partners, False
    return [], False


def _address(store) -> tuple[str, int] | None:
    """Where the store listens; None for a file, which nobody holds."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, dist.TCPStore) else None


def _total(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
