"""What a user wants to know of the data before a run: rows, tokens, what is empty, cut, there twice, of a rare class."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dfl.config import DataConfig
from dfl.metrics.base import IGNORED
from dfl.tasks.base import Split

# how missing values look when a table was written as text
MISSING = {"nan", "none", "null", "n/a", "na", "<na>"}
# a class with fewer training rows is worth a word
FEW = 10
# more rows than this part are worth a word where they are cut, or there twice
PART = 0.05
PERCENTILES = (50, 90, 99)
# names of more classes than this nobody reads
NAMED = 5
_FIELDS = {"sequence_classification": ("text", "pair"), "sequence_regression": ("text", "pair"), "image_classification": ("image",),
           "preference": ("prompt", "chosen", "rejected")}
# tasks of which it is known what they read
KNOWN = {*_FIELDS, "causal_lm"}


def summarise(task: str, train: Split, valid: Split, data: DataConfig) -> dict[str, Any]:
    """Counts of both splits, what they share, and under `warnings` a sentence for all that a user may want to mend."""
    fields = read_fields(task, data)
    splits = {"train": train, "valid": valid}
    found = {name: _of_split(split, fields) for name, split in splits.items()}
    keys = {name: _keys(split, fields) for name, split in splits.items()}
    if keys["train"] is not None:
        found |= _repeated(keys, train.labels if train.label_names else None)
    warnings = [*_about_texts(splits, fields, data), *_about_cuts(found, splits, data), *_about_repeats(found, data)]
    if train.label_names:
        warnings += _about_classes(train, valid, data)
    return found | {"warnings": warnings}


def summary_lines(found: Mapping[str, Any]) -> list[str]:
    """The summary as process 0 prints it."""
    return [f"training data: {_split_line(found['train'])}", f"evaluation data: {_split_line(found['valid'])}",
            *(f"dfl: WARNING: {text}" for text in found["warnings"])]


def _split_line(found: Mapping[str, Any]) -> str:
    text, tokens = f"{found['rows']:,} rows", found["tokens"]
    if tokens:
        at_most = ", ".join(f"{p} % of them have at most {tokens[f'p{p}']} tokens" if p == PERCENTILES[0] else
                            f"{p} % {tokens[f'p{p}']}" for p in PERCENTILES)
        cut = {"text": "cut", "prompt": "prompts cut", "response": "responses cut"}
        text += f"; {at_most}, the longest {tokens['max']}; " + ", ".join(
            f"{found['cut'][kind]:,} {name}" for kind, name in cut.items() if kind in found["cut"])
    return text


def read_fields(task: str, data: DataConfig) -> list[tuple[str, str]]:
    """(field of the recipe, column) of all that the task reads but labels."""
    names = _FIELDS.get(task) or (("messages",) if data.messages is not None else
                                  ("text",) if data.prompt is None else ("prompt", "response"))
    return [(f"data.{name}", getattr(data, name)) for name in names if getattr(data, name) is not None]


def _of_split(split: Split, fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
    columns = [] if not isinstance(split.columns, dict) else [split.columns.get(column, []) for _, column in fields]
    return {"rows": len(split), "tokens": _tokens(split), "cut": dict(split.cut),
            "empty": sum(len(_where(values, _is_empty)) for values in columns),
            "missing": sum(len(_where(values, _is_missing)) for values in columns)}


def _tokens(split: Split) -> dict[str, int] | None:
    """Percentiles of the tokens of a row, as the model sees them; None where rows have none."""
    if not hasattr(split.features, "lengths") and (not isinstance(split.features, list) or "input_ids" not in split.features[0]):
        return None
    lengths = split.lengths()
    cuts = np.percentile(lengths, PERCENTILES, method="higher")
    return {f"p{p}": int(value) for p, value in zip(PERCENTILES, cuts, strict=True)} | {"max": int(lengths.max())}


def _is_empty(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 8 and value.strip().lower() in MISSING


def _where(values: Sequence, test: Any) -> list[int]:
    return [i for i, value in enumerate(values) if test(value)]


def _keys(split: Split, fields: Sequence[tuple[str, str]]) -> list | None:
    """What makes rows the same: their texts; None for an empty row. None where rows are not made of texts."""
    if not isinstance(split.columns, dict):  # on disk: too many to compare
        return None
    columns = [_as_texts(split.columns.get(column)) for _, column in fields]
    if any(column is None or not all(isinstance(value, str) for value in column) for column in columns):
        return None
    return [key if any(text.strip() for text in key) else None for key in zip(*columns, strict=True)]


def _as_texts(column: list | None) -> list | None:
    """Conversations as JSON."""
    return column and [json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value for value in column]


def _repeated(keys: Mapping[str, list | None], labels: np.ndarray | None) -> dict[str, int]:
    """Training rows that are there already, texts with several labels, validation rows that are training rows too."""
    filled = [i for i, key in enumerate(keys["train"]) if key]
    train = {keys["train"][i] for i in filled}
    found = {"duplicates": len(filled) - len(train), "in_both": sum(key in train for key in keys["valid"] or ())}
    if labels is not None:
        found["contradicting"] = len({(keys["train"][i], int(labels[i])) for i in filled}) - len(train)
    return found


def _about_texts(splits: Mapping[str, Split], fields: Sequence[tuple[str, str]], data: DataConfig) -> list[str]:
    said = []
    splits = {name: split for name, split in splits.items() if isinstance(split.columns, dict)}
    for field, column in fields:
        for test, what, do in ((_is_empty, "are empty or blank", "fill or remove them"),
                               (_is_missing, "hold only 'nan' or the like, a missing value that was written as text",
                                "fill or remove them")):
            rows = {name: _where(split.columns.get(column, []), test) for name, split in splits.items()}
            name = next((name for name in rows if rows[name]), None)
            if name:
                said.append(f"{field} = {column!r}: {len(rows.get('train', ())):,} training and {len(rows['valid']):,} validation "
                            f"rows {what} ({_line(splits[name], rows[name][0], name)}); {do}")
    return said


def _line(split: Split, row: int, name: str) -> str:
    place = f"on line {split.lines[row]}" if len(split.lines) else f"row {row}"
    return f"the first is {place} of the {'training' if name == 'train' else 'validation'} data"


def _about_cuts(found: Mapping[str, Any], splits: Mapping[str, Split], data: DataConfig) -> list[str]:
    said = []
    for kind, least, what in (("text", PART, "lose their end"), ("prompt", PART, "lose the beginning of their prompt"),
                              ("response", 0.0, "lose the end of their response"),
                              ("nothing", 0.0, "are left with nothing to predict, and train nothing")):
        counts = {name: found[name]["cut"].get(kind, 0) for name in ("train", "valid")}
        if any(count > least * found[name]["rows"] for name, count in counts.items()):
            do = "raise it where memory allows"
            if kind == "nothing":
                what, do = what + _first_without_target(splits), "fill or remove them, or raise it"
            said.append(f"data.max_length = {data.max_length}: {counts['train']:,} of {found['train']['rows']:,} training "
                        f"and {counts['valid']:,} of {found['valid']['rows']:,} validation rows {what}; {do}")
    return said


def _first_without_target(splits: Mapping[str, Split]) -> str:
    """Where the first row is of which nothing is learnt, such as a conversation in which the assistant says nothing."""
    for name, split in splits.items():
        if isinstance(split.features, list) and len(split.lines):
            labels = [[f[key] for key in ("labels", "rejected_labels") if key in f] for f in split.features]
            row = next((k for k, some in enumerate(labels) if any((one[1:] == IGNORED).all() for one in some)), None)
            if row is not None:
                return f" ({_line(split, row, name)})"
    return ""


def _about_repeats(found: Mapping[str, Any], data: DataConfig) -> list[str]:
    rows, said = found["train"]["rows"], []
    if found.get("in_both"):
        field = f"data.valid = {data.valid!r}" if data.valid else f"data.valid_fraction = {data.valid_fraction}"
        said.append(f"{field}: {found['in_both']:,} of {found['valid']['rows']:,} validation rows are training rows too, "
                    "and tell only what was learned by heart; remove them from one of the two")
    if found.get("duplicates", 0) > PART * rows:
        said.append(f"data.train = {data.train!r}: {found['duplicates']:,} of {rows:,} rows repeat an earlier one; remove "
                    "them unless they are meant to weigh more")
    if found.get("contradicting"):
        said.append(f"data.label = {data.label!r}: {found['contradicting']:,} times the same text has another label; "
                    "decide on one of them")
    return said


def _about_classes(train: Split, valid: Split, data: DataConfig) -> list[str]:
    """Classes that cannot be learned or measured: few rows, none to train on, none to evaluate on."""
    names = train.label_names
    of_train, of_valid = (np.bincount(split.labels, minlength=len(names)) for split in (train, valid))
    field, said = f"data.label = {data.label!r}", []
    few = np.flatnonzero((of_train > 0) & (of_train < FEW))
    if len(few):
        rarest = few[np.argmin(of_train[few])]
        first = _line(train, int(np.flatnonzero(train.labels == rarest)[0]), "train")
        counts = _listed([f"{names[c]!r} ({of_train[c]})" for c in few])
        said.append(f"{field}: fewer than {FEW} training rows have the class {counts} ({first}); a stray label? correct it, "
                    "or remove these rows")
    missing = np.flatnonzero(of_train == 0)
    if len(missing):
        said.append(f"{field}: no training row has the class {_listed([repr(names[c]) for c in missing])}, "
                    f"{of_valid[missing].sum():,} validation rows do; give more data, or a larger data.max_train")
    unseen = np.flatnonzero((of_train > 0) & (of_valid == 0))
    if len(unseen):
        said.append(f"{field}: no validation row has the class {_listed([repr(names[c]) for c in unseen])}, so nothing tells "
                    "how well it is learned; take more validation rows")
    return said


def _listed(texts: Sequence[str]) -> str:
    rest = len(texts) - NAMED
    return ", ".join(texts[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
