"""What a run leaves behind beside its adapters: JSON lines, a description of itself, a progress line, trackers."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfl.store.directory import all_records
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


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null stands for both."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict]:
    """The records of a run with this metrics.jsonl, what each process wrote put together. A line torn by a kill is left out; so is a
    damaged one, with a warning that names it."""
    found = [scan(file.read_bytes(), file.name) for file in all_records(path.parent) or [path]]
    for problem in (one.problem for one in found if one.problem):
        logger.warning("dfl: WARNING: %s: %s", path.parent, problem)
    return joined([one.records for one in found])


def joined(of_processes: list[list[dict]]) -> list[dict]:
    """The records of process 0 with what the others have written of their own peers."""
    first, *rest = of_processes
    parts: dict[int, list[dict]] = {}
    for record in (record for records in rest for record in records):
        parts.setdefault(record["round"], []).append(record)
    return [join(record, parts.get(record["round"], [])) for record in first]


def join(record: dict, parts: list[dict]) -> dict:
    """A record with those of other processes of the same round: lists of values by peer are put in order; a peer of which nothing
    was written has None."""
    if "hosted" not in record:
        return record
    parts = [part for part in (record, *parts) if isinstance(part.get("hosted"), list)]
    num_peers = 1 + max((peer for part in parts for peer in part["hosted"]), default=-1)

    def put(trees: list[tuple[list[int], dict]], below_peers: bool) -> dict:
        found = dict(trees[0][1])
        for key in dict.fromkeys(key for _, tree in trees for key in tree):
            values = [(hosted, tree[key]) for hosted, tree in trees if key in tree]
            if all(isinstance(value, dict) for _, value in values):
                found[key] = put(values, below_peers or key == "peers")
            elif below_peers or key.endswith("_peers"):
                found[key] = _by_peer(values, num_peers)
            elif key == "rejected_senders":
                found[key] = sorted({sender for _, senders in values for sender in senders})
        return found

    return {key: value for key, value in put([(part["hosted"], part) for part in parts], False).items() if key != "hosted"}


def _by_peer(values: list[tuple[list[int], list]], num_peers: int) -> list:
    found = [None] * num_peers
    for hosted, of_hosted in values:
        for peer, value in zip(hosted, of_hosted if isinstance(of_hosted, list) else (), strict=False):
            found[peer] = value
    return found


def of_peers(record: dict) -> dict:
    """What of a record is of the peers of one process alone, and the round."""
    kept = {key: of_peers(value) if isinstance(value, dict) and key != "peers" else value for key, value in record.items()
            if isinstance(value, dict) or key in ("round", "hosted", "rejected_senders") or key.endswith("_peers")}
    return {key: value for key, value in kept.items() if value != {}}


def flatten(record: dict, prefix: str = "") -> dict[str, float]:
    """Nested numbers as `a/b` keys; lists, texts and what is not finite are left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            flat[prefix + key] = value
    return flat

