"""Messages between processes over torch.distributed: one packed buffer per pair of processes and round."""

import os
import struct
import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dfl.transport.base import Inboxes, Outbox, hosting
from dfl.transport.notes import GRACE, Note, Notes

_MAGIC = b"DFLg"
# magic, version, number of messages, run, round, bytes of the whole buffer
_HEADER = struct.Struct("<4sHHQQQ")
_ENTRY = struct.Struct("<IIQ")  # peer, tag: what kind of numbers the message holds, bytes
_VERSION = 1


class TagError(TypeError, ConnectionError):
    """A message holds other numbers than its receiver expects."""


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
        self.timeout, self.round = timeout, None
        self.names = ["not told"] * self.size
        store = dist.distributed_c10d._get_default_store()
        self.notes = Notes(store, self.rank, _address(store))
        self._holds_store = self.rank == 0 and self.notes.address is not None
        self.wire_bytes = 0
        self.control_bytes = 0
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def exchange(self, t: int, outbox: Outbox, edges: Sequence[tuple[int, int]], size: int | None, tag: int = 0) -> Inboxes:
        """Deliver messages along `edges` (sender, receiver). ConnectionError names who has gone or was silent for `timeout` s.

        size: bytes of every message, known to both ends; None: they differ, and every pair of processes announces them first.
        tag: 32 bits for what kind of numbers the messages hold; TypeError names the processes that do not agree on it.
        What is delivered may lie in buffers that the next exchange overwrites: a rule that keeps a message clones it.
        """
        self.round = t
        outgoing, incoming = self._lists(edges)
        if size is None:
            sizes = {peer: len(message) for peer, message in outbox.items()} | self._announce(outbox, outgoing, incoming)
        else:
            sizes = dict.fromkeys(self.process_of, size)
        sent = {q: self._pack(t, outbox, peers, q, tag) for q, peers in outgoing.items()}
        received = {q: self._buffer("received", q, _buffer_bytes([sizes[peer] for peer in peers])) for q, peers in incoming.items()}
        self.wire_bytes += self._transfer("exchange", sent, received)
        arrived = dict(outbox)
        for q, peers in incoming.items():
            arrived |= self._unpack(t, q, received[q], {peer: sizes[peer] for peer in peers}, tag)
        inboxes: Inboxes = {peer: {} for peer in self.hosted}
        for sender, receiver in edges:
            if receiver in inboxes:
                inboxes[receiver][sender] = arrived[sender]
        return inboxes

    def _buffer(self, kind: str, process: int, num_bytes: int) -> Tensor:
        """The first bytes of a buffer that is kept from round to round: fresh memory costs a page fault every 4 KiB."""
        kept = self._buffers.get((kind, process))
        if kept is None or len(kept) < num_bytes:
            kept = self._buffers[kind, process] = torch.empty(num_bytes, dtype=torch.uint8, device=self.wire)
        return kept[:num_bytes]

    def _announce(self, outbox: Outbox, outgoing: dict[int, list[int]], incoming: dict[int, list[int]]) -> dict[int, int]:
        """The sizes of the messages that are coming, by peer."""
        sent = {q: torch.tensor([len(outbox[peer]) for peer in peers], device=self.wire) for q, peers in outgoing.items()}
        received = {q: torch.empty(len(peers), dtype=torch.int64, device=self.wire) for q, peers in incoming.items()}
        self.wire_bytes += self._transfer("announcement of sizes", sent, received)
        return {peer: size for q, peers in incoming.items() for peer, size in zip(peers, received[q].tolist(), strict=True)}

    def _lists(self, edges) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """By other process: my peers it needs, and its peers I need. Each peer once, ascending: no byte is sent twice."""
        outgoing: dict[int, set[int]] = {}
        incoming: dict[int, set[int]] = {}
        for sender, receiver in edges:
            a, b = self.process_of[sender], self.process_of[receiver]
            if a == self.rank != b:
                outgoing.setdefault(b, set()).add(sender)
            elif b == self.rank != a:
                incoming.setdefault(a, set()).add(sender)
        return ({q: sorted(outgoing[q]) for q in sorted(outgoing)}, {q: sorted(incoming[q]) for q in sorted(incoming)})

    def _pack(self, t: int, outbox: Outbox, peers: list[int], process: int, tag: int) -> Tensor:
        sizes = [len(outbox[peer]) for peer in peers]
        total = _buffer_bytes(sizes)
        buffer = self._buffer("sent", process, total)
        head = _HEADER.pack(_MAGIC, _VERSION, len(peers), self.run, t, total)
        head += b"".join(_ENTRY.pack(peer, tag, size) for peer, size in zip(peers, sizes, strict=True))
        buffer[:len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        for peer, (start, stop) in zip(peers, _places(sizes), strict=True):
            buffer[start:stop] = outbox[peer]
        return buffer

    def _unpack(self, t: int, process: int, buffer: Tensor, sizes: dict[int, int], tag: int) -> dict[int, Tensor]:
        raw = bytes(buffer[:_HEADER.size + _ENTRY.size * len(sizes)].cpu().numpy())
        found = _HEADER.unpack_from(raw)
        expected = (_MAGIC, _VERSION, len(sizes), self.run, t, len(buffer))
        for name, got, want in zip(("magic", "version", "messages", "run", "round", "bytes"), found, expected, strict=True):
            if got != want:
                raise ConnectionError(f"{self.describe(process)} sent a message with {name} = {got!r} {self._when()}; "
                                      f"expected {want!r}")
        entries = [_ENTRY.unpack_from(raw, _HEADER.size + _ENTRY.size * k) for k in range(len(sizes))]
        if [(peer, size) for peer, _, size in entries] != list(sizes.items()):
            raise ConnectionError(f"{self.describe(process)} sent messages (peer, tag, bytes) {entries} {self._when()}; "
                                  f"expected peers and bytes {sizes}")
        for peer, found_tag, _ in entries:
            if found_tag != tag:
                raise TagError(f"{self.describe(process)} sent peer {peer}'s message with tag {found_tag:#x} {self._when()}; process "
                               f"{self.rank} expected {tag:#x}: they do not agree on what kind of numbers a message holds")
        body = buffer.to(self.device)
        return {peer: body[start:stop] for peer, (start, stop) in zip(sizes, _places(list(sizes.values())), strict=True)}

    def agree(self, value: int) -> int:
        return int(self._table(torch.tensor([value])).max())

    def share(self, data: bytes) -> list[bytes]:
        sizes = self._table(torch.tensor([len(data)]))[:, 0].tolist()
        mine = torch.zeros(max(sizes), dtype=torch.uint8)
        mine[:len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else mine[:0]
        return [bytes(row[:size].numpy()) for row, size in zip(self._table(mine), sizes, strict=True)]

    def spread(self, data: bytes) -> bytes:
        size = int(self._table(torch.tensor([len(data)]))[0])
        if self.rank:
            found = torch.empty(size, dtype=torch.uint8)
            self._transfer("what process 0 tells", {}, {0: found}, patience=2)
            return bytes(found.numpy())
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        self.control_bytes += self._transfer("what process 0 tells", dict.fromkeys(range(1, self.size), mine), {})
        return data

    def _table(self, mine: Tensor) -> Tensor:
        """The rows (K,) of all processes, as (processes, K) on all of them, over process 0 and on the CPU.

        Process 0 waits for everybody, and the others for process 0: for twice as long, since it may be waiting itself. So
        who is missing is known, as it would not be after an all-reduce, in which everybody waits for a neighbour that waits.
        """
        rows = mine.new_empty(self.size, len(mine))
        what, others = "agreement", range(1, self.size)
        if self.rank:
            self.control_bytes += self._transfer(what, {0: mine}, {0: rows}, patience=2)
        else:
            rows[0] = mine
            self._transfer(what, {}, {q: rows[q] for q in others})
            self.control_bytes += self._transfer(what, dict.fromkeys(others, rows), {})
        return rows

    def gather(self, rows: Tensor) -> Tensor | None:
        """Rows (P, D) of every process to process 0, as (N, D) in peer order."""
        mine = rows.to(self.wire).contiguous()
        if self.rank != 0:
            self.control_bytes += self._transfer("gathering of rows", {0: mine}, {}, patience=2)
            return None
        parts = [mine] + [mine.new_empty(len(peers), rows.shape[1]) for peers in self.hosts[1:]]
        self._transfer("gathering of rows", {}, dict(enumerate(parts[1:], 1)))
        return torch.cat(parts).to(rows.device)

    def _transfer(self, what: str, sent: dict[int, Tensor], received: dict[int, Tensor], patience: float = 1) -> int:
        """All sends and receives of a step together, other processes in ascending order at both ends; the bytes sent.

        ConnectionError names the processes that have gone, or were not there within `patience` times the time-out.
        """
        started, limit = time.monotonic(), patience * self.timeout
        tensors = [*sent.values(), *received.values()]
        move = _move_on_gpu if any(tensor.is_cuda for tensor in tensors) else _move_on_cpu
        missing = move(sent, received, started + limit)
        if missing:
            raise self._lost(missing, what, time.monotonic() - started, limit)
        return sum(tensor.nbytes for tensor in sent.values())

    def _lost(self, missing: list[int], what: str, seconds: float, limit: float) -> ConnectionError:
        """What happened, as far as the notes of the other processes explain it."""
        who = " and ".join(map(self.describe, missing))
        gone = f"is gone: its connection closed after {seconds:.1f} s of waiting"
        how = gone if seconds < limit else f"said nothing for {seconds:.1f} s"
        mine = Note(self.rank, f"{who} {how}, {self._when()} ({what})", missing)
        if 0 in missing:
            time.sleep(0.2)  # it may hold the store, and a process that dies closes one socket after the other
        self.notes.write(mine)
        cause = self.notes.cause(mine)
        noticed = "" if cause.error or cause.process == self.rank else f" (noticed by process {cause.process})"
        return (ValueError if cause.error == "ValueError" else ConnectionError)(cause.text + noticed)

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
        kind = "ValueError" if isinstance(error, ValueError) else "OSError"
        what = " ".join(str(error).split()) or type(error).__name__
        self.notes.write(Note(self.rank, f"{self.describe(self.rank)} stopped {self._when()}: {what}", error=kind))
        if self.wire.type == "cuda":
            dist.distributed_c10d._abort_process_group()  # what waits on the device would make a mere destruction wait as well
        elif dist.is_initialized():
            dist.destroy_process_group()
        if self._holds_store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(GRACE)  # the store is in this process, and the others have yet to read it

    def close(self) -> None:
        """Leave together: without the barrier gloo aborts now and then when one process is gone before another."""
        self.agree(0)
        dist.barrier()
        dist.destroy_process_group()


def _move_on_cpu(sent: dict[int, Tensor], received: dict[int, Tensor], deadline: float) -> list[int]:
    """Over gloo; the processes that did not do their part."""
    missing, works = set(), []
    for q in sorted(sent.keys() | received.keys()):
        try:
            if q in received:
                works.append((q, dist.irecv(received[q], q)))
            if q in sent:
                works.append((q, dist.isend(sent[q], q)))
        except RuntimeError:  # its connection was closed before
            return [q]
    for q, work in works:
        try:
            work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except RuntimeError:
            missing.add(q)
            if time.monotonic() < deadline:  # it has gone, which explains enough
                break
    return sorted(missing)


def _move_on_gpu(sent: dict[int, Tensor], received: dict[int, Tensor], deadline: float) -> list[int]:
    """Over NCCL, which does not say who is missing: all that take part. Asking instead of waiting leaves the time-out to us,
    and the watchdog of NCCL, which would end the process, has a longer one."""
    partners = sorted(sent.keys() | received.keys())
    ops = []
    for q in partners:
        ops += [dist.P2POp(dist.irecv, received[q], q)] if q in received else []
        ops += [dist.P2POp(dist.isend, sent[q], q)] if q in sent else []
    try:
        works = dist.batch_isend_irecv(ops)
        while not all(work.is_completed() for work in works):
            if time.monotonic() > deadline:
                return partners
            time.sleep(0.0005)
        for work in works:
            work.wait()
    except RuntimeError:
        return partners
    return []


def _address(store) -> tuple[str, int] | None:
    """Where the store listens; None for a file, which nobody holds."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, dist.TCPStore) else None


def _aligned(num_bytes: int) -> int:
    """Up to a multiple of 16, so that a message starts where a view of any type may start."""
    return -(-num_bytes // 16) * 16


def _places(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where messages of these sizes lie in a buffer, after the header."""
    places, start = [], _aligned(_HEADER.size + _ENTRY.size * len(sizes))
    for size in sizes:
        places.append((start, start + size))
        start += _aligned(size)
    return places


def _buffer_bytes(sizes: Sequence[int]) -> int:
    return _places(sizes)[-1][1]
