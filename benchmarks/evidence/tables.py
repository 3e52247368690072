"""What the cells come to, as text: results, verdicts, rates, what is missing; and the tables of documents.

Pure functions of the stored cells: no file is read or written here.
"""

import re
from collections.abc import Sequence

from dfl.report.markdown import row as markdown_row
from dfl.report.statistics import LEAST_VALUES, estimate
from evidence import findings, grid
from evidence.findings import Found, Place, Verdict

BASE, RING = "lora", "lora-ring"
MERGED = (BASE, "tad15", "decaf")
PROBABILITIES = (0.02, 0.1, 0.5)
# where the orderings of the papers are looked at
SPARSE_PLACES = [Place(task, p) for task in grid.TASKS for p in PROBABILITIES[:2]]
COLUMNS = ["data", "p", "method", "rates of A, B", "peers' mean", "worst peer", "consensus", "minus LoRA", "MB sent"]
MECHANISM = ["where", "method", "disagreement / product", "cross term / product (last third)",
             "gradient, frozen / trained", "own data minus all"]
MARKS = re.compile(r"(<!-- evidence: (\w+) -->\n).*?(\n<!-- end of evidence -->)", re.S)


def reported(found: Found) -> dict[str, dict]:
    """Cells that the test file has seen, or that diverged."""
    return {name: cell for name, cell in found.items() if cell["phase"] != "rates"}


def places(found: Found) -> list[Place]:
    """Where methods were compared, sparse graphs first."""
    seen = {Place(cell["task"], cell["p"], cell["setting"]) for cell in reported(found).values()}
    return sorted(seen, key=lambda place: (grid.TASKS.index(place.task), place.setting, place.p))


def name_of(place: Place) -> str:
    return _with_label(f"{place.task}, p = {place.p:g}", place.setting)


def _with_label(text: str, setting: str) -> str:
    return f"{text}, {grid.CLAIMS[setting].label}" if setting else text


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
            label = _with_label(method, place.setting)
            # peers that end with one merge stand against LoRA's consensus, in the verdicts
            against = "–" if method in (BASE, *grid.LATE) else show(findings.differences(found, place, method, BASE), signed=True)
            figures = [show([findings.test(cell, what) for cell in cells]) for what in ("mean", "min", "consensus")]
            sent = [cell["message_bytes"] / 1e6 for cell in cells if "message_bytes" in cell]
            p = "–" if method == "local" else f"{place.p:g}"
            rows.append([place.task, p, label, rates_of(cells[0]), *figures, against,
                         f"{mean(sent):.1f}" if sent else "–"])
    return rows


def rates_of(cell: dict) -> str:
    return f"{cell['lr']:g}, {cell['lr'] * cell['ratio']:g}"


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def mechanism_rows(found: Found) -> list[list[str]]:
    """A row for each method at each place, where its cells looked into the factors: means over seeds, at the end."""
    rows = []
    for place in places(found):
        for method in methods_at(found, place):
            cells = [cell for cell in cells_of(found, place, method) if cell.get("diagnostics")]
            if cells:
                last = [cell["diagnostics"][-1] for cell in cells]
                shares = [share for line in last if (share := findings.frozen_share(line)) is not None]
                rows.append([name_of(place), method, f"{mean(line['disagreement'] for line in last):.2f}",
                             f"{mean(cell['last_third'].get('cross_term_relative', 0.0) for cell in cells):.3f}",
                             f"{mean(shares):.2f}" if shares else "–", _own_gap(cells)])
    return rows


def _own_gap(cells: Sequence[dict]) -> str:
    """Validation accuracy on the peers' own distributions minus that on all examples, in points."""
    gaps = [100 * (cell["final"]["own"] - cell["final"]["mean"]) for cell in cells if "own" in cell["final"]]
    return f"{mean(gaps):+.1f}" if gaps else "–"


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


def verdicts(found: Found) -> list[Verdict]:
    """The expectations written down beforehand, then every ordering of the papers and claims for which the protocol has
    cells.
    """
    expected = [findings.expectation(found, task, p) for task in grid.TASKS for p in PROBABILITIES]
    parity = [findings.last_phase(found, Place(task, 0.02), "tad15", 75, 90) for task in grid.TASKS]
    compared = [findings.ordering(f"{name_of(place)}: {one} > {other}", findings.differences(found, place, one, other))
                for place, one, other in orderings()]
    short, half = (Place("trec6", grid.P_CLAIMS, name) for name in ("short", "half"))
    grows = f"{name_of(Place('trec6', grid.P_CLAIMS))}: flora_na - {BASE} larger with 90 % of one class than with half"
    merged = [findings.merging(f"{name_of(place)}: consensus of {method} > its best peer", found, place, method)
              for place in SPARSE_PLACES for method in MERGED]
    merged += [findings.ordering(f"{name_of(short)}: consensus of {method} > that of {BASE}",
                                 findings.differences(found, short, method, BASE, "consensus")) for method in grid.LATE]
    return expected + parity + compared + merged + [findings.growth(grows, found, short, half, "flora_na", BASE)]


