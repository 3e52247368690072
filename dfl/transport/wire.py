"""The bytes of what one process tells another in a round, inside a frame: what each peer says to whom.

    table: entries; of each: peer, parts, metadata, receivers (0xffffffff: all that are due), the receivers
           part: name, numbers, bytes;  metadatum: name, integers
    body:  the parts, each at a multiple of 16 bytes of the frame
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.transport.frames import HEADER
from dfl.transport.packet import Packet

_ENTRY = struct.Struct("<IHHI")
_SIZES = struct.Struct("<QQ")
ALL = 0xffffffff
# a name longer than this, more parts or more metadata are no message of ours
_LONGEST, _MOST = 64, 256


class WireError(ConnectionError):
    """What is in a frame is no message of ours; the text goes on from 'process k sent'."""


class Entry(NamedTuple):
    """What one peer says in this round to peers of another process: nothing, or a packet for some of those that are due."""

    peer: int
    packet: Packet | None = None
    receivers: Sequence[int] | None = None  # None: all that are due


class Draft(NamedTuple):
    """A buffer's size and the pieces to be copied into it: (offset, bytes on the CPU, or a tensor)."""

    size: int
    pieces: list[tuple[int, bytes | Tensor]]


def draft(entries: Sequence[Entry]) -> Draft:
    """Where everything goes, behind the header."""
    table = struct.pack("<I", len(entries)) + b"".join(_describe(entry) for entry in entries)
    start = _aligned(HEADER + len(table))
    pieces: list[tuple[int, bytes | Tensor]] = [(HEADER, table)]
    for entry in entries:
        for part in () if entry.packet is None else entry.packet.payload.values():
            pieces.append((start, part))
            start = _aligned(start + part.nbytes)
    return Draft(start, pieces)


def _describe(entry: Entry) -> bytes:
    if entry.packet is None:
        return _ENTRY.pack(entry.peer, 0, 0, 0)
    payload, numel, meta = entry.packet
    receivers = ALL if entry.receivers is None else len(entry.receivers)
    found = [_ENTRY.pack(entry.peer, len(payload), len(meta), receivers)]
    if entry.receivers is not None:
        found.append(struct.pack(f"<{len(entry.receivers)}I", *entry.receivers))
    for name, part in payload.items():
        found += [_name(name), _SIZES.pack(numel[name], part.nbytes)]
    for name, values in meta.items():
        found += [_name(name), struct.pack("<I", len(values)), values.contiguous().numpy().tobytes()]
    return b"".join(found)


def _name(name: str) -> bytes:
    data = name.encode()
    assert len(data) <= _LONGEST, name
    return bytes([len(data)]) + data


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def fill(frame: Tensor, what: Draft) -> None:
    """Write all of it into a frame (uint8) of `what.size` bytes, but for its header."""
    ends = [*(offset for offset, _ in what.pieces[1:]), what.size]
    for (offset, piece), end in zip(what.pieces, ends, strict=True):
        data = _tensor(piece) if isinstance(piece, bytes) else piece
        frame[offset:offset + data.nbytes] = data
        frame[offset + data.nbytes:end] = 0  # what lies between the pieces is part of what is digested


def read(inside: Tensor, device: torch.device) -> list[Entry]:
    """The entries of a frame's contents (uint8). WireError for what cannot be read."""
    try:
        return _entries(inside, device)
    except (struct.error, UnicodeDecodeError, IndexError, ValueError) as error:
        raise WireError(f"a message that cannot be read: {error}") from None


def _entries(inside: Tensor, device: torch.device) -> list[Entry]:
    reader = _Reader(inside)
    (num_entries,) = struct.unpack("<I", reader.take(4))
    described = [_read_entry(reader) for _ in range(num_entries)]
    start, entries = _aligned(HEADER + reader.at) - HEADER, []
    body = inside.to(device)
    for peer, parts, meta, receivers in described:
        payload, numel = {}, {}
        for name, numbers, num_bytes in parts:
            if start + num_bytes > len(inside):
                raise ValueError(f"part {name!r} of peer {peer} ends beyond it")
            payload[name], numel[name] = body[start:start + num_bytes], numbers
            start = _aligned(HEADER + start + num_bytes) - HEADER
        entries.append(Entry(peer, Packet(payload, numel, meta) if parts or meta else None, receivers))
    return entries


class _Reader:
    """Reads the table at the head of a buffer piece by piece; it is small, so that a GPU's copy of it is made in few steps."""

    def __init__(self, buffer: Tensor):
        self.buffer, self.at, self.data = buffer, 0, b""

    def take(self, num_bytes: int) -> bytes:
        end = self.at + num_bytes
        if end > len(self.buffer):
            raise ValueError("its table is longer than it is")
        if end > len(self.data):
            upto = min(len(self.buffer), len(self.data) + max(4096, num_bytes))
            self.data += bytes(self.buffer[len(self.data):upto].cpu().numpy())
        found = self.data[self.at:end]
        self.at = end
        return found

    def name(self) -> str:
        length = self.take(1)[0]
        if length > _LONGEST:
            raise ValueError(f"a name of {length} letters")
        return self.take(length).decode()


def _read_entry(reader: _Reader) -> tuple[int, list, dict, Sequence[int] | None]:
    peer, num_parts, num_meta, num_receivers = _ENTRY.unpack(reader.take(_ENTRY.size))
    if num_parts > _MOST or num_meta > _MOST:
        raise ValueError(f"{num_parts} parts and {num_meta} metadata of peer {peer}")
    receivers = None if num_receivers in (ALL, 0) else struct.unpack(f"<{num_receivers}I", reader.take(4 * num_receivers))
    parts = [(reader.name(), *_SIZES.unpack(reader.take(_SIZES.size))) for _ in range(num_parts)]
    meta = {}
    for _ in range(num_meta):
        name = reader.name()
        (count,) = struct.unpack("<I", reader.take(4))
        meta[name] = _tensor(reader.take(8 * count)).view(torch.int64)
    return peer, parts, meta, receivers


def _aligned(num_bytes: int) -> int:
    """Up to a multiple of 16, so that a part starts where a view of any type may start."""
    return -(-num_bytes // 16) * 16
