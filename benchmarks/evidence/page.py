"""What the cells look like: a page in the style of `dfl report`, and the tables that documents hold.

Pure functions of the stored cells: no file is read or written here.
"""

import re
from collections.abc import Callable, Sequence

from dfl.report import charts
from dfl.report.markdown import row as markdown_row
from dfl.report.page import Section, Table, page
from dfl.report.statistics import estimate
from evidence import findings, grid
from evidence.findings import UNDECIDED, Found, Place, Verdict

BASE = "lora"
PROBABILITIES = (0.02, 0.1, 0.5)
COLUMNS = ["data", "p", "method", "rates of A, B", "peers' mean", "worst peer", "consensus", "minus LoRA", "MB sent"]


def reported(found: Found) -> dict[str, dict]:
    """Cells that the test file has seen, or that diverged."""
    return {name: cell for name, cell in found.items() if cell["phase"] != "rates"}


def places(found: Found) -> list[Place]:
    """Where methods were compared, sparse graphs first."""
    seen = {Place(cell["task"], cell["p"], cell["setting"]) for cell in reported(found).values()}
    return sorted(seen, key=lambda place: (grid.TASKS.index(place.task), place.setting, place.p))


def methods_at(found: Found, place: Place) -> list[str]:
    here = {cell["method"] for cell in reported(found).values() if (cell["task"], cell["p"], cell["setting"]) == place}
    return [method for method in grid.METHODS if method in here]


def cells_of(found: Found, place: Place, method: str) -> list[dict]:
    return [cell for cell in reported(found).values()
            if cell["method"] == method and (cell["task"], cell["p"], cell["setting"]) == place]


def show(values: Sequence[float], signed: bool = False) -> str:
    """`61.2 ± 1.3 (3)`, without an interval `61.2 (2)`: mean, half of the 95 % interval, number of seeds."""
    known = estimate(values, scale=100.0)
    if known is None:
        return "–"
    mean = f"{known.mean:+.1f}" if signed else f"{known.mean:.1f}"
    return f"{mean} ({known.num})" if known.half is None else f"{mean} ± {known.half:.1f} ({known.num})"


def result_rows(found: Found) -> list[list[str]]:
    """A row for each method at each place; test accuracy in percent."""
    rows = []
    for place in places(found):
        for method in methods_at(found, place):
            cells = cells_of(found, place, method)
            label = method if not place.setting else f"{method}, {place.setting}"
            against = "–" if method == BASE else show(findings.differences(found, place, method, BASE), signed=True)
            figures = [show([findings.test(cell, what) for cell in cells]) for what in ("mean", "min", "consensus")]
            sent = [cell["message_bytes"] / 1e6 for cell in cells if "message_bytes" in cell]
            p = "–" if method == "local" else f"{place.p:g}"
            rows.append([place.task, p, label, rates_of(cells[0]), *figures, against,
                         f"{_mean(sent):.1f}" if sent else "–"])
    return rows


def rates_of(cell: dict) -> str:
    return f"{cell['lr']:g}, {cell['lr'] * cell['ratio']:g}"


def verdicts(found: Found) -> list[Verdict]:
    """The expectations written down beforehand, then every ordering of the papers and claims for which the protocol has
    cells.
    """
    expected = [findings.expectation(found, task, p) for task in grid.TASKS for p in PROBABILITIES]
    saved = [findings.saving(found, Place("trec6", 0.1), method, BASE) for method in grid.METHODS if "event" in method]
    parity = [findings.last_phase(found, Place(task, 0.02), "tad15", 75, 90) for task in grid.TASKS]
    return expected + saved + parity + [
        findings.ordering(f"{_name(place)}: {one} > {other}", findings.differences(found, place, one, other))
        for place, one, other in orderings()]


def with_pairs(verdict: Verdict) -> bool:
    return "no pair" not in verdict.why


