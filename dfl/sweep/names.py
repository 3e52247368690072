"""What the folder of a run is called: its varying fields, readable, the same whatever other runs there are."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

# a method and a topology speak for themselves; other values need the name of their field
_ALONE = ("method", "topology", "method.name", "topology.name")
_LONGEST = 120


def names(fields: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[str]:
    """A folder name for each mapping from dotted fields to values, different even where case does not count.

    `{"method": {"name": "tad", "T": 5}, "train.lr": 0.01}` becomes `tad-T=5__lr=0.01`.
    """
    last = [axis.rpartition(".")[2] for axis in axes]
    labels = {axis: name if last.count(name) == 1 else axis for axis, name in zip(axes, last, strict=True)}
    found = ["__".join(_part(key, labels[key], value) for key, value in one.items()) or "run" for one in fields]
    count = Counter(name.casefold() for name in found)
    return [name if count[name.casefold()] == 1 and len(name) <= _LONGEST else f"{name[:_LONGEST - 9]}__{_digest(one)}"
            for name, one in zip(found, fields, strict=True)]


def _part(key: str, label: str, value: Any) -> str:
    text = _text(value)
    return text if key in _ALONE else f"{label}={text}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        parameters = [f"{key}={_text(inner)}" for key, inner in value.items() if key != "name"]
        return "-".join(([_text(value["name"])] if "name" in value else []) + parameters)
    if isinstance(value, (list, tuple)):
        return "+".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.10g}"
    # of a path its last part; nothing that a shell or a file system reads in its own way
    return re.sub(r"[^\w.+=-]+", "-", str(value).rstrip("/").rpartition("/")[2]).strip("-.") or "x"


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:7]
