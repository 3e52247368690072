"""One HTML file that needs nothing else: text and tables in Python, charts drawn by page.js from data in the page.

The charts are drawn in the browser, and not by a library here: a picture made for a wide screen cannot be read on a narrow one
or on a dark ground, and values are looked up by pointing. What a chart shows it also holds as a table of numbers.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import yaml

from dfl.report.markdown import inline, line, row


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    words: bool = False  # cells of text, not of numbers


@dataclass(frozen=True)
class Section:
    """A heading with notes, charts, tables, and `folded`: mappings that open on a click."""

    heading: str
    charts: list[dict] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folded: list[tuple[str, dict]] = field(default_factory=list)


def page(title: str, lead: str, tiles: Sequence[tuple[str, str]], warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document. Every text is escaped here and nowhere else."""
    charts = [chart for section in sections for chart in section.charts]
    numbered = {id(chart): k for k, chart in enumerate(charts)}
    parts = {"TITLE": html.escape(title), "LEAD": html.escape(lead), "CSS": _file("page.css"), "JS": _file("page.js"),
             "TILES": "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in tiles),
             "WARNINGS": _list(warnings, "warnings"),
             "CONTENTS": "".join(f'<li><a href="#s{k}">{html.escape(s.heading)}</a></li>' for k, s in enumerate(sections)),
             "SECTIONS": "\n".join(_section(k, section, numbered) for k, section in enumerate(sections)),
             # a label may hold </script>; inside JSON the escape means the same
             "DATA": json.dumps(charts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")}
    document = _file("page.html")
    before, *rest = document.split("{{")
    return before + "".join(parts[piece.partition("}}")[0]] + piece.partition("}}")[2] for piece in rest)


def _file(name: str) -> str:
    return resources.files("dfl.report").joinpath(name).read_text()


def _list(lines: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{html.escape(text)}</li>" for text in lines) + "</ul>" if lines else ""


def _section(index: int, section: Section, numbered: dict[int, int]) -> str:
    parts = [f'<section id="s{index}"><h2>{html.escape(section.heading)}</h2>',
             *(f"<p>{html.escape(note)}</p>" for note in section.notes),
             '<div class="charts">' if section.charts else "",
             *(_figure(chart, numbered[id(chart)]) for chart in section.charts),
             "</div>" if section.charts else "",
             *map(_table, section.tables),
             *(f"<details><summary>{html.escape(name)}</summary><pre tabindex=\"0\">{html.escape(_yaml(value))}</pre></details>"
               for name, value in section.folded if value)]
    return "\n".join(part for part in parts if part) + "</section>"


def _yaml(value: dict) -> str:
    return yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=100)


def _figure(chart: dict, index: int) -> str:
    return (f'<figure class="{chart["kind"]}" data-chart="{index}"><figcaption>{html.escape(chart["title"])}</figcaption>'
            f'<div class="plot"></div><p id="t{index}">{html.escape(chart["text"])}</p></figure>')


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.head)
    body = "".join(f'<tr><th scope="row">{html.escape(first)}</th>' + "".join(f"<td>{html.escape(v)}</td>" for v in cells) + "</tr>"
                   for first, *cells in table.rows)
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    kind, title = "table words" if table.words else "table", html.escape(table.title)
    return (f'<h3>{title}</h3><div class="{kind}" tabindex="0" role="region" aria-label="{title}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}")


def markdown(title: str, lead: str, warnings: Sequence[str], sections: Sequence[Section]) -> str:
    """The notes and tables of a page. Every text is escaped here and nowhere else."""
    blocks = [f"# {inline(title)}", line(lead), "\n".join(f"- {line(warning)}" for warning in warnings)]
    for section in sections:
        if section.tables or section.notes:
            blocks += [f"## {inline(section.heading)}", *map(line, section.notes),
                       *(_markdown_table(table) for table in section.tables if table.rows)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown_table(table: Table) -> str:
    text = "\n".join([row(table.head), row(["---"] * len(table.head)), *map(row, table.rows)])
    return f"{line(table.title)}\n\n{text}" + (f"\n\n{line(table.note)}" if table.note else "")
