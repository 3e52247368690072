"""Models and data: what is fine-tuned on what. `load` is all that the loop needs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from dfl.config import DataConfig, ModelConfig
from dfl.plugins import first_line, lookup
from dfl.tasks import docstrings, files, hub, models, quantized, streamed
from dfl.tasks.base import Bundle, Split, Task
from dfl.tasks.classification import SequenceClassification
from dfl.tasks.images import ImageClassification
from dfl.tasks.language import CausalLM
from dfl.tasks.preference import Preference
from dfl.tasks.regression import SequenceRegression
from dfl.tasks.summary import read_fields, summarise, summary_lines
from dfl.tasks.tables import Table, encode_labels, label_names, split_off, subset

__all__ = ["SOURCES", "TASKS", "Bundle", "Prepared", "Split", "Task", "describe", "load", "load_file", "load_model",
           "load_processor", "prepare", "read_fields", "read_tables", "summarise", "summary_lines", "with_weights"]

TASKS: dict[str, type] = {task.name: task for task in (SequenceClassification, SequenceRegression, CausalLM, Preference,
                                                     ImageClassification)}
SOURCES: dict[str, Callable] = {"docstrings": docstrings.load, "file": files.load, "hub": hub.load}


def describe(table: Mapping[str, Callable] = TASKS) -> dict[str, str]:
    """A line for each entry of `TASKS` or `SOURCES`."""
    return {name: first_line(entry) for name, entry in table.items()}


class Prepared(NamedTuple):
    """All of a bundle that needs no weights: the examples, encoded; the model's configuration and its tokenizer or image processor."""

    kind: type
    source: models.Source
    config: Any
    processor: Any
    train: Split
    valid: Split
    facts: dict[str, Any]


def load(model: ModelConfig, data: DataConfig, *, seed: int, data_seed: int = 0) -> Bundle:
    """The frozen model with tokenised examples.

    `seed` draws the weights of a new head. `data_seed` draws the validation split and the subsets; left alone, runs with
    different seeds share their examples. ValueError names the field, the value and what is allowed; data problems come
    first, then the model's configuration, and the weights are read last.
    """
    return with_weights(prepare(model, data, data_seed=data_seed), model, seed=seed)


def prepare(model: ModelConfig, data: DataConfig, *, data_seed: int = 0) -> Prepared:
    """What `load` does before it reads weights, and every ValueError that comes from there."""
    quantized.check(model, lookup("model.task", TASKS, model.task.name).auto_class)
    source = models.locate(model)
    if data.streaming:
        return _streamed(source, model, data, data_seed)
    kind, names, tables, facts = read_tables(model, data, data_seed=data_seed)
    return _encoded(kind, source, model, data, names, tables, facts)


def read_tables(model: ModelConfig, data: DataConfig, *,
                data_seed: int = 0) -> tuple[type, list[str], tuple[Table, Table], dict[str, Any]]:
    """The task, the labels, the raw examples to train on and to evaluate on, and facts; the model is not looked at."""
    kind = lookup("model.task", TASKS, model.task.name)
    train, valid, facts = read_data(kind, data, data_seed)
    names = label_names(train, data.label) if kind.labelled else []
    return kind, names, divide(train, valid, data, data_seed), facts


def load_file(model: ModelConfig, data: DataConfig, names: list[str], file: str, *, seed: int) -> Bundle:
    """The model with all examples of `file`, which stand as both splits, and the labels `names` that it was trained on.

    The columns are those that `data` names. ValueError for a label that is not among `names`, with its line.
    """
    kind = lookup("model.task", TASKS, model.task.name)
    source = models.locate(model)
    table = files.read(file, "file")
    kind.check(table, data)
    return with_weights(_encoded(kind, source, model, data, names, (table,), {}), model, seed=seed)


def load_processor(model: ModelConfig, data: DataConfig, names: list[str]) -> tuple[Any, Any]:
    """The model's configuration for the labels `names`, and its tokenizer or image processor. No weights are read."""
    kind = lookup("model.task", TASKS, model.task.name)
    return _processor(kind, models.locate(model), model, data, names)


def load_model(model: ModelConfig, data: DataConfig, names: list[str], *, seed: int) -> tuple[Any, Any]:
    """The frozen model for the labels `names`, and its tokenizer or image processor. No examples are read."""
    kind = lookup("model.task", TASKS, model.task.name)
    source = models.locate(model)
    config, processor = _processor(kind, source, model, data, names)
    return models.read_weights(model, source, config, kind.auto_class, seed)[0], processor


