"""What a run leaves behind beside its adapters: JSON lines, a description of itself, a progress line, trackers."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

from dfl.store.jsonlines import rewind, scan

logger = logging.getLogger(__name__)
class JsonLines:
    """Append-only `metrics.jsonl`, flushed line by line: what a killed run wrote is valid."""

    def __init__(self, path: Path, keep_before: int | None = None, guard: Callable[[], None] = lambda: None):
        """keep_before: drop the rounds from this one on (they are about to be run again), and any torn last line (jsonlines.py).
        guard: called before every write, raises where the file is another run's.

        OSError names the file.
        """
        if keep_before is not None and path.exists():
            guard()
            rewind(path, keep_before)
        # unbuffered: after a failed write nothing is left that close would try to write again
        self._path, self._file, self._guard = path, path.open("ab", buffering=0), guard

    def write(self, record: dict) -> None:
        self._guard()
        line = (json.dumps(finite(record), allow_nan=False) + "\n").encode()
        try:
            while line:  # a disk that fills up takes a part, and refuses the rest
                line = line[self._file.write(line):]
        except OSError as error:
            raise OSError(error.errno, f"the record could not be written: {error.strerror}", str(self._path)) from error

    def close(self) -> None:
        self._file.close()


def finite(value):
    """JSON has no infinity and no NaN: null stands for both."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict]:
    """The records of a metrics file. A line torn by a kill is left out; so is a damaged one, with a warning that names it."""
    found = scan(path.read_bytes())
    if found.problem:
        logger.warning("dfl: WARNING: %s: %s", path.parent, found.problem)
    return found.records


def flatten(record: dict, prefix: str = "") -> dict[str, float]:
    """Nested numbers as `a/b` keys; lists, texts and what is not finite are left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            flat[prefix + key] = value
    return flat

