"""The frame around all that one process sends another: its kind, run, round, sender, length and digest, checked before it is read.

A frame finds accidents and mistakes: a message that was cut, left over, mixed up or changed on the way, a process of another run.
It does not prove who sent it: the digest has no key, and whoever can reach the ports of a run can make one.
"""

import struct
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

_MAGIC, _VERSION = b"DFLg", 3
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
    if buffer.numel() >= num_bytes + len(_MARK):
        write(buffer, num_bytes, _MARK)
    return buffer


def write(buffer: Tensor, offset: int, data: bytes) -> None:
    """Put bytes into a buffer (uint8)."""
    if buffer.device.type == "cpu":  # numpy does it in a third of the time
        buffer.numpy()[offset:offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
    else:
        buffer[offset:offset + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)


def first_bytes(buffer: Tensor, num_bytes: int, offset: int = 0) -> bytes:
    """Up to num_bytes from `offset` of a buffer (uint8)."""
    if buffer.device.type == "cpu":
        return buffer.numpy()[offset:offset + num_bytes].tobytes()
    return buffer[offset:offset + num_bytes].cpu().numpy().tobytes()


def seal(frame: Tensor, label: Label) -> Tensor:
    """Write the header of a frame whose contents, from HEADER on, are complete."""
    write(frame, 0, _HEADER.pack(_MAGIC, _VERSION, *_numbers(label), frame.numel(), digest(frame[HEADER:])))
    return frame


def contents(buffer: Tensor, num_bytes: int, label: Label) -> Tensor:
    """What is in a frame of num_bytes, a view into the buffer. FrameError names the first field that is not as expected."""
    found = _HEADER.unpack(first_bytes(buffer, HEADER))
    expected = (_MAGIC, _VERSION, *_numbers(label), num_bytes)
    if found[:-1] != expected:
        for name, got, want in zip(("magic", "version", "kind", "sender", "run", "round", "bytes"), found, expected, strict=False):
            if got != want:
                raise FrameError(f"a message with {name} = {got!r}; expected {want!r}")
    if first_bytes(buffer, len(_MARK), num_bytes) not in (b"", _MARK):
        raise FrameError(f"a message that is longer than it says ({num_bytes} bytes)")
    inside = buffer[HEADER:num_bytes]
    if digest(inside) != found[-1]:
        raise FrameError(f"a message whose digest is not that of its {num_bytes} bytes: it is shorter than it says, or changed")
    return inside


def length(buffer: Tensor, most: int) -> int:
    """How long a frame says that it is, for one whose length its receiver does not know. FrameError above `most`."""
    magic, _, _, _, _, _, num_bytes, _ = _HEADER.unpack(first_bytes(buffer, HEADER))
    if magic != _MAGIC or not HEADER <= num_bytes <= most:
        raise FrameError(f"a message that announces {num_bytes} bytes; allowed: {HEADER} to {most}")
    return num_bytes


@cache
def _number_of(kind: str) -> int:
    return zlib.crc32(kind.encode()) & 0xffff


def _numbers(label: Label) -> tuple[int, int, int, int]:
    return _number_of(label.kind), label.sender, label.run, 0 if label.round is None else label.round + 1


def digest(data: Tensor) -> bytes:
    """8 bytes from data (uint8): XXH3, which reads it once and faster than a copy does.

    On a GPU, of the column and row sums of its 64-bit words, modulo 2^64, so that the data stay there: one word that changes, a part
    that is missing or two that are exchanged change them; what does not has to change four words in a rectangle. Both ends of a
    connection have their buffers on the same kind of device.
    """
    if data.device.type == "cpu":
        return xxhash.xxh3_64_digest(data.numpy().data)
    return digest_of_sums(data)


def digest_of_sums(data: Tensor) -> bytes:
    """The digest on a GPU, of data (uint8) that starts at a multiple of 8 bytes."""
    whole = data.numel() // (8 * _COLUMNS) * (8 * _COLUMNS)
    table = data[:whole].view(torch.int64).view(-1, _COLUMNS)
    found = xxhash.xxh3_64(struct.pack("<Q", data.numel()))
    for part in (table.sum(0), table.sum(1), data[whole:]):
        found.update(np.ascontiguousarray(part.cpu().numpy()).data)
    return found.digest()
