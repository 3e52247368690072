"""Raw examples as columns, and the checks that turn a wrong column, a missing label or a stray value into one clear line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dfl.plugins import did_you_mean


@dataclass(frozen=True)
class Table:
    """Columns of equal length. `where` names the file in errors, `lines[i]` the line of row i."""

    columns: dict[str, list]
    where: str
    lines: Sequence[int]
    folder: Path = Path()  # relative image paths start here
    class_names: dict[str, list[str]] = field(default_factory=dict)  # of columns whose label order is declared

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self, index: np.ndarray) -> "Table":
        columns = {name: [values[i] for i in index] for name, values in self.columns.items()}
        return Table(columns, self.where, [self.lines[i] for i in index], self.folder, self.class_names)


def column(table: Table, key: str, name: str) -> list:
    """The column that `data.<key>` names; ValueError if the file has no such column."""
    if name not in table.columns:
        raise ValueError(f"data.{key} = {name!r}: no such column in {table.where}{did_you_mean(name, table.columns)}; "
                         f"it has: {', '.join(table.columns)}")
    return table.columns[name]


def texts(table: Table, key: str, name: str) -> list[str]:
    """A column of texts. ValueError names the first line that holds none."""
    values = column(table, key, name)
    for line, value in zip(table.lines, values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f"data.{key} = {name!r}: line {line} of {table.where} holds {_short(value)}, not a text")
    return values


def numbers(table: Table, key: str, name: str) -> list[float]:
    """A column of finite numbers. ValueError names the first line that holds none."""
    found = []
    for line, value in zip(table.lines, column(table, key, name), strict=True):
        number = _number(str(value).strip())[0]
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError(f"data.{key} = {name!r}: line {line} of {table.where} holds {_short(value)}, not a finite number")
        found.append(number)
    return found


def label_texts(table: Table, name: str) -> list[str]:
    """The label column as texts. ValueError names the first line without a label."""
    values = column(table, "label", name)
    for line, value in zip(table.lines, values, strict=True):
        if value is None or isinstance(value, (list, dict)) or value != value or not str(value).strip():
            raise ValueError(f"data.label = {name!r}: line {line} of {table.where} has no label (found {_short(value)})")
    return [str(value).strip() for value in values]


def label_names(table: Table, name: str) -> list[str]:
    """The labels that occur, sorted; as numbers where all of them are numbers. ValueError for fewer than two."""
    if name in table.class_names:
        return list(table.class_names[name])
    found = set(label_texts(table, name))
    if len(found) < 2:
        raise ValueError(f"data.label = {name!r}: every row of {table.where} has the label {found.pop()!r}; "
                         "a classification needs at least two")
    if len(found) == len(table) > 20:
        raise ValueError(f"data.label = {name!r}: each of the {len(table)} rows of {table.where} has a label of its own; "
                         f"name a column of classes; it has: {', '.join(table.columns)}")
    return sorted(found, key=_number if all(_number(text)[0] == _number(text)[0] for text in found) else str)


def encode_labels(table: Table, name: str, names: list[str]) -> np.ndarray:
    """(n,) int64. ValueError names the first line whose label is not among `names`."""
    index = {text: i for i, text in enumerate(names)}
    values = label_texts(table, name)
    for line, value in zip(table.lines, values, strict=True):
        if value not in index:
            raise ValueError(f"data.label = {name!r}: line {line} of {table.where} has the label {_short(value)}, "
                             f"which no training example has; allowed: {', '.join(names[:20])}")
    return np.array([index[value] for value in values], dtype=np.int64)


def split_off(table: Table, fraction: float, rng: np.random.Generator) -> tuple[Table, Table]:
    """Train and validation tables, disjoint, the latter a random `fraction` of the rows, at least one."""
    num_valid = max(1, round(len(table) * fraction))
    if fraction <= 0 or num_valid >= len(table):
        raise ValueError(f"data.valid_fraction = {fraction} of the {len(table)} rows of {table.where} leaves no "
                         f"{'validation' if fraction <= 0 else 'training'} example; give data.valid or another fraction")
    order = rng.permutation(len(table))
    return table.rows(np.sort(order[num_valid:])), table.rows(np.sort(order[:num_valid]))


def subset(table: Table, limit: int | None, rng: np.random.Generator) -> Table:
    """At most `limit` rows, drawn at random, in the order of the file."""
    if limit is None or limit >= len(table):
        return table
    return table.rows(np.sort(rng.permutation(len(table))[:limit]))


def _number(text: str) -> tuple[float, str]:
    """A key that sorts 2 before 10, and 1 before 1.0; NaN for what is no number."""
    try:
        return float(text), text
    except ValueError:
        return float("nan"), text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
