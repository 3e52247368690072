"""The bytes of what one process tells another in a round, inside a frame: what each peer says to whom.

    table: entries; of each: peer, parts, metadata, receivers (0xffffffff: all that are due), the receivers
           part: name, numbers, bytes;  metadatum: name, integers
    body:  the parts, each at a multiple of 16 bytes of the frame
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.transport.frames import HEADER, first_bytes, write
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


class Lent(NamedTuple):
    """A row from where messages may be sent: `free` bytes that belong to nobody, the `used` bytes of the row, zeros up to 16."""

    area: Tensor
    free: int
    used: int


def lent(row: Tensor, free: int) -> Lent:
    """row (D,), a view with so many free bytes before it in its storage, and zeros behind it."""
    area = torch.empty(0, dtype=torch.uint8).set_(row.untyped_storage())
    start = row.storage_offset() * row.itemsize
    return Lent(area[start - free:start + _aligned(row.nbytes)], free, row.nbytes)


def in_place(what: Draft, row: Lent) -> Tensor | None:
    """The frame where its pieces lie already, its table written before them. None where they do not lie in the row as in a frame, or
    where the table is too long. The row begins with the first of them."""
    (_, table), (start, first), *rest = what.pieces
    assert isinstance(table, bytes) and isinstance(first, Tensor)
    used = what.pieces[-1][0] + what.pieces[-1][1].nbytes - start  # type: ignore[union-attr]
    # what is not sent of a row may not go along to fill up 16 bytes
    if start > row.free or used > row.used or (used % 16 and used != row.used):
        return None
    if any(piece.data_ptr() - first.data_ptr() != offset - start for offset, piece in rest):  # type: ignore[union-attr]
        return None
    frame = row.area[row.free - start:row.free - start + what.size]
    write(frame, HEADER, table + bytes(start - HEADER - len(table)))
    return frame


def _describe(entry: Entry) -> bytes:
    if entry.packet is None:
        return _ENTRY.pack(entry.peer, 0, 0, 0)
    payload, numel, meta = entry.packet
    receivers = ALL if entry.receivers is None else len(entry.receivers)
    found = [_ENTRY.pack(entry.peer, len(payload), len(meta), receivers)]
    if entry.receivers is not None:
        found.append(struct.pack(f"<{len(entry.receivers)}I", *entry.receivers))
    found += [_described(name, numel[name], part.nbytes) for name, part in payload.items()]
    for name, values in meta.items():
        found += [_name(name), struct.pack("<I", len(values)), values.contiguous().numpy().tobytes()]
    return b"".join(found)


@lru_cache
def _described(name: str, numel: int, num_bytes: int) -> bytes:
    return _name(name) + _SIZES.pack(numel, num_bytes)


def _name(name: str) -> bytes:
    data = name.encode()
    assert len(data) <= _LONGEST, name
    return bytes([len(data)]) + data


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def fill(frame: Tensor, what: Draft) -> None:
    """Write all of it into a frame (uint8) of `what.size` bytes, but for its header. Copies from a GPU are only begun, on
    its current stream."""
    ends = [*(offset for offset, _ in what.pieces[1:]), what.size]
    on_cpu = frame.numpy() if frame.device.type == "cpu" else None
    for (offset, piece), end in zip(what.pieces, ends, strict=True):
        if isinstance(piece, bytes):
            size = len(piece)
            write(frame, offset, piece)
        else:
            size = piece.nbytes
            if on_cpu is not None and piece.device.type == "cpu":
                on_cpu[offset:offset + size] = piece.numpy()
            else:
                frame[offset:offset + size].copy_(piece, non_blocking=True)
        if offset + size < end:
            frame[offset + size:end] = 0  # what lies between the pieces is part of what is digested


class Reader:
    """Reads the frames of one sender, into the entries of which it makes views.

    The table of a round is mostly that of the round before, in the same buffer: then so are the entries.
    """

    def __init__(self) -> None:
        self._place, self._table = (0, 0), b""
        self._entries: list[Entry] = []

    def read(self, inside: Tensor, device: torch.device) -> list[Entry]:
        """The entries of a frame's contents (uint8). WireError for what cannot be read."""
        place = (inside.data_ptr(), inside.numel())
        stays = inside.device == device  # else a copy is made of it
        if stays and place == self._place and first_bytes(inside, len(self._table)) == self._table:
            return self._entries
        try:
            self._entries, self._table = _entries(inside, device)
        except (struct.error, UnicodeDecodeError, IndexError, ValueError) as error:
            self._place = (0, 0)
            raise WireError(f"a message that cannot be read: {error}") from None
        self._place = place if stays else (0, 0)
        return self._entries


