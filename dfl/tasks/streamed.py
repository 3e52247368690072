"""Examples that do not fit into memory: read and tokenised piece by piece into an Arrow table on disk, then read row by row.

The library datasets does the reading, the caching and the access; a table on disk has a length and a random access, so that a
partition, a permutation and a subset are what they are of a file that was read whole.
"""

import csv
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from dfl.config import DataConfig
from dfl.tasks import files, hub
from dfl.tasks.base import Encoded, Split
from dfl.tasks.summary import KNOWN, read_fields
from dfl.tasks.tables import Table, encode_labels, label_names
from dfl.version import __version__

# rows that are tokenised at a time
_PIECE = 1000
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}), ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t", "quoting": 3}),
    ".jsonl": ("json", {}), ".ndjson": ("json", {}), ".json": ("json", {}), ".parquet": ("parquet", {})}


class Rows(Sequence):
    """Tokenised examples on disk; `lengths` (n,) of all of them is in memory."""

    def __init__(self, table: Any, digest: str):
        self.table, self.digest = table, digest
        self.names = [name for name in table.column_names if name not in ("length", "lost")]
        self.lengths = np.asarray(table.with_format("numpy", columns=["length"])["length"][:], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        row = self.table[int(index)]
        return {name: np.array(row[name], dtype=np.int32) if isinstance(row[name], list) else row[name] for name in self.names}


class Columns(Mapping):
    """The columns of a table on disk, each read when it is asked for."""

    def __init__(self, table: Any):
        self.table = table

    def __getitem__(self, name: str) -> list:
        if name not in self.table.column_names:
            raise KeyError(name)
        return list(self.table[name][:])

    def __iter__(self) -> Iterator[str]:
        return iter(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table.column_names)


def read(data: DataConfig, data_seed: int) -> tuple[Any, np.ndarray, Table]:
    """The training rows as a table on disk, the line of each in its file, and the validation rows, at most data.max_valid, in memory.

    ValueError without a bound of the validation rows, and for what cannot be read.
    """
    if data.valid is None and data.max_valid is None:
        raise ValueError("data.streaming = True reads validation examples into memory; give data.valid, or data.max_valid to take so "
                         "many off the training examples")
    rng = np.random.default_rng([data_seed, 0])
    train, where = _open(data, "train"), data.train or str(data.name)
    lines = _lines(data, "train", len(train))
    if data.valid is None:
        order = rng.permutation(len(train))
        if data.max_valid >= len(train):
            raise ValueError(f"data.max_valid = {data.max_valid} of the {len(train)} rows of {where} leaves no training example")
        chosen, rest = np.sort(order[:data.max_valid]), np.sort(order[data.max_valid:])
        valid, train, lines = _in_memory(train.select(chosen), where, lines[chosen]), train.select(rest), lines[rest]
    else:
        found = _open(data, "valid")
        chosen = np.arange(len(found))
        if data.max_valid is not None and data.max_valid < len(found):
            chosen = np.sort(rng.permutation(len(found))[:data.max_valid])
        valid = _in_memory(found.select(chosen), data.valid, _lines(data, "valid", len(found))[chosen])
    if data.max_train is not None and data.max_train < len(train):
        chosen = np.sort(rng.permutation(len(train))[:data.max_train])
        train, lines = train.select(chosen), lines[chosen]
    return train, lines, valid


def _lines(data: DataConfig, key: str, count: int) -> np.ndarray:
    """Where the rows of a file with a row a line stand; the first line of a separated one names the columns."""
    header = data.source == "file" and files.suffix_of(Path(getattr(data, key))) in (".csv", ".tsv")
    return np.arange(count) + 1 + header


def _in_memory(table: Any, where: str, lines: np.ndarray) -> Table:
    return Table({name: list(table[name][:]) for name in table.column_names}, where, lines.tolist())


def _open(data: DataConfig, key: str) -> Any:
    """A file or a split as a table on disk, which the library makes and keeps in its cache."""
    if data.source == "hub":
        return hub.rows(data, key, getattr(data, key) or "train")
    if data.source != "file" or getattr(data, key) is None:
        raise ValueError(f"data.streaming = True reads data.source = 'file' (with data.train) or 'hub', got {data.source!r}")
    datasets = library()
    path = Path(getattr(data, key)).expanduser()
    suffix = files.suffix_of(path)
    if not path.is_file() or suffix not in _FORMATS:
        raise ValueError(f"data.{key} = {str(path)!r} is not a file of these kinds: {', '.join(files.READERS)}, also .gz")
    builder, options = _FORMATS[suffix]
    with hub.quiet():
        try:
            if builder == "csv":  # texts, which nobody takes for numbers
                options = options | {"features": datasets.Features(dict.fromkeys(_header(path, suffix), datasets.Value("string")))}
            return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
        except Exception as error:  # pyarrow's, pandas's and its own errors
            said = " ".join(str(error.__cause__ or error).split())[:200]
            raise ValueError(f"data.{key} = {str(path)!r} cannot be read piece by piece: {said}") from error


def _header(path: Path, suffix: str) -> list[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as lines:
        return next(csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ","), [])


def library() -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError("data.streaming = True needs the library datasets; pip install 'dfl[data]'") from None
    return datasets


def names_of(table: Any, lines: np.ndarray, data: DataConfig) -> list[str]:
    """The labels that occur."""
    if data.label not in table.column_names:
        raise ValueError(f"data.label = {data.label!r}: no such column; there are: {', '.join(table.column_names)}")
    return label_names(Table({data.label: Columns(table)[data.label]}, data.train or str(data.name), lines.tolist()), data.label)


def encode(kind: Any, table: Any, lines: np.ndarray, names: list[str], data: DataConfig, processor: Any) -> Split:
    """The training split of rows on disk, tokenised into the library's cache; the second time they are found there.

    lines (n,): where each stands in its file, for errors.
    """
    where = data.train or str(data.name)
    read = [name for _, name in read_fields(kind.name, data)] + [data.tools, *([data.label] if kind.labelled else [])]
    if kind.name in KNOWN and set(read) - {None} <= set(table.column_names):
        columns, table = Columns(table), table.select_columns(list(dict.fromkeys(name for name in read if name)))
    else:
        columns = Columns(table)
    digest = _digest(table, data, kind, processor, names)

    def piece(given: dict[str, list], places: list[int]) -> dict[str, list]:
        part = Table(given, where, lines[places].tolist())
        labels = encode_labels(part, data.label, names) if kind.labelled else np.zeros(len(part), dtype=np.int64)
        kind.check(part, data)
        return _as_columns(kind.encode(part, labels, data, processor))

    from filelock import FileLock
    lock = Path(library().config.HF_DATASETS_CACHE) / f"dfl-{digest}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with hub.quiet(), FileLock(str(lock)):  # of several processes one tokenises
        made = table.map(piece, batched=True, batch_size=_PIECE, with_indices=True, remove_columns=table.column_names,
                         new_fingerprint=digest, load_from_cache_file=True)
    rows = Rows(made, digest)
    labels = np.asarray(made["labels"][:], dtype=np.int64) if kind.labelled else np.zeros(len(rows), dtype=np.int64)
    lost: dict[str, int] = {}
    for told in filter(None, made["lost"]):
        for what, count in json.loads(told).items():
            lost[what] = lost.get(what, 0) + count
    return Split(rows, labels, names, columns, cast("Sequence[int]", lines), lost)


def _as_columns(found: Encoded) -> dict[str, list]:
    """Of a piece; what was cut stands at its first row."""
    columns = {name: [np.asarray(feature[name]).tolist() for feature in found.features] for name in found.features[0]}
    columns["length"] = [len(feature["input_ids"]) for feature in found.features]
    columns["lost"] = [json.dumps(dict(found.cut)), *[""] * (len(found.features) - 1)]
    return columns


def _digest(table: Any, data: DataConfig, kind: Any, processor: Any, names: list[str]) -> str:
    """Of all that the tokens depend on: the bytes of the rows, the fields, the tokenizer, this project's version."""
    import pyarrow
    digest = hashlib.sha256()
    fields = data.model_dump(exclude={"train", "valid", "name", "packing", "group_by_length", "max_train", "max_valid"})
    digest.update(json.dumps([__version__, kind.name, names, fields, processor.chat_template, processor.special_tokens_map],
                             default=str).encode())
    digest.update(processor.backend_tokenizer.to_str().encode() if processor.is_fast else repr(processor.get_vocab()).encode())
    for piece in table.with_format("arrow").iter(batch_size=_PIECE):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, piece.schema.remove_metadata()) as out:
            out.write_table(piece.replace_schema_metadata(None))
        digest.update(sink.getvalue())
    return digest.hexdigest()[:32]