def orderings() -> list[tuple[Place, str, str]]:
    sparse, some = (Place("trec6", p) for p in (0.02, 0.1))
    both = [Place(task, p) for task in grid.TASKS for p in (0.02, 0.1)]
    found = [(place, "decaf", "lora") for place in both]
    found += [(place, tad, other) for place in both for tad in ("tad5", "tad15") for other in ("ffa", "rolora")]
    found += [(place, "tad15", "tad1") for place in both]
    varied = {method: grid.METHODS[method].rates for method in grid.ABLATIONS if "ratio" not in method}
    found += [(sparse, method, of) for method, of in (varied | {"decaf-alternating": "decaf"}).items()]
    found += [(place, method, "lora") for place in (sparse, some) for method in ("fedrot", "flora_na")]
    found += [(Place("trec6", 0.1, skew), method, "lora") for skew in grid.SKEWS for method in ("flora_na", "decaf")]
    found += [(some, "carry", method) for method in grid.UNEQUAL if method != "carry"]
    return found + [(some, method, "lora") for method in grid.ADAPTERS]


def html(found: Found) -> str:
    """The whole page."""
    sections = [_verdicts(found), _results(found), _differences(found), _bytes(found), _mechanism(found), _rates(found),
                _cells(found)]
    missing = gaps(found)
    lead = ("Ten peers, MiniLM of three layers, 1,800 local steps a peer; accuracy on test in percent. The protocol "
            "was written down before: benchmarks/evidence/PROTOCOL.md.")
    return page("Which method wins, when, and why", lead,
                [("cells", str(len(found))), ("of them reported", str(len(reported(found)))),
                 ("decided", str(sum(v.verdict != UNDECIDED for v in verdicts(found))))],
                [f"Missing: {missing}."] if missing else [], sections)


def gaps(found: Found) -> str:
    """What the protocol asks for and the cells lack, by task and group of methods; empty when nothing is missing."""
    wanted = [(task, methods, PROBABILITIES) for task in grid.TASKS for methods in (grid.CORE, (*grid.OTHERS, "local"))]
    wanted += [("trec6", grid.ABLATIONS, (0.02,)), ("trec6", (*grid.UNEQUAL, *grid.ADAPTERS), (0.1,))]
    return "; ".join(text for group in wanted if (text := _gaps_of(found, *group)))


def _gaps_of(found: Found, task: str, methods: Sequence[str], probabilities: Sequence[float]) -> str:
    seeds = {(method, p): len(findings.of_place(found, Place(task, p), method))
             for method in methods for p in probabilities}
    if not any(seeds.values()):
        return f"all of {', '.join(methods)} on {task}"
    lacking: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        short = tuple(f"{p:g}" + (f" ({num} of {grid.SEEDS} seeds)" if num else "") for p in probabilities
                      if (num := seeds[method, p]) < grid.SEEDS)
        lacking.setdefault(short, []).append(method)
    return "; ".join(f"{', '.join(names)} on {task} at p = {', '.join(short)}"
                     for short, names in lacking.items() if short)


def _verdicts(found: Found) -> Section:
    all_of_them = verdicts(found)
    rows = [list(verdict) for verdict in all_of_them if with_pairs(verdict)]
    note = (f"Held, refuted or not decided by the protocol's criteria; differences in points, seed by seed. Nothing is "
            f"decided with fewer than three pairs; {len(all_of_them) - len(rows)} further claims have no pair yet.")
    table = Table("What was expected, and the orderings of the literature", ["claim", "verdict", "differences"], rows,
                  note, words=True)
    return Section("Verdicts", tables=[table])


def _results(found: Found) -> Section:
    lines, present = [], {cell["method"] for cell in reported(found).values()}
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
        variants.append(charts.differences(_name(place), "points against LoRA", rows))
    chart = charts.forest("Paired differences", "Test accuracy minus that of LoRA on the same graphs, data and start: "
                          "circles are pairs, squares their means, bars 95 % intervals; a hollow square has none.",
                          variants, choose="data and p")
    return Section("Paired differences", charts=[chart] if chart else [])


def _name(place: Place) -> str:
    return f"{place.task}, p = {place.p:g}{', ' + place.setting if place.setting else ''}"


def _over(found: Found, read: Callable[[dict], list[tuple[float, float]]], y: str) -> list[dict]:
    """A variant a place, a line a method: means over seeds of the points that all of them have."""
    variants = []
    for place in places(found):
        series = []
        for colour, method in enumerate(methods_at(found, place)):
            curves = [read(cell) for cell in cells_of(found, place, method) if not cell.get("diverged")]
            points = [tuple(_mean(column) for column in zip(*at, strict=True)) for at in zip(*curves, strict=False)]
            series.append(charts.series(method, points, "line", colour))
        variants.append(charts.variant(_name(place), y, series, log=False))
    return variants