def _entries(inside: Tensor, device: torch.device) -> tuple[list[Entry], bytes]:
    """The entries, and the table before them."""
    table = _Table(inside)
    (num_entries,) = struct.unpack("<I", table.take(4))
    described = [_read_entry(table) for _ in range(num_entries)]
    start, entries = _aligned(HEADER + table.at) - HEADER, []
    body = _moved(inside, device)
    for peer, parts, meta, receivers in described:
        payload, numel = {}, {}
        for name, numbers, num_bytes in parts:
            if start + num_bytes > inside.numel():
                raise ValueError(f"part {name!r} of peer {peer} ends beyond it")
            payload[name], numel[name] = body[start:start + num_bytes], numbers
            start = _aligned(HEADER + start + num_bytes) - HEADER
        entries.append(Entry(peer, Packet(payload, numel, meta) if parts or meta else None, receivers))
    return entries, table.data[:table.at]


def _moved(inside: Tensor, device: torch.device) -> Tensor:
    """The bytes of a frame on a device; to a GPU from pages that it reads by itself, so that the next frame is checked
    meanwhile. Those into which it was received are no such pages: there is much more room than what has come."""
    if device.type != "cuda" or inside.is_cuda:
        return inside.to(device)
    return inside.pin_memory().to(device, non_blocking=True)


class _Table:
    """The table at the head of a frame's contents, piece by piece; it is small, so that a GPU's copy of it is made in few steps."""

    def __init__(self, buffer: Tensor):
        self.buffer, self.size, self.at, self.data = buffer, buffer.numel(), 0, b""

    def take(self, num_bytes: int) -> bytes:
        end = self.at + num_bytes
        if end > self.size:
            raise ValueError("its table is longer than it is")
        if end > len(self.data):
            self.data += first_bytes(self.buffer, max(4096, num_bytes), len(self.data))
        found = self.data[self.at:end]
        self.at = end
        return found

    def name(self) -> str:
        length = self.take(1)[0]
        if length > _LONGEST:
            raise ValueError(f"a name of {length} letters")
        return self.take(length).decode()


def _read_entry(table: _Table) -> tuple[int, list, dict, Sequence[int] | None]:
    peer, num_parts, num_meta, num_receivers = _ENTRY.unpack(table.take(_ENTRY.size))
    if num_parts > _MOST or num_meta > _MOST:
        raise ValueError(f"{num_parts} parts and {num_meta} metadata of peer {peer}")
    receivers = None if num_receivers in (ALL, 0) else struct.unpack(f"<{num_receivers}I", table.take(4 * num_receivers))
    parts = [(table.name(), *_SIZES.unpack(table.take(_SIZES.size))) for _ in range(num_parts)]
    meta = {}
    for _ in range(num_meta):
        name = table.name()
        (count,) = struct.unpack("<I", table.take(4))
        meta[name] = _tensor(table.take(8 * count)).view(torch.int64)
    return peer, parts, meta, receivers


def _aligned(num_bytes: int) -> int:
    """Up to a multiple of 16, so that a part starts where a view of any type may start."""
    return -(-num_bytes // 16) * 16
