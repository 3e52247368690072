"""The frame around all that one process sends another: its kind, run, round, sender, length and digest, checked before it is read.

A frame finds accidents and mistakes: a message that was cut, left over, mixed up or changed on the way, a process of another run.
It does not prove who sent it: the digest has no key, and whoever can reach the ports of a run can make one.
"""

import hashlib
import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_MAGIC, _VERSION = b"DFLg", 2
# magic, version, kind, sender, run, round, bytes of the whole frame, digest of what follows, nothing
_HEADER = struct.Struct("<4sHHIQQQ8s4x")
HEADER = _HEADER.size
# a buffer has room behind the frame that is expected, so that a longer one is noticed: gloo ends the process of a receiver whose
# buffer is too small. Nothing is written there, so that it takes addresses and no memory.
_TIMES, _MORE = 4, 2**22
_MARK = b"nothing was received here"
_COLUMNS = 1024


class Label(NamedTuple):
    """What a frame is, known to both ends."""

    kind: str
    sender: int
    run: int
    round: int | None  # None: before the first


class FrameError(ConnectionError):
    """A frame is not what its receiver expects; the text goes on from 'process k sent'."""


def room(num_bytes: int, device: torch.device) -> int:
    """The bytes of a buffer for a frame of num_bytes."""
    return num_bytes if device.type == "cuda" else _TIMES * num_bytes + _MORE


def expect(buffer: Tensor, num_bytes: int) -> Tensor:
    """The same buffer, marked behind the frame of num_bytes that it is for: a longer one overwrites the mark."""
    mark = buffer[num_bytes:num_bytes + len(_MARK)]
    if len(mark) == len(_MARK):
        mark.copy_(torch.frombuffer(bytearray(_MARK), dtype=torch.uint8))
    return buffer


def seal(frame: Tensor, label: Label) -> Tensor:
    """Write the header of a frame whose contents, from HEADER on, are complete."""
    head = _HEADER.pack(_MAGIC, _VERSION, *_numbers(label), len(frame), digest(frame[HEADER:]))
    frame[:HEADER] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    return frame


def contents(buffer: Tensor, num_bytes: int, label: Label) -> Tensor:
    """What is in a frame of num_bytes, a view into the buffer. FrameError names the first field that is not as expected."""
    found = _HEADER.unpack(bytes(buffer[:HEADER].cpu().numpy()))
    expected = (_MAGIC, _VERSION, *_numbers(label), num_bytes)
    for name, got, want in zip(("magic", "version", "kind", "sender", "run", "round", "bytes"), found, expected, strict=False):
        if got != want:
            raise FrameError(f"a message with {name} = {got!r}; expected {want!r}")
    mark = bytes(buffer[num_bytes:num_bytes + len(_MARK)].cpu().numpy())
    if mark not in (b"", _MARK):
        raise FrameError(f"a message that is longer than it says ({num_bytes} bytes)")
    inside = buffer[HEADER:num_bytes]
    if digest(inside) != found[-1]:
        raise FrameError(f"a message whose digest is not that of its {num_bytes} bytes: it is shorter than it says, or changed")
    return inside


def length(buffer: Tensor, most: int) -> int:
    """How long a frame says that it is, for one whose length its receiver does not know. FrameError above `most`."""
    magic, _, _, _, _, _, num_bytes, _ = _HEADER.unpack(bytes(buffer[:HEADER].cpu().numpy()))
    if magic != _MAGIC or not HEADER <= num_bytes <= most:
        raise FrameError(f"a message that announces {num_bytes} bytes; allowed: {HEADER} to {most}")
    return num_bytes


def _numbers(label: Label) -> tuple[int, int, int, int]:
    return zlib.crc32(label.kind.encode()) & 0xffff, label.sender, label.run, 0 if label.round is None else label.round + 1


def digest(data: Tensor) -> bytes:
    """8 bytes from data (uint8) that starts at a multiple of 8 bytes: BLAKE2b of the column and row sums of its 64-bit words.

    The sums, modulo 2^64, read the data at the speed of a copy, where BLAKE2b itself takes thirty times as long. One word that
    changes, a part that is missing or two that are exchanged change them; what does not has to change four words in a rectangle.
    """
    whole = len(data) // (8 * _COLUMNS) * (8 * _COLUMNS)
    table = data[:whole].view(torch.int64).view(-1, _COLUMNS)
    found = hashlib.blake2b(struct.pack("<Q", len(data)), digest_size=8)
    for part in (table.sum(0), table.sum(1), data[whole:]):
        found.update(np.ascontiguousarray(part.cpu().numpy()).data)
    return found.digest()
