"""Data sets of the Hugging Face hub, or local folders in its formats, as tables."""

import contextlib
import logging
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dfl.config import DataConfig
from dfl.tasks.tables import Table


def load(data: DataConfig) -> tuple[Table, Table | None, dict[str, Any]]:
    """A data set of the Hugging Face hub, `name` or `name:configuration`, or a local folder; train and valid name splits."""
    if data.name is None:
        raise ValueError("data.name is missing: data.source = 'hub' needs the name of a data set, or a folder")
    with quiet():
        splits = _splits(data)
    train = _table(data, "train", data.train or "train", splits)
    return train, None if data.valid is None else _table(data, "valid", data.valid, splits), {}


def _splits(data: DataConfig) -> Any:
    """All splits by name. ValueError in one line for whatever the library says."""
    try:
        import datasets
    except ImportError:
        raise ValueError("data.source = 'hub' needs the library datasets; pip install 'dfl[data]'") from None
    folder = Path(data.name).expanduser()
    name, _, config = (str(folder), "", "") if folder.exists() else data.name.partition(":")
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_info.json").is_file():
            return {"train": datasets.load_from_disk(str(folder))}
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # it raises its own, fsspec's, pyarrow's and the hub client's errors
        said = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise ValueError(f"data.name = {data.name!r} cannot be loaded: {said}; allowed: the name of a data set on "
                         "the hub, with an optional :configuration, or a folder with data files") from error


def _table(data: DataConfig, key: str, split: str, splits: Any) -> Table:
    if split not in splits:
        raise ValueError(f"data.{key} = {split!r}: {data.name} has no such split; it has: {', '.join(splits)}")
    rows = splits[split]
    if not len(rows):
        raise ValueError(f"data.{key} = {split!r} of {data.name} is empty: it has no row of examples")
    return _from_rows(data, split, rows)


def rows(data: DataConfig, key: str, split: str) -> Any:
    """The rows of a split as the library has them, on disk. ValueError for one that is not there."""
    with quiet():
        splits = _splits(data)
    if split not in splits:
        raise ValueError(f"data.{key} = {split!r}: {data.name} has no such split; it has: {', '.join(splits)}")
    return splits[split]


def _from_rows(data: DataConfig, split: str, rows: Any) -> Table:
    names = {column: list(feature.names) for column, feature in rows.features.items() if hasattr(feature, "int2str")}
    for column, feature in rows.features.items():
        if type(feature).__name__ == "Image":  # encoded images are a tenth of decoded ones
            rows = rows.cast_column(column, type(feature)(decode=False))
    columns = {column: list(rows[column]) for column in rows.column_names}
    for column, classes in names.items():
        columns[column] = [classes[v] if v is not None and 0 <= v < len(classes) else None for v in columns[column]]
    return Table(columns, f"{data.name} ({split})", range(1, len(rows) + 1), class_names=names)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars for the folders that are read and cached: every process would draw its own. No lines about retries."""
    try:
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ImportError:
        yield
        return
    off, hub = are_progress_bars_disabled(), logging.getLogger("huggingface_hub")
    hub_level = hub.level
    disable_progress_bars()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(hub_level)
        if not off:
            enable_progress_bars()