def _processor(kind: type, source: models.Source, model: ModelConfig, data: DataConfig, names: list[str]) -> tuple[Any, Any]:
    config = models.read_config(model, source, names if kind.labelled else None, number=kind.predicts == "number")
    if kind.modality == "text":
        return config, models.read_tokenizer(model, source, config, data)
    return config, models.read_image_processor(model, source)


def _encoded(kind: type, source: models.Source, model: ModelConfig, data: DataConfig, names: list[str],
             tables: tuple[Table, ...], facts: dict[str, Any]) -> Prepared:
    """The tables, encoded, as the train and the validation split; a single table stands as both."""
    labels = [encode_labels(t, data.label, names) if kind.labelled else np.zeros(len(t), dtype=np.int64) for t in tables]
    config, processor = _processor(kind, source, model, data, names)
    encoded = [kind.encode(t, y, data, processor) for t, y in zip(tables, labels, strict=True)]
    splits = [Split(e.features, y, names, t.columns, t.lines, e.cut)
              for e, t, y in zip(encoded, tables, labels, strict=True)]
    if kind.modality == "text":
        models.check_ids(model, config, processor.pad_token_id, [f for split in splits for f in split.features])
    return Prepared(kind, source, config, processor, splits[0], splits[-1], facts | _of_language(kind, tables[0], data))


def _streamed(source: models.Source, model: ModelConfig, data: DataConfig, data_seed: int) -> Prepared:
    """As `_encoded`, with training examples that stay on disk."""
    kind = lookup("model.task", TASKS, model.task.name)
    if kind.modality != "text":
        raise ValueError(f"data.streaming = True: the examples of model.task = {kind.name!r} are no texts; allowed: false")
    rows, lines, valid = streamed.read(data, data_seed)
    kind.check(valid, data)
    names = streamed.names_of(rows, lines, data) if kind.labelled else []
    config, processor = _processor(kind, source, model, data, names)
    train = streamed.encode(kind, rows, lines, names, data, processor)
    labels = encode_labels(valid, data.label, names) if kind.labelled else np.zeros(len(valid), dtype=np.int64)
    encoded = kind.encode(valid, labels, data, processor)
    some = [train.features[i] for i in range(min(len(train), 1000))]
    models.check_ids(model, config, processor.pad_token_id, [*encoded.features, *some])
    split = Split(encoded.features, labels, names, valid.columns, valid.lines, encoded.cut)
    return Prepared(kind, source, config, processor, train, split, _of_language(kind, valid, data))


def _of_language(kind: type, table: Table, data: DataConfig) -> dict[str, bool]:
    """Whether rows are conversations, of a task that may read some: whoever asks its model has to know."""
    return {"conversations": kind.talks(table, data)} if hasattr(kind, "talks") else {}


def with_weights(ready: Prepared, model: ModelConfig, *, seed: int, device: torch.device = models.CPU) -> Bundle:
    """The bundle, with the weights that are read now. `seed` draws those of a new head."""
    kind, source, train, valid = ready.kind, ready.source, ready.train, ready.valid
    net, head, model_facts = models.read_weights(model, source, ready.config, kind.auto_class, seed, device)
    facts = {"task": kind.name, "base": source.name, "sha256": source.verified, **model_facts, "label_names": train.label_names,
             "num_train": len(train), "num_valid": len(valid), **ready.facts}
    return Bundle(net, ready.processor, train, valid, kind.build(ready.processor, **model.task.params), head, source.name, facts)


def read_data(kind: type, data: DataConfig, data_seed: int) -> tuple[Table, Table | None, dict[str, Any]]:
    """The tables that the source gives, their columns checked against what the task reads."""
    source = lookup("data.source", SOURCES, data.source)
    options = {"masked": kind.labelled, "data_seed": data_seed} if source is docstrings.load else {}
    train, valid, facts = source(data, **options)
    for table in (train, valid):
        if table is not None:
            kind.check(table, data)
    return train, valid, facts


def divide(train: Table, valid: Table | None, data: DataConfig, data_seed: int) -> tuple[Table, Table]:
    """Train and validation tables of at most data.max_train and data.max_valid rows."""
    rng = np.random.default_rng([data_seed, 0])
    if valid is None:
        train, valid = split_off(train, data.valid_fraction, rng)
    return subset(train, data.max_train, rng), subset(valid, data.max_valid, rng)
