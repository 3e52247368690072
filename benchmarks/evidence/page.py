"""What the cells look like: a page in the style of `dfl report`. Its texts and tables are those of tables.py."""

from collections.abc import Callable, Sequence

from dfl.report import charts
from dfl.report.page import Section, Table, page
from dfl.report.statistics import estimate
from evidence import findings, grid
from evidence.findings import UNDECIDED, Found, Place
from evidence.tables import (
    BASE,
    COLUMNS,
    MECHANISM,
    PROBABILITIES,
    cells_of,
    gaps,
    mean,
    mechanism_rows,
    methods_at,
    name_of,
    places,
    reported,
    result_rows,
    verdicts,
    with_pairs,
)


def html(found: Found) -> str:
    """The whole page."""
    sections = [_verdicts(found), _results(found), _differences(found), _bytes(found), _mechanism(found), _rates(found),
                _cells(found)]
    missing = gaps(found)
    lead = ("Ten peers, MiniLM of three layers, 1,800 local steps a peer (600 where a row names more than a method); accuracy on "
            "test in percent. The protocol was written down before: benchmarks/evidence/PROTOCOL.md.")
    return page("Which method wins, when, and why", lead,
                [("cells", str(len(found))), ("of them reported", str(len(reported(found)))),
                 ("decided", str(sum(v.verdict != UNDECIDED for v in verdicts(found))))],
                [f"Missing: {missing}."] if missing else [], sections)


def _verdicts(found: Found) -> Section:
    all_of_them = verdicts(found)
    rows = [list(verdict) for verdict in all_of_them if with_pairs(verdict)]
    note = (f"Held, refuted or not decided by the protocol's criteria; differences in points, seed by seed. Nothing is "
            f"decided with fewer than three pairs; {len(all_of_them) - len(rows)} further claims have no pair yet.")
    table = Table("What was expected, and the orderings of the literature", ["claim", "verdict", "differences"], rows,
                  note, words=True)
    return Section("Verdicts", tables=[table])


def _results(found: Found) -> Section:
    lines, present = [], {cell["method"] for cell in reported(found).values() if cell["phase"] == "main"}
    for task in grid.TASKS:
        series = []
        for colour, method in enumerate(method for method in grid.METHODS if method in present):
            points = []
            for p in PROBABILITIES:
                known = estimate(list(findings.of_place(found, Place(task, p), method).values()))
                if known:
                    half = known.half or 0.0
                    points.append((p, known.mean, known.mean - half, known.mean + half))
            if points:
                series.append(charts.series(method, points, "line", colour))
        lines.append(charts.variant(task, "test accuracy, %", series, log=False))
    chart = charts.lines("Accuracy over connectivity", "Peers' mean on test after the last round, mean over seeds; a "
                         "band is the 95 % interval, where three seeds or more have one.", lines, x="p", choose="data")
    table = Table("Results", COLUMNS, result_rows(found), "Mean ± half of the 95 % interval (Student's t over seeds), "
                  "seeds in brackets; none with fewer than three.")
    return Section("Results", charts=[chart] if chart else [], tables=[table])


def _differences(found: Found) -> Section:
    variants = []
    for place in places(found):
        points = {method: findings.differences(found, place, method, BASE) for method in methods_at(found, place)
                  if method != BASE}
        rows = [(method, estimate(values, scale=100.0), values) for method, values in points.items() if values]
        variants.append(charts.differences(name_of(place), "points against LoRA", rows))
    chart = charts.forest("Paired differences", "Test accuracy minus that of LoRA on the same graphs, data and start: "
                          "circles are pairs, squares their means, bars 95 % intervals; a hollow square has none.",
                          variants, choose="data and p")
    return Section("Paired differences", charts=[chart] if chart else [])


def _over(found: Found, read: Callable[[dict], list[tuple[float, float]]], y: str) -> list[dict]:
    """A variant a place, a line a method: means over seeds of the points that all of them have."""
    variants = []
    for place in places(found):
        series = [_line(method, colour, cells_of(found, place, method), read)
                  for colour, method in enumerate(methods_at(found, place))]
        variants.append(charts.variant(name_of(place), y, series, log=False))
    return variants


def _line(name: str, colour: int, cells: Sequence[dict], read: Callable[[dict], list[tuple[float, float]]]) -> dict:
    curves = [read(cell) for cell in cells if not cell.get("diverged")]
    points = [tuple(mean(column) for column in zip(*at, strict=True)) for at in zip(*curves, strict=False)]
    return charts.series(name, points, "line", colour)


def _bytes(found: Found) -> Section:
    chart = charts.lines("Accuracy over bytes",
                         "Peers' mean on validation against all messages sent until then; means over seeds.",
                         _over(found, by_bytes, "validation accuracy, %"), x="MB of messages", choose="data and p")
    names = {BASE: "edge activation, p = 0.1"} | grid.ON_GRAPHS
    lines = [_line(name, colour, cells_of(found, Place("trec6", grid.P_CLAIMS, "short"), method), by_bytes)
             for colour, (method, name) in enumerate(names.items())]
    graphs = charts.lines("Topologies at equal bytes", "LoRA on TREC-6, peers' mean on validation; means over seeds.",
                          [charts.variant("trec6", "validation accuracy, %", lines, log=False)], x="MB of messages")
    return Section("What it cost", charts=[found for found in (chart, graphs) if found])


def by_bytes(cell: dict) -> list[tuple[float, float]]:
    return [(point["message_bytes"] / 1e6, 100 * point["mean"]) for point in cell["curve"]]


def _mechanism(found: Found) -> Section:
    made = []
    for title, y, read in (
            ("Disagreement of the products over their norm", "disagreement / norm", lambda line: line["disagreement"]),
            ("Gradient of the frozen factor at the end of a phase", "frozen / trained", findings.frozen_share)):
        def curve(cell, read=read):
            return [(line["round"], value) for line in cell["diagnostics"] if (value := read(line)) is not None]
        made.append(charts.lines(title, "Means over seeds.", _over(found, curve, y), choose="data and p"))
    table = Table("At the end", MECHANISM, mechanism_rows(found),
                  "The last column: validation accuracy on the peers' own distributions minus that on all examples, in "
                  "points.")
    return Section("Why", charts=[chart for chart in made if chart], tables=[table])


def _rates(found: Found) -> Section:
    rows = []
    for task in grid.TASKS:
        for method in grid.METHODS:
            scores = grid.scores(found, task, method)
            chosen = findings.search(scores).chosen
            rows += [[task, method, f"{lr:g}", f"{lr * ratio:g}", f"{100 * score:.1f}",
                      "chosen" if (lr, ratio) == chosen else ""] for (lr, ratio), score in sorted(scores.items())]
    return Section("Rates", tables=[Table("The search for rates: validation accuracy at p = 0.1 after 30 rounds",
                                          ["data", "method", "rate of A", "rate of B", "accuracy", ""], rows)])


def _cells(found: Found) -> Section:
    kept = ("commands", "git_commit", "started", "hardware", "versions", "test", "final", "diverged")
    return Section("Every cell", folded=[(name, {key: cell.get(key) for key in kept}) for name, cell in found.items()])