def with_pairs(verdict: Verdict) -> bool:
    return "no pair" not in verdict.why


def orderings() -> list[tuple[Place, str, str]]:
    sparse, some = (Place("trec6", p) for p in (0.02, 0.1))
    found = [(place, "decaf", "lora") for place in SPARSE_PLACES]
    found += [(place, tad, other) for place in SPARSE_PLACES for tad in ("tad5", "tad15") for other in ("ffa", "rolora")]
    found += [(place, "tad15", "tad1") for place in SPARSE_PLACES]
    varied = {method: grid.METHODS[method].rates for method in grid.ABLATIONS}
    found += [(sparse, method, of) for method, of in (varied | {"decaf-alternating": "decaf"}).items()]
    found += [(place, method, "lora") for place in (sparse, some) for method in ("fedrot", "flora_na")]
    for task, name, setting in grid.studies():
        place, with_base = Place(task, grid.P_CLAIMS, name), BASE in setting.methods
        found += [(place, method, BASE) for method in setting.methods
                  if with_base and method not in (BASE, *grid.UNEQUAL, *grid.LATE)]
        found += [(place, "carry", method) for method in setting.methods if method in grid.UNEQUAL[1:]]
        found += [(place, method, RING) for method in setting.methods if method in grid.ON_GRAPHS and method != RING]
    return found


def gaps(found: Found) -> str:
    """What the protocol asks for and the cells lack, by task and group of methods; empty when nothing is missing."""
    wanted: list[tuple] = [(task, methods, PROBABILITIES) for task in grid.TASKS for methods in (grid.CORE, (*grid.OTHERS, "local"))]
    wanted += [("trec6", grid.ABLATIONS, (0.02,))]
    wanted += [(task, setting.methods, (grid.P_CLAIMS,), name, setting.seeds) for task, name, setting in grid.studies()]
    return "; ".join(text for group in wanted if (text := _gaps_of(found, *group)))


def _gaps_of(found: Found, task: str, methods: Sequence[str], probabilities: Sequence[float], setting: str = "",
             wanted: int = grid.SEEDS) -> str:
    seeds = {(method, p): len(findings.of_place(found, Place(task, p, setting), method))
             for method in methods for p in probabilities}
    task = f"{task} ({grid.CLAIMS[setting].label})" if setting else task
    if not any(seeds.values()):
        return f"all of {', '.join(methods)} on {task}"
    lacking: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        short = tuple(f"{p:g}" + (f" ({num} of {wanted} seeds)" if num else "") for p in probabilities
                      if (num := seeds[method, p]) < wanted)
        lacking.setdefault(short, []).append(method)
    return "; ".join(f"{', '.join(names)} on {task} at p = {', '.join(short)}"
                     for short, names in lacking.items() if short)


def with_tables(document: str, found: Found) -> str:
    """A document with the text between its `<!-- evidence: NAME -->` marks made anew from the cells."""
    made = {"short": lambda: short(found),
            "results": lambda: table(COLUMNS, result_rows(found)) if reported(found) else "No cell is reported yet.",
            "verdicts": lambda: verdict_table(found),
            "why": lambda: table(MECHANISM, mechanism_rows(found)),
            "rates": lambda: table(["data", "method", "rates of A, B tried: validation accuracy"], rate_rows(found)),
            "missing": lambda: f"Missing so far: {gaps(found)}." if gaps(found) else "Nothing of the grid is missing."}
    return MARKS.sub(lambda match: match[1] + "\n" + made[match[2]]() + "\n" + match[3], document)


def short(found: Found) -> str:
    """A line for each expectation that is decided: the verdict, and what the methods with an interval come to there."""
    lines = []
    for task, p in ((task, p) for task in grid.TASKS for p in PROBABILITIES):
        verdict, place = findings.expectation(found, task, p), Place(task, p)
        if verdict.verdict != findings.UNDECIDED:
            values = {method: [findings.test(cell) for cell in cells_of(found, place, method)] for method in methods_at(found, place)}
            figures = [f"`{method}` {show(known)}" for method, known in values.items() if len(known) >= LEAST_VALUES]
            lines.append(f"- {verdict.claim}: **{verdict.verdict}** ({verdict.why}); {', '.join(figures)}")
    return "\n".join(lines) or "- Nothing is decided yet."


def verdict_table(found: Found) -> str:
    rows = [list(verdict) for verdict in verdicts(found) if with_pairs(verdict)]
    return table(["claim", "verdict", "differences in points"], rows) if rows else "No claim has a pair of runs yet."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([markdown_row(head), markdown_row(["---"] * len(head)), *map(markdown_row, rows)])
