"""The page of many runs: results with intervals over seeds, paired differences, heat maps, curves by method."""

from collections.abc import Callable

from dfl.report import charts
from dfl.report.groups import (
    Member,
    axes,
    choose_baseline,
    curve,
    differences,
    distinct,
    grouped,
    is_number,
    outcome,
    place,
    place_name,
)
from dfl.report.page import Section, Table
from dfl.report.runs import counted, evaluated, metrics_of, number, scalars, spent
from dfl.report.single import MEANINGS, UNKNOWN, crossing, megabytes, title
from dfl.report.statistics import LEAST_VALUES, Estimate, estimate
from dfl.store.runs import RunData

Cost = Callable[[RunData], dict[int, tuple[float, float]]]
# of a line: a sweep has many of them
MAX_POINTS = 120

def parts(runs: list[RunData], absent: list[str], metric: str, higher: bool, baseline: str | None, targets: list[float]) -> dict:
    """Lead, tiles, warnings and sections of the page. ValueError for a baseline that is no method of these runs."""
    given = [run for run in runs if run.config]
    members, tied = place([r for run in given for r in (run, run.baseline) if r])
    members, twins = distinct(members)
    ended = [m for m in members if m.run.finished and evaluated(m.run, metric)]
    methods = list(dict.fromkeys(m.method for m in members))
    base = choose_baseline(methods, baseline)
    warnings = [f"{run.name}: {run.state}; it counts in curves, not in the tables of results." for run in runs if not run.finished]
    warnings += absent + twins + [f"{run.name}: {problem}." for run in runs for problem in run.problems]
    warnings += [f"{m.run.name}: finished without an evaluation of {metric}." for m in members if m.run.finished and m not in ended]
    results = {id(m): outcome(m.run, metric, higher) for m in ended}
    warnings += [f"{m.run.name}: its last {metric} is not finite; it counts in no mean."
                 for m in ended if results[id(m)]["mean"] is None]
    sections = [_results(ended, results, metric, higher, tied), _differences(ended, results, base, metric, higher),
                _maps(ended, results, metric), _curves(members, methods, metric, higher),
                _cost(members, methods, metric, higher, targets), _measures(members, methods), _runs(runs, absent, metric)]
    seeds = len({m.replicate for m in members})
    topologies = ", ".join(dict.fromkeys(m.topology for m in members))
    return {"lead": f"Methods: {', '.join(methods) or 'none'}. Topologies: {topologies or 'none'}. The metric is {metric}; "
                    f"{'higher' if higher else 'lower'} is better.",
            "tiles": [("runs", str(len(runs) + len(absent))), ("finished", str(sum(run.finished for run in runs))),
                      ("methods", str(len(methods))), ("seeds", str(seeds))],
            "warnings": warnings, "sections": sections}


def show(found: Estimate | None, digits: int = 4) -> str:
    return "–" if found is None else found.text(digits)


INTERVAL = (f"Mean ± half of the 95 % interval (Student's t over seeds), number of seeds in brackets; fewer than {LEAST_VALUES}, or "
            "equal values, have no interval. Only finished runs count.")


def _results(ended: list[Member], results: dict, metric: str, higher: bool, tied: list[str]) -> Section:
    groups = grouped(ended)
    if not groups:
        return Section("Final results", notes=["No run has finished with an evaluation yet."])
    places = list(dict.fromkeys(key[1:] for key in groups))

    def over(key: tuple, what: str) -> Estimate | None:
        return estimate([results[id(m)][what] for m in groups.get(key, ())])

    methods = dict.fromkeys(key[0] for key in groups)
    table = [[method, *(show(over((method, *where), "mean")) for where in places)] for method in methods]
    crossed = Table(f"{title(metric)} after the last round, mean over peers: method by topology",
                    ["method", *map(place_name, places)], table, INTERVAL)
    rows = [[key[0], place_name(key[1:]), *(show(over(key, what)) for what in ("mean", "worst", "consensus")),
             show(over(key, "cross"), 3), megabytes(over(key, "bytes").mean), f"{over(key, 'seconds').mean:,.1f}"]
            for key in sorted(groups, key=lambda key: (list(methods).index(key[0]), key[1:]))]
    head = ["method", "topology", "peers' mean", "worst peer", "consensus", "cross term (relative)", "messages", "seconds"]
    whole = Table("Every group", head, rows, f"The worst peer is the one with the {'lowest' if higher else 'highest'} {metric} in its "
                                             "run. Messages and seconds of work are means over seeds.")
    return Section("Final results", notes=tied, tables=[crossed, whole])


