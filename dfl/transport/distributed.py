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
_ENTRY = struct.Struct("<IIQ")  # peer, flags (none defined yet), bytes
_VERSION = 1


class Distributed:
    """Packed point-to-point exchange. Both ends derive the same lists from the same edges, so nothing is announced.

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

    def exchange(self, t: int, outbox: Outbox, edges: Sequence[tuple[int, int]], size: int) -> Inboxes:
        """Deliver messages of `size` bytes along `edges` (sender, receiver). ConnectionError names who did not answer."""
        outgoing, incoming = self._lists(edges)
        sent = {q: self._pack(t, outbox, peers, size) for q, peers in outgoing.items()}
        received = {q: torch.empty(_buffer_bytes(len(peers), size), dtype=torch.uint8, device=self.wire)
                    for q, peers in incoming.items()}
        self._transfer(t, sent, received)
        arrived = dict(outbox)
        for q, peers in incoming.items():
            arrived |= self._unpack(t, q, received[q], peers, size)
        inboxes: Inboxes = {peer: {} for peer in self.hosted}
        for sender, receiver in edges:
            if receiver in inboxes:
                inboxes[receiver][sender] = arrived[sender]
        return inboxes

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

    def _pack(self, t: int, outbox: Outbox, peers: list[int], size: int) -> Tensor:
        total = _buffer_bytes(len(peers), size)
        buffer = torch.empty(total, dtype=torch.uint8, device=self.wire)
        head = _HEADER.pack(_MAGIC, _VERSION, len(peers), self.run, t, total)
        head += b"".join(_ENTRY.pack(peer, 0, size) for peer in peers)
        buffer[:len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        start = _header_bytes(len(peers))
        for peer in peers:
            buffer[start:start + size] = outbox[peer]
            start += size
        return buffer

    def _unpack(self, t: int, process: int, buffer: Tensor, peers: list[int], size: int) -> dict[int, Tensor]:
        raw = bytes(buffer[:_HEADER.size + _ENTRY.size * len(peers)].cpu().numpy())
        found = _HEADER.unpack_from(raw)
        expected = (_MAGIC, _VERSION, len(peers), self.run, t, len(buffer))
        for name, got, want in zip(("magic", "version", "messages", "run", "round", "bytes"), found, expected, strict=True):
            if got != want:
                raise ConnectionError(f"process {process} sent a message with {name} = {got!r} in round {t}; "
                                      f"expected {want!r}")
        entries = [_ENTRY.unpack_from(raw, _HEADER.size + _ENTRY.size * k) for k in range(len(peers))]
        if entries != [(peer, 0, size) for peer in peers]:
            raise ConnectionError(f"process {process} sent messages (peer, flags, bytes) {entries} in round {t}; "
                                  f"expected peers {peers} with {size} bytes each")
        body = buffer[_header_bytes(len(peers)):].to(self.device)
        return {peer: body[k * size:(k + 1) * size] for k, peer in enumerate(peers)}

    def _transfer(self, t: int, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """All sends and receives of the round in one batch, other processes in ascending order at both ends."""
        ops = []
        for q in sorted(sent.keys() | received.keys()):
            if q in received:
                ops.append(dist.P2POp(dist.irecv, received[q], q))
            if q in sent:
                ops.append(dist.P2POp(dist.isend, sent[q], q))
                self.wire_bytes += len(sent[q])
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


def _header_bytes(num_messages: int) -> int:
    """Padded to 16 bytes, so that messages start where a float32 view may start."""
    return -(-(_HEADER.size + _ENTRY.size * num_messages) // 16) * 16


def _buffer_bytes(num_messages: int, size: int) -> int:
    return _header_bytes(num_messages) + num_messages * size
