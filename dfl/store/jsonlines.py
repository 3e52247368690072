"""Files of records, metrics.jsonl and metrics-K.jsonl of process K, as they are found, and the way back to a round.

Their records, lines that are damaged, a last one that a kill has torn.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """damaged: the numbers, from 1, of lines that hold no record of a round. torn: the last line has no end, and holds none either."""

    records: list[dict]
    damaged: list[int]
    torn: bool
    name: str = "metrics.jsonl"

    @property
    def problem(self) -> str | None:
        """What is to be said about it: nothing of a torn line, which a kill leaves."""
        if not self.damaged:
            return None
        lines = f"line {self.damaged[0]}" if len(self.damaged) == 1 else f"lines {', '.join(map(str, self.damaged))}"
        return f"{lines} of {self.name} cannot be read (damaged) and {'is' if len(self.damaged) == 1 else 'are'} left out"


class _Line(NamedTuple):
    number: int
    end: int  # the offset behind it
    whole: bool  # it has an end of its own
    record: dict | None


def scan(raw: bytes, name: str = "metrics.jsonl") -> Found:
    """Everything that can be read, whatever lies between. name: of the file, for `problem`."""
    lines = _lines(raw)
    return Found([line.record for line in lines if line.record is not None],
                 [line.number for line in lines if line.record is None and line.whole],
                 any(line.record is None and not line.whole for line in lines), name)


def _lines(raw: bytes) -> list[_Line]:
    """The lines that are not blank. A round out of order between two that are in order is no record: one of its digits is another."""
    found = list(_split(raw))
    rounds: list[Any] = [line.record["round"] if line.record is not None else None for line in found]
    for at in range(1, len(found) - 1):
        before, this, after = rounds[at - 1:at + 2]
        if None not in (before, this, after) and before < after and not before < this < after and this != before + 1:
            found[at], rounds[at] = found[at]._replace(record=None), None
    return found


def _split(raw: bytes) -> Iterator[_Line]:
    start = 0
    for number, text in enumerate(raw.split(b"\n"), 1):
        end = min(start + len(text) + 1, len(raw))
        if text.strip():
            yield _Line(number, end, start + len(text) < len(raw), _record(text))
        start = end


def _record(text: bytes) -> dict | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or bytes that are no text
        return None
    right = isinstance(record, dict) and type(record.get("round")) is int and record["round"] >= 0
    return record if right else None


def rewind(path: Path, before: int) -> None:
    """Drop the rounds from `before` on, and a torn last line. What lies between earlier rounds stays as it is, byte for byte.

    A damaged line is reported. Where one would be dropped, as it lies behind the last of the earlier rounds, a copy of the whole
    file is kept beside it.
    """
    raw = path.read_bytes()
    lines, problem = _lines(raw), scan(raw, path.name).problem
    end = max((line.end for line in lines if line.record is not None and line.record["round"] < before), default=0)
    if problem is not None:
        copied = ""
        if any(line.record is None and line.whole and line.end > end for line in lines):
            copied = f"; the file as it was is kept as {_copy(path)}"
        logger.warning("dfl: WARNING: %s: %s%s", path.parent, problem, copied)
    kept = raw[:end] + (b"\n" if end and raw[end - 1:end] != b"\n" else b"")
    draft = path.with_name(f".{path.name}.draft")  # a writer that was left behind goes on in the file that was
    draft.write_bytes(kept)
    draft.replace(path)


def _copy(path: Path) -> str:
    """A copy under a name that is free."""
    number = next(k for k in range(1, 1 << 30) if not path.with_name(f"{path.name}.damaged-{k}").exists())
    copy = path.with_name(f"{path.name}.damaged-{number}")
    shutil.copy2(path, copy)
    return copy.name