def _differences(ended: list[Member], results: dict, base: str | None, metric: str, higher: bool) -> Section:
    table = differences(ended, {id(m): results[id(m)]["mean"] for m in ended}, base)
    if not table:
        return Section("Differences", notes=["There is no second method on the same topology, setting and seed to compare with."])
    rows = [[method, where, f"{found.mean:+.4f}", _interval(found), str(found.num)] for method, where, found in table]
    note = (f"{'Above' if higher else 'Below'} zero is better than {base}. Intervals are Student's t over the pairs; fewer than "
            f"{LEAST_VALUES} pairs, or equal differences, have none. In the rows of all places, a pair is a seed: its mean difference "
            "over those places, of the seeds that have them all.")
    plot = charts.forest(f"{title(metric)} minus that of {base}",
                         f"Mean differences with their 95 % intervals; {'right' if higher else 'left'} of zero is better than {base}. "
                         "A hollow square has no interval.",
                         [charts.differences(place, metric, [(method, found, ()) for method, where, found in table if where == place])
                          for place in dict.fromkeys(where for _, where, _ in table)], choose="topology")
    return Section("Differences", charts=[plot], tables=[
        Table(f"{title(metric)} minus that of {base}, on the same topology, setting and seed",
              ["method", "topology", "difference", "95 % interval", "pairs"], rows, note)])


def _interval(found: Estimate) -> str:
    return found.missing if found.half is None else f"{found.mean - found.half:+.4f} to {found.mean + found.half:+.4f}"


def grids(members: list[Member], results: dict, what: str, metric: str) -> list[dict]:
    """For each method and each pair of numeric axes, the mean of its runs in every cell."""
    found = []
    for name in dict.fromkeys(m.method.split()[0] for m in members):
        own = [m for m in members if m.method.split()[0] == name]
        fields = axes(own)
        for a, first in enumerate(fields):
            for second in fields[a + 1:]:
                found.append(_grid(name, own, first, second, results, what, metric))
    return found


def _grid(name: str, own: list[Member], first: str, second: str, results: dict, what: str, metric: str) -> dict:
    row, column = (first, second) if first.startswith("method.") else (second, first)
    rows, columns = (sorted({m.fields[key] for m in own if is_number(m.fields.get(key))}) for key in (row, column))
    cells = [[[results[id(m)][what] for m in own if (m.fields.get(row), m.fields.get(column)) == (r, c)] for c in columns]
             for r in rows]
    means = [[estimate(cell) for cell in line] for line in cells]
    return charts.grid(f"{name}: {row} by {column}", rows, columns, [[e.mean if e else None for e in line] for line in means],
                       row=row, column=column, unit=metric, counts=[[e.num if e else 0 for e in line] for line in means])


def _maps(ended: list[Member], results: dict, metric: str) -> Section:
    text = ("A cell is the mean over all finished runs with these two values, whatever their seed and other fields; pointing says "
            "how many.")
    found = [charts.heat(f"{name} by two fields", text, grids(ended, results, what, metric), choose="method and fields")
             for what, name in (("mean", "Peers' mean"), ("consensus", "Consensus model"))]
    return Section("Two fields at once", charts=[c for c in found if c],
                   notes=[] if any(found) else ["No method has finished runs in which two numeric fields vary."])


def _by_method(members: list[Member], methods: list[str], read, y: str) -> list[dict]:
    """A variant for each topology and setting: a line and a band for each method."""
    groups, found = grouped(members), []
    for where in dict.fromkeys(m.where for m in members):
        lines = [charts.series(method, charts.thin(curve(groups[(method, *where)], read), MAX_POINTS), "line", k)
                 for k, method in enumerate(methods) if (method, *where) in groups]
        found.append(charts.variant(place_name(where), y, lines))
    return found


BAND = "A line is the mean over the seeds that have the round, its band the lowest to the highest of them."


def _curves(members: list[Member], methods: list[str], metric: str, higher: bool) -> Section:
    found = []
    for name, keys in (("mean over peers", (metric, "mean")), ("worst peer", (metric, "min" if higher else "max")),
                        ("consensus model", ("consensus", metric))):
        def read(run, keys=keys):
            return {r["round"]: number(r, "eval", *keys) for r in evaluated(run, metric)}
        variants = _by_method(members, methods, read, metric)
        found.append(charts.lines(f"{title(metric)}, {name}", BAND, variants, choose="topology"))
    found = [c for c in found if c]
    return Section("By round", charts=found, notes=[] if found else ["No evaluation has been recorded yet."])


