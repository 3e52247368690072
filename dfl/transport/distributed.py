"""Messages between processes over torch.distributed: one packed buffer per pair of processes and round."""

import struct
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dfl.transport.base import Inboxes, Outbox, hosting

_MAGIC = b"DFLg"
# magic, version, number of messages, run, round, bytes of the whole buffer
_HEADER = struct.Struct("<4sHHQQQ")
_ENTRY = struct.Struct("<IIQ")  # peer, tag: what kind of numbers the message holds, bytes
_VERSION = 1


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
        self.timeout = timedelta(seconds=timeout)
        self.wire_bytes = 0
        self.control_bytes = 0
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def exchange(self, t: int, outbox: Outbox, edges: Sequence[tuple[int, int]], size: int | None, tag: int = 0) -> Inboxes:
        """Deliver messages along `edges` (sender, receiver). ConnectionError names who did not answer.

        size: bytes of every message, known to both ends; None: they differ, and every pair of processes announces them first.
        tag: 32 bits for what kind of numbers the messages hold; TypeError names the processes that do not agree on it.
        What is delivered may lie in buffers that the next exchange overwrites: a rule that keeps a message clones it.
        """
        outgoing, incoming = self._lists(edges)
        if size is None:
            sizes = {peer: len(message) for peer, message in outbox.items()} | self._announce(t, outbox, outgoing, incoming)
        else:
            sizes = dict.fromkeys(self.process_of, size)
        sent = {q: self._pack(t, outbox, peers, q, tag) for q, peers in outgoing.items()}
        received = {q: self._buffer("received", q, _buffer_bytes([sizes[peer] for peer in peers])) for q, peers in incoming.items()}
        self._transfer(t, sent, received)
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

    def _announce(self, t: int, outbox: Outbox, outgoing: dict[int, list[int]], incoming: dict[int, list[int]]) -> dict[int, int]:
        """The sizes of the messages that are coming, by peer."""
        sent = {q: torch.tensor([len(outbox[peer]) for peer in peers], device=self.wire) for q, peers in outgoing.items()}
        received = {q: torch.empty(len(peers), dtype=torch.int64, device=self.wire) for q, peers in incoming.items()}
        self._transfer(t, sent, received)
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
                raise ConnectionError(f"process {process} sent a message with {name} = {got!r} in round {t}; expected {want!r}")
        entries = [_ENTRY.unpack_from(raw, _HEADER.size + _ENTRY.size * k) for k in range(len(sizes))]
        if [(peer, size) for peer, _, size in entries] != list(sizes.items()):
            raise ConnectionError(f"process {process} sent messages (peer, tag, bytes) {entries} in round {t}; "
                                  f"expected peers and bytes {sizes}")
        for peer, found_tag, _ in entries:
            if found_tag != tag:
                raise TypeError(f"process {process} sent peer {peer}'s message with tag {found_tag:#x} in round {t}; process "
                                f"{self.rank} expected {tag:#x}: they do not agree on what kind of numbers a message holds")
        body = buffer.to(self.device)
        return {peer: body[start:stop] for peer, (start, stop) in zip(sizes, _places(list(sizes.values())), strict=True)}

    def _transfer(self, t: int, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """All sends and receives of the round in one batch, other processes in ascending order at both ends."""
        ops = []
        for q in sorted(sent.keys() | received.keys()):
            if q in received:
                ops.append(dist.P2POp(dist.irecv, received[q], q))
            if q in sent:
                ops.append(dist.P2POp(dist.isend, sent[q], q))
                self.wire_bytes += sent[q].nbytes
        if not ops:
            return
        works = dist.batch_isend_irecv(ops)
        try:
            for work in works:
                work.wait(self.timeout) if self.wire.type == "cpu" else work.wait()
        except RuntimeError as error:
            peers = {q: list(self.hosts[q]) for q in sorted(sent.keys() | received.keys())}
            raise ConnectionError(f"process {self.rank} lost a neighbour in round {t}; it was exchanging with processes "
                                  f"(and their peers) {peers}: {str(error).splitlines()[0][:200]}") from error

    def agree(self, value: int) -> int:
        flag = torch.tensor([value], dtype=torch.int64, device=self.wire)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.control_bytes += flag.nbytes
        return int(flag)

    def gather(self, rows: Tensor) -> Tensor | None:
        """Rows (P, D) of every process to process 0, as (N, D) in peer order."""
        mine = rows.to(self.wire).contiguous()
        if self.rank != 0:
            self.control_bytes += mine.nbytes
            _wait(dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, 0)]))
            return None
        parts = [mine] + [mine.new_empty(len(peers), rows.shape[1]) for peers in self.hosts[1:]]
        if self.size > 1:
            _wait(dist.batch_isend_irecv([dist.P2POp(dist.irecv, part, q) for q, part in enumerate(parts) if q]))
        return torch.cat(parts).to(rows.device)

    def close(self) -> None:
        """Leave together: without the barrier gloo aborts now and then when one process is gone before another."""
        dist.barrier()
        dist.destroy_process_group()


def _wait(works) -> None:
    for work in works:
        work.wait()


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
