"""The partition as a table that people read before a run."""

from collections.abc import Sequence

import numpy as np

MAX_CLASSES = 12  # more columns than this no terminal shows


def table(parts: Sequence[np.ndarray], labels: np.ndarray, label_names: Sequence[str]) -> str:
    """A line per peer: its examples and the share of each class; then what all peers hold, and what nobody does."""
    labels = np.asarray(labels)
    names = list(label_names)[:MAX_CLASSES]
    widths = [max(6, len(name)) for name in names]
    head = ["peer".rjust(6), "examples".rjust(9), *(name.rjust(width) for name, width in zip(names, widths, strict=True))]
    rest = np.setdiff1d(np.arange(len(labels)), np.concatenate(list(parts)))
    rows = [(str(peer), part) for peer, part in enumerate(parts)] + [("all", np.concatenate(list(parts)))]
    rows += [("unused", rest)] if len(rest) else []
    lines = [" ".join(head)] + [_line(title, labels[part], len(label_names), widths) for title, part in rows]
    if len(label_names) > MAX_CLASSES:
        lines.append(f"(the first {MAX_CLASSES} of {len(label_names)} classes)")
    return "\n".join(lines)


def _line(title: str, labels: np.ndarray, num_classes: int, widths: list[int]) -> str:
    shares = 100 * np.bincount(labels, minlength=max(num_classes, 1)) / max(len(labels), 1)
    cells = [f"{share:.1f}%".rjust(width) for share, width in zip(shares, widths, strict=False)]
    return " ".join([title.rjust(6), f"{len(labels):,}".rjust(9), *cells])
