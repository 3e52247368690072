"""Real English technical text on every machine that has the project: the docstrings of the packages it depends on."""

import ast
import hashlib
import inspect
import re
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfl.config import DataConfig
from dfl.tasks.tables import Table

PACKAGES = ("peft", "numpy", "networkx", "torch", "transformers")  # the one with the fewest docstrings first
SKIPPED = {"tests", "test", "testing", "_vendor", "_vendored", "vendor", "third_party", "externals", "extern"}
MIN_LENGTH = 40  # characters
MAX_LENGTH = 2000
DEFAULT_SIZE = 4000  # examples of both splits together
# a name gives the answer away, so it goes, also inside identifiers such as PeftModel or torch_dtype
NAMES = re.compile(r"numpy|networkx|pytorch|torch|transformers|hugging[ _-]?face|peft"
                   r"|(?<![A-Za-z0-9])(?:np|nx|hf)(?![A-Za-z0-9])", re.IGNORECASE)


def load(data: DataConfig, *, masked: bool, data_seed: int = 0) -> tuple[Table, Table, dict[str, Any]]:
    """Docstrings of numpy, networkx, torch, transformers and peft; the label says which.

    Columns text, label and path. The classes are of equal size in both splits, and no docstring is in both. The packages
    are read, not imported. `masked` takes the packages' names out of the text.
    """
    num_train, num_valid = _sizes(data)
    limit, seen, found = num_train + num_valid, set(), {}
    for package in PACKAGES:
        found[package] = collect(package, limit, seen, masked)
        limit = min(limit, len(found[package]))
    num_valid = min(num_valid, max(1, round(limit * data.valid_fraction))) if data.max_valid is None else num_valid
    num_train = min(num_train, limit - num_valid)
    if num_train < 1:
        raise ValueError(f"data.max_valid = {data.max_valid} leaves no docstring to train on; "
                         f"allowed: up to {(limit - 1) * len(PACKAGES)}")
    train, valid = _split(found, num_train, num_valid, data_seed)
    return train, valid, {"packages": {package: version(package) for package in sorted(PACKAGES)}}


def _sizes(data: DataConfig) -> tuple[int, int]:
    """How many examples of each package, at most, to train and to validate."""
    for key in ("max_train", "max_valid"):
        limit = getattr(data, key)
        if limit is not None and limit < len(PACKAGES):
            raise ValueError(f"data.{key} = {limit} is less than one docstring of each package; "
                             f"allowed: {len(PACKAGES)} or more")
    if data.max_valid is None and data.valid_fraction <= 0:
        raise ValueError(f"data.valid_fraction = {data.valid_fraction} leaves no validation example; "
                         "give data.max_valid or another fraction")
    num_train = data.max_train or round(DEFAULT_SIZE * (1 - data.valid_fraction))
    num_valid = data.max_valid or round(num_train * data.valid_fraction / (1 - data.valid_fraction))
    return num_train // len(PACKAGES), max(1, num_valid // len(PACKAGES))


def collect(package: str, limit: int, seen: set[str], masked: bool) -> list[tuple[str, str, str]]:
    """Up to `limit` docstrings as (digest, text, path), none whose beginning is in `seen`, which grows."""
    found: list[tuple[str, str, str]] = []
    for path in source_files(package):
        for text in docstrings(path):
            key = re.sub(r"[^a-z]", "", NAMES.sub("", text).lower())[:100]
            if len(text) < MIN_LENGTH or len(key) < MIN_LENGTH // 2 or key in seen:
                continue
            seen.add(key)
            shown = NAMES.sub("[name]", text) if masked else text
            found.append((_digest(key), shown[:MAX_LENGTH], f"{package}/{path.name}"))
        if len(found) >= limit:
            break
    return found[:limit]


def source_files(package: str) -> list[Path]:
    """The package's own .py files, mixed by digest: reading stops early, and the first folders are not typical."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"data.source = 'docstrings' needs the package {package}, which is not installed")
    root = Path(spec.submodule_search_locations[0])
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    own = [name for name in names if not SKIPPED & set(name.split("/"))]
    return [root / name for name in sorted(own, key=_digest)]


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of a file, in its order; none where it does not parse."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError, ValueError):
        return
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes of `ast.walk`, in its order, without expressions: those hold no docstring, and are most of a file."""
    waiting = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in ("body", "cases", "handlers", "orelse", "finalbody"):
            waiting.extend(getattr(node, field, ()))


def _split(found: dict[str, list], num_train: int, num_valid: int, data_seed: int) -> tuple[Table, Table]:
    train, valid = [], []
    for package, items in found.items():
        rows = sorted((_digest(f"{data_seed}:{digest}"), text, package, path) for digest, text, path in items)
        valid += rows[:num_valid]
        train += rows[num_valid:num_valid + num_train]
    return _table(sorted(train)), _table(sorted(valid))


def _table(rows: list[tuple[str, str, str, str]]) -> Table:
    _, text, label, path = (list(values) for values in zip(*rows, strict=True))
    return Table({"text": text, "label": label, "path": path}, "the docstrings", range(1, len(rows) + 1))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
