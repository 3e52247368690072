"""Charts as plain data: what page.js draws. A chart has a title, a text, and variants among which the reader chooses.

    lines   variants: {name, y, log, series: [{name, role, colour, x, y, lo, hi}]}   role: main, consensus,
                      baseline, peer (drawn faint, together) or line
    bars    variants: {name, y, x, series: [{name, colour, y}]}, stacked
    heat    variants: {name, rows, columns, row, column, unit, values, counts}
    forest  variants: {name, x, rows: [{name, mean, lo, hi, pairs, points}]}: differences with their intervals
    graph   peers, positions, directed, rounds, frames (links as bits, row by row, in base64)
"""

import base64
import math
from collections.abc import Sequence

import numpy as np

from dfl.report.statistics import Estimate

# no screen shows more points in a line than this
MAX_POINTS = 400


def clean(value):
    """A number as it goes into the page: six significant digits, None where it is not finite."""
    if value is None or isinstance(value, (str, bool)):
        return value
    value = float(value)
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")


def thin(items: Sequence, most: int = MAX_POINTS) -> list:
    """At most `most` of the items, evenly, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def series(name: str, points: Sequence[tuple], role: str = "main", colour: int = 0) -> dict:
    """A line through points (x, y) or (x, y, lo, hi), the latter with a band. y None: a gap."""
    points = thin(points)
    columns = list(zip(*points, strict=True)) or [(), ()]
    keys = ("x", "y", "lo", "hi")[:len(columns)]
    return {"name": name, "role": role, "colour": colour,
            **{key: [clean(v) for v in column] for key, column in zip(keys, columns, strict=True)}}


def has_points(line: dict) -> bool:
    return any(v is not None for v in line["y"])


def variant(name: str, y: str, lines: Sequence[dict], log: bool | None = None) -> dict:
    """One choice of a chart of lines. A logarithmic axis by itself where all is positive and spans over two decades."""
    lines = [line for line in lines if has_points(line)]
    values = [v for line in lines for key in ("y", "lo", "hi") for v in line.get(key, ()) if v is not None]
    wide = bool(values) and min(values) > 0 and max(values) > 100 * min(values)
    return {"name": name, "y": y, "log": wide if log is None else log, "series": lines}


def lines(title: str, text: str, variants: Sequence[dict], x: str = "round", choose: str = "show") -> dict | None:
    """None when no variant has a point."""
    variants = [v for v in variants if v["series"]]
    return {"kind": "lines", "title": title, "text": text, "x": x, "choose": choose, "variants": variants} if variants else None


def bars(title: str, text: str, x: Sequence, parts: Sequence[tuple[str, Sequence[float]]], y: str) -> dict | None:
    """Stacked bars: parts are (name, its height at every x). None when all are zero."""
    if not any(any(heights) for _, heights in parts):
        return None
    stacked = [{"name": name, "colour": k, "y": [clean(v) for v in heights]} for k, (name, heights) in enumerate(parts)]
    return {"kind": "bars", "title": title, "text": text, "x": "round", "choose": "show",
            "variants": [{"name": y, "y": y, "x": list(x), "series": stacked}]}


def grid(name: str, rows: Sequence, columns: Sequence, values, *, row: str, column: str, unit: str, counts=None) -> dict:
    """One choice of a heat map: values[i][j] at rows[i], columns[j]; `counts` says how many values a cell is the mean of."""
    return {"name": name, "rows": [str(r) for r in rows], "columns": [str(c) for c in columns], "row": row, "column": column,
            "unit": unit, "values": [[clean(v) for v in line] for line in values], "counts": counts}


def heat(title: str, text: str, variants: Sequence[dict], choose: str = "show") -> dict | None:
    variants = [v for v in variants if any(cell is not None for line in v["values"] for cell in line)]
    return {"kind": "heat", "title": title, "text": text, "choose": choose, "variants": variants} if variants else None


def differences(name: str, x: str, rows: Sequence[tuple[str, Estimate, Sequence[float]]]) -> dict:
    """One choice of a forest plot: (what, mean difference with its interval, the differences one by one where they are known)."""
    return {"name": name, "x": x, "rows": [
        {"name": what, "mean": clean(found.mean), "lo": None if found.half is None else clean(found.mean - found.half),
         "hi": None if found.half is None else clean(found.mean + found.half), "pairs": found.num,
         "points": [clean(v) for v in points]}
        for what, found, points in rows]}


def forest(title: str, text: str, variants: Sequence[dict], choose: str = "show") -> dict | None:
    """None when there is no difference."""
    variants = [v for v in variants if v["rows"]]
    return {"kind": "forest", "title": title, "text": text, "choose": choose, "variants": variants} if variants else None


def frame(w: np.ndarray) -> str:
    """The links of W (n, n) as bits: bit i n + j says that i receives from j."""
    received = w != 0
    np.fill_diagonal(received, False)
    return base64.b64encode(np.packbits(received.ravel()).tobytes()).decode()