def _bytes(found: Found) -> Section:
    def curve(cell):
        return [(point["message_bytes"] / 1e6, 100 * point["mean"]) for point in cell["curve"]]
    chart = charts.lines("Accuracy over bytes",
                         "Peers' mean on validation against all messages sent until then; means over seeds.",
                         _over(found, curve, "validation accuracy, %"), x="MB of messages", choose="data and p")
    return Section("What it cost", charts=[chart] if chart else [])


def _frozen_share(line: dict) -> float | None:
    """The gradient of the frozen factor over that of the trained one; None where both are trained."""
    trained = set(line["trained"].split("+")) & {"A", "B"}
    if len(trained) != 1:
        return None
    (active,), (frozen,) = trained, {"A", "B"} - trained
    return line[f"gradient_{frozen}"] / line[f"gradient_{active}"] if line[f"gradient_{active}"] else None


def _mechanism(found: Found) -> Section:
    made = []
    for title, y, read in (
            ("Disagreement of the products over their norm", "disagreement / norm", lambda line: line["disagreement"]),
            ("Gradient of the frozen factor at the end of a phase", "frozen / trained", _frozen_share)):
        def curve(cell, read=read):
            return [(line["round"], value) for line in cell["diagnostics"] if (value := read(line)) is not None]
        made.append(charts.lines(title, "Means over seeds.", _over(found, curve, y), choose="data and p"))
    rows = []
    for place in places(found):
        for method in methods_at(found, place):
            cells = [cell for cell in cells_of(found, place, method) if cell.get("diagnostics")]
            if cells:
                last = [cell["diagnostics"][-1] for cell in cells]
                shares = [share for line in last if (share := _frozen_share(line)) is not None]
                rows.append([_name(place), method, f"{_mean(line['disagreement'] for line in last):.2f}",
                             f"{_mean(cell['last_third'].get('cross_term_relative', 0.0) for cell in cells):.3f}",
                             f"{_mean(shares):.2f}" if shares else "–", _own_gap(cells)])
    table = Table("At the end", ["where", "method", "disagreement / product", "cross term / product (last third)",
                                 "gradient, frozen / trained", "own data minus all"], rows,
                  "The last column: validation accuracy on the peers' own distributions minus that on all examples, in "
                  "points.")
    return Section("Why", charts=[chart for chart in made if chart], tables=[table])


def _own_gap(cells: Sequence[dict]) -> str:
    gaps = [100 * (cell["final"]["own"] - cell["final"]["mean"]) for cell in cells if "own" in cell["final"]]
    return f"{_mean(gaps):+.1f}" if gaps else "–"


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


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


MARKS = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(\n<!-- end of evidence -->)", re.S)


def with_tables(document: str, found: Found) -> str:
    """A document with the text between its `<!-- evidence: NAME -->` marks made anew from the cells."""
    made = {"results": lambda: table(COLUMNS, result_rows(found)) if reported(found) else "No cell is reported yet.",
            "verdicts": lambda: verdict_table(found),
            "rates": lambda: table(["data", "method", "rates of A, B tried: validation accuracy"], rate_rows(found)),
            "missing": lambda: f"Missing so far: {gaps(found)}." if gaps(found) else "Nothing of the grid is missing."}
    return MARKS.sub(lambda match: match[1] + "\n" + made[match[2]]() + "\n" + match[3], document)


def verdict_table(found: Found) -> str:
    rows = [list(verdict) for verdict in verdicts(found) if with_pairs(verdict)]
    return table(["claim", "verdict", "differences in points"], rows) if rows else "No claim has a pair of runs yet."


def rate_rows(found: Found) -> list[list[str]]:
    """A row a method: every pair of rates with its score."""
    rows = []
    for task in grid.TASKS:
        for method in grid.METHODS:
            scores = grid.scores(found, task, method)
            chosen = findings.search(scores).chosen
            tried = [f"{lr:g}, {lr * ratio:g}: {100 * score:.1f}" + (" (chosen)" if (lr, ratio) == chosen else "")
                     for (lr, ratio), score in sorted(scores.items())]
            if tried:
                rows.append([task, method, "; ".join(tried)])
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([markdown_row(head), markdown_row(["---"] * len(head)), *map(markdown_row, rows)])
