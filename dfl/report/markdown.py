"""Texts that users have chosen (labels, names of files and runs, errors) in Markdown: they show as they are, never as markup."""

import re

# _ inside a word is no emphasis, and names are full of it
_SPECIAL = re.compile(r"[\\`*{}\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def inline(text: object) -> str:
    """A text inside a line, a heading or a cell; in one line, without control characters."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return re.sub("[&<>]", lambda found: _ENTITIES[found[0]], _SPECIAL.sub(r"\\\g<0>", flat))


def line(text: object) -> str:
    """A text that begins a paragraph or an entry of a list, where # - + = and numbers would mean something."""
    return re.sub(r"^(\d{1,9})(?=[.)])", r"\1\\", re.sub(r"^([#+=-])", r"\\\1", inline(text)))


def row(cells) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(inline, cells)) + " |"
