"""CSV, TSV, JSON Lines and Parquet files as tables; what cannot be read is named with its line."""

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from dfl.config import DataConfig
from dfl.tasks.tables import Table


def load(data: DataConfig) -> tuple[Table, Table | None, dict[str, Any]]:
    """CSV, TSV, JSON Lines (also .gz) or Parquet files, columns named in the recipe."""
    if data.train is None:
        raise ValueError("data.train is missing: data.source = 'file' needs the path of the training examples")
    train = read(data.train, "train")
    return train, None if data.valid is None else read(data.valid, "valid"), {}


def read(name: str, key: str) -> Table:
    """The table in the file `name` that `data.<key>` names; ValueError in one line for whatever is wrong with it."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"data.{key} = {name!r} is not a file")
    suffix = suffix_of(path)
    if suffix not in READERS:
        raise ValueError(f"data.{key} = {name!r} has an unknown extension; allowed: {', '.join(READERS)}, also .gz")
    columns, lines = READERS[suffix](path)
    if not lines:
        raise ValueError(f"data.{key} = {name!r} is empty: it has no row of examples")
    return Table(columns, str(path), lines, path.parent)


def suffix_of(path: Path) -> str:
    """`.csv` of data.csv, data.CSV and data.csv.gz."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _text(path: Path) -> str:
    """The decoded content, without a byte order mark."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} of {path} is not UTF-8 (byte {raw[error.start]:#x})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _separated(path: Path, **dialect: Any) -> tuple[dict[str, list], list[int]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(_text(path), newline=""), **dialect)
    rows, lines = [], []
    try:
        header = next(reader, [])
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path}: {error}") from None
    _check_rows(path, header, rows, lines)
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}, lines


def _check_rows(path: Path, header: list[str], rows: list[list[str]], lines: list[int]) -> None:
    if len(set(header)) < len(header):
        raise ValueError(f"{path} names a column twice in its first line: {', '.join(header)}")
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(header):
            raise ValueError(f"line {line} of {path} has {len(row)} fields, the first line has {len(header)}: "
                             f"{', '.join(header)}")


def _csv(path: Path) -> tuple[dict[str, list], list[int]]:
    return _separated(path, strict=True)


def _tsv(path: Path) -> tuple[dict[str, list], list[int]]:
    # quotes are text here: the files of GLUE hold unbalanced ones
    return _separated(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _json_lines(path: Path) -> tuple[dict[str, list], list[int]]:
    rows, lines = [], []
    for line, text in enumerate(_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"line {line} of {path} is not JSON ({error}); JSON Lines has one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {line} of {path} is not a JSON object; JSON Lines has one object a line")
        rows.append(row)
        lines.append(line)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}, lines


def _parquet(path: Path) -> tuple[dict[str, list], list[int]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow to be read; pip install 'dfl[data]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is not a Parquet file: {' '.join(str(error).split())[:120]}") from None
    return table.to_pydict(), list(range(1, table.num_rows + 1))


READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_lines,
           ".parquet": _parquet}
