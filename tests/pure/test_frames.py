"""Frames between processes: what a digest sees, and a message that is sent from where it lies."""

import pytest
import torch

from dfl.adapters.layout import empty_rows
from dfl.transport import frames, wire
from dfl.transport.base import FREE
from dfl.transport.packet import Packet
from dfl.transport.wire import Entry

LABEL = frames.Label("exchange", 3, 7, 4)
CPU = torch.device("cpu")


def sealed(num_bytes: int = 30_000) -> torch.Tensor:
    frame = torch.randint(0, 256, (frames.HEADER + num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return frames.seal(frame, LABEL)


@pytest.mark.parametrize("digest", [frames.digest, frames.digest_of_sums])
def test_a_digest_sees_a_bit_a_missing_end_and_two_words_that_change_places(digest):
    data = sealed()[frames.HEADER:]
    known = digest(data)
    assert len(known) == 8 and digest(data.clone()) == known
    for at in (0, 1, 8192, 20_001, len(data) - 1):
        changed = data.clone()
        changed[at] ^= 1 << at % 8
        assert digest(changed) != known, at
    swapped = data.clone()
    swapped[:8], swapped[16:24] = data[16:24], data[:8]
    assert digest(swapped) != known and digest(data[:-1]) != known and digest(data[:-8]) != known
    assert digest(torch.zeros(64, dtype=torch.uint8)) != digest(torch.zeros(72, dtype=torch.uint8))


def test_what_is_in_a_frame_comes_back_and_what_was_changed_does_not():
    frame = sealed()
    assert torch.equal(frames.contents(frame, len(frame), LABEL), frame[frames.HEADER:])
    for at in (0, 5, 12, 20, frames.HEADER - 5, frames.HEADER, len(frame) - 1):
        changed = frame.clone()
        changed[at] ^= 1
        with pytest.raises(frames.FrameError):
            frames.contents(changed, len(frame), LABEL)
    with pytest.raises(frames.FrameError, match="round = 5; expected 6"):
        frames.contents(frame, len(frame), LABEL._replace(round=5))
    buffer = torch.zeros(frames.room(len(frame), CPU), dtype=torch.uint8)
    buffer[:len(frame)] = frame
    frames.contents(frames.expect(buffer, len(frame)), len(frame), LABEL)
    buffer[len(frame)] ^= 1
    with pytest.raises(frames.FrameError, match="longer than it says"):
        frames.contents(buffer, len(frame), LABEL)


def lent_row(size: int) -> torch.Tensor:
    return empty_rows(2, size, before=FREE).copy_(torch.arange(2.0 * size).view(2, size))[1]


def entry(parts: dict[str, torch.Tensor], meta: dict | None = None) -> Entry:
    return Entry(4, Packet({name: part.view(torch.uint8) for name, part in parts.items()},
                           {name: part.numel() for name, part in parts.items()}, meta or {}))


def filled(draft: wire.Draft) -> torch.Tensor:
    frame = torch.full((draft.size,), 77, dtype=torch.uint8)
    wire.fill(frame, draft)
    return frame[frames.HEADER:]


@pytest.mark.parametrize("size", [48, 49])  # the end of the row at 16 bytes, and with zeros behind it
def test_a_row_is_sent_from_where_it_is_with_the_bytes_that_a_copy_would_have(size):
    row = lent_row(size)
    before = row._base.clone()
    draft = wire.draft([entry({"A": row[:16], "B": row[16:40], "head": row[40:]}, {"common": torch.tensor([5])})])
    frame = wire.in_place(draft, wire.lent(row, 4 * FREE))
    assert frame is not None and torch.equal(frame[frames.HEADER:], filled(draft))
    assert row.data_ptr() in range(frame.data_ptr(), frame.data_ptr() + len(frame))
    frames.seal(frame, LABEL)
    assert torch.equal(before[:, FREE:], row._base[:, FREE:]) and torch.equal(before[0], row._base[0]), "no number has changed"
    (read,) = wire.Reader().read(frames.contents(frame, len(frame), LABEL), CPU)
    assert torch.equal(read.packet.payload["B"].view(torch.float32), row[16:40])


def test_what_does_not_lie_in_a_row_as_in_a_frame_is_copied():
    row = lent_row(49)
    lent = wire.lent(row, 4 * FREE)

    def place(parts, meta=None):
        return wire.in_place(wire.draft([entry(parts, meta)]), lent)

    assert place({"A": row[:16]}) is not None
    assert place({"A": row[:16], "head": row[20:28]}) is None, "not side by side"
    assert place({"A": row[:15]}) is None, "the number behind it, which is not sent, would fill the frame up to 16 bytes"
    assert place({"A": row[:15], "B": row[15:49]}) is None, "parts of a frame begin at multiples of 16 bytes"
    assert place({"A": row[:16]}, {"long": torch.arange(200)}) is None, "its table is longer than what is free"


def test_entries_are_read_anew_where_anything_but_the_numbers_has_changed():
    reader, row = wire.Reader(), lent_row(48)
    first = filled(wire.draft([entry({"A": row[:16]}, {"rank": torch.tensor([3])})]))
    (one,) = reader.read(first, CPU)
    (again,) = reader.read(first, CPU)
    assert again is one
    first[-4:] = torch.tensor([9.5]).view(torch.uint8)
    (numbers,) = reader.read(first, CPU)
    assert numbers.packet.payload["A"].view(torch.float32)[-1] == 9.5
    other = filled(wire.draft([entry({"A": row[:16]}, {"rank": torch.tensor([4])})]))
    assert len(other) == len(first)
    first.copy_(other)
    (changed,) = reader.read(first, CPU)
    assert changed.packet.meta["rank"].tolist() == [4] and one.packet.meta["rank"].tolist() == [3]
    first[:4] = 255
    with pytest.raises(wire.WireError):
        reader.read(first, CPU)
    first.copy_(other)
    (whole,) = reader.read(first, CPU)
    assert whole.packet.meta["rank"].tolist() == [4]
    (elsewhere,) = reader.read(other.clone(), CPU)
    assert elsewhere is not whole