def _cost(members: list[Member], methods: list[str], metric: str, higher: bool, targets: list[float]) -> Section:
    found = []
    clock = any(seconds for m in members for _, seconds in counted(m.run).values())
    for of_run, index, unit, scale, text in (
            (spent, 0, "MB of messages", 1e6, "Bytes of all messages of all peers."),
            (spent, 1, "seconds of work", 1, "Seconds of local steps, encoding, exchange and mixing."),
            (counted, 0, "messages", 1, "Messages of all peers along directed edges."),
            *([(counted, 1, "simulated seconds", 1, "Of the slowest peer's clock on the network of the recipe.")] if clock else [])):
        variants = []
        for where in dict.fromkeys(m.where for m in members):
            lines = [charts.series(method, _over_cost(group, metric, of_run, index, scale), "line", k)
                     for k, method in enumerate(methods) if (group := grouped(members).get((method, *where)))]
            variants.append(charts.variant(place_name(where), metric, lines))
        found.append(charts.lines(f"{title(metric)} by {unit}", f"{text} Means over seeds, of the metric and of what it took.",
                                  variants, x=unit, choose="topology"))
    return Section("What it cost", charts=[c for c in found if c], tables=[_crossings(members, metric, higher, targets)])


def _over_cost(group: list[Member], metric: str, of_run: Cost, index: int, scale: float) -> list[tuple]:
    """(mean cost, mean metric) of the group at each round that all of its seeds have evaluated. of_run: costs by round."""
    tables = [({r["round"]: number(r, "eval", metric, "mean") for r in evaluated(m.run, metric)}, of_run(m.run)) for m in group]
    shared = sorted(set.intersection(*({t for t, v in values.items() if v is not None} for values, _ in tables)))
    return [(sum(cost[t][index] for _, cost in tables) / len(tables) / scale, sum(values[t] for values, _ in tables) / len(tables))
            for t in shared]


def _crossings(members: list[Member], metric: str, higher: bool, targets: list[float]) -> Table:
    rows = []
    for key, group in grouped(members).items():
        for target in targets:
            reached = [found for m in group if (found := crossing(m.run, metric, higher, target))]
            means = [sum(column) / len(reached) for column in zip(*reached, strict=True)] if reached else []
            rows.append([key[0], place_name(key[1:]), f"{target:g}", f"{len(reached)} of {len(group)}",
                         *([f"{means[0]:.1f}", megabytes(means[1]), f"{means[2]:,.1f}"] if means else ["–"] * 3)])
    return Table(f"First evaluation at which the mean over peers is {'at least' if higher else 'at most'} the target",
                 ["method", "topology", "target", "seeds that reached it", "round", "messages", "seconds"], rows,
                 "Means over the seeds that reached it: where not all did, those are the fast ones.")


def _measures(members: list[Member], methods: list[str]) -> Section:
    names = dict.fromkeys(name for m in members for r in m.run.records for name in scalars(r))
    found = []
    for name in names:
        def read(run, name=name):
            return {r["round"]: scalars(r).get(name) for r in run.records}
        found.append(charts.lines(title(name), f"{MEANINGS.get(name, UNKNOWN)} {BAND}",
                                  _by_method(members, methods, read, name), choose="topology"))
    found = [c for c in found if c]
    return Section("Disagreement and what mixing costs", charts=found, notes=[] if found else ["No measures were recorded."])


def _runs(runs: list[RunData], absent: list[str], metric: str) -> Section:
    rows = [[run.name, run.state, *(f"{v:.4f}" if v is not None else "–" for v in (_last(run, metric),)),
             ", ".join(metrics_of(run)) or "–", str(run.folder)] for run in runs]
    rows += [[name, said.strip(), "–", "–", "–"] for name, _, said in (line.partition(":") for line in absent)]
    table = Table("Every run as it was found", ["run", "state", f"last {metric}", "evaluated", "folder"], rows)
    return Section("The runs", tables=[table], notes=["dfl report FOLDER shows one alone: every peer, its graph and its data."])


def _last(run: RunData, metric: str) -> float | None:
    records = evaluated(run, metric)
    return number(records[-1], "eval", metric, "mean") if records else None
