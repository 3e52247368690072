"""The page of one run: accuracy, disagreement, traffic, graph, data, peers, facts."""

import math
from dataclasses import replace

from dfl.report import charts
from dfl.report.lines import on_own_data
from dfl.report.network import network
from dfl.report.page import Section, Table
from dfl.report.runs import OBSERVING, comparable, counted, evaluated, layers, metrics_of, number, scalars, short_of_end, spent
from dfl.store.runs import RunData

# more bars, columns, lines of peers, or points in each of those no screen shows
MAX_BARS, MAX_CELLS, MAX_LINES, MAX_PEER_POINTS = 60, 120, 128, 150
# what well-known measures mean; any other scalar is shown under its own name
MEANINGS = {
    "consensus_distance": "How far peers are from their mean: the root of the mean squared distance of all numbers of a peer.",
    **{f"consensus_distance_{group}": f"The same of {what} alone." for group, what in
       (("A", "the factors A"), ("B", "the factors B"), ("M", "the magnitudes"), ("head", "the head"))},
    "product_distance": "How far the peers' products BA are from their mean: the root of the mean squared Frobenius distance.",
    "cross_term": "What averaging A and B apart loses of the averaged product BA: Frobenius norm, mean over receivers.",
    "cross_term_relative": "The cross term over the size of the averaged product, mean over receivers.",
    "aggregation_error": "How far a peer's product after mixing is from the average of the products it received: Frobenius norm.",
    "rejected": "Messages that their receivers rejected in the round: not finite, or far larger than their own.",
    "truncation_error": "What cutting an averaged product back to the rank of the adapter loses.",
}
UNKNOWN = "As the method or the measures report it."


def cell(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def title(name: str) -> str:
    """cross_term as `Cross term`."""
    return name[:1].upper() + name[1:].replace("_", " ")


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def sections(run: RunData, metric: str, higher: bool, targets: list[float]) -> list[Section]:
    """What is to be read about one run, in order. A section without data says so."""
    return [*_progress(run, metric, higher, targets), _disagreement(run), _time(run), _network(run), _data(run),
            _peers(run, metric), *_samples(run), _facts(run)]


def tiles(run: RunData, metric: str, higher: bool) -> list[tuple[str, str]]:
    """The numbers one looks for first: (name, value)."""
    records, cost = evaluated(run, metric), spent(run)
    found = [("state", run.state)]
    if records:
        last = records[-1]
        worst = number(last, "eval", metric, "min" if higher else "max")
        found += [(f"{metric}, mean of peers", cell(number(last, "eval", metric, "mean"))), ("worst peer", cell(worst))]
        consensus = number(last, "eval", "consensus", metric)
        found += [("consensus model", cell(consensus))] if consensus is not None else []
    found += [(name, cell(number(record, "eval", metric, "mean"))) for name, record in _alone(run, metric)]
    if cost:
        sent, seconds = cost[run.done]
        found += [("messages", megabytes(sent)), ("seconds of work", f"{seconds:,.1f}")]
        between = sum(number(r, name) or 0 for r in run.records for name in ("wire_bytes", "control_bytes", "measured_bytes"))
        found += [("between processes", megabytes(between))] if between else []
    return found


def _alone(run: RunData, metric: str) -> list[tuple[str, dict]]:
    """Local training alone beside the run's last evaluation, with the round in its name where it has not come as far."""
    records, alone = evaluated(run, metric), evaluated(run.baseline, metric) if run.baseline else []
    if not records or not alone:
        return []
    beside = comparable(alone, records[-1]["round"])
    return [(f"training alone{short_of_end(run.baseline, beside)}", beside)]


def metric_lines(run: RunData, metric: str, at=lambda record: record["round"]) -> list[dict]:
    """Band and mean over peers, each of them, the consensus model and local training alone, over `at(record)`."""
    records = evaluated(run, metric)
    found = [charts.series("mean of peers, least to most", [_banded(r, metric, at(r)) for r in records]),
             charts.series("consensus model", [(at(r), number(r, "eval", "consensus", metric)) for r in records], "consensus", 1)]
    if run.baseline:
        alone = [(at(r), number(r, "eval", metric, "mean")) for r in evaluated(run.baseline, metric)]
        found.append(charts.series("training alone, mean of peers", alone, "baseline", 2))
    return found + _each_peer([(at(r), r["eval"]["peers"][metric]) for r in records])


def _each_peer(rows: list[tuple[float, list]]) -> list[dict]:
    """A faint line for every peer, from (x, values of all peers); of more than MAX_LINES, the middle half of them."""
    num = max((len(values) for _, values in rows), default=0)
    if num > MAX_LINES:
        known = [(x, sorted(v for v in values if v is not None)) for x, values in rows]
        middle = [(x, v[len(v) // 2], v[len(v) // 4], v[3 * len(v) // 4]) for x, v in known if v]
        return [charts.series("median, middle half of the peers", middle, "line", 3)]
    return [charts.series(f"peer {k}", [(x, _of(values, k)) for x, values in charts.thin(rows, MAX_PEER_POINTS)], "peer", 6)
            for k in range(num)]


def _banded(record: dict, metric: str, x: float) -> tuple:
    return x, *(number(record, "eval", metric, key) for key in ("mean", "min", "max"))


def _of(values: list, k: int) -> float | None:
    return values[k] if k < len(values) and isinstance(values[k], (int, float)) and math.isfinite(values[k]) else None


def _progress(run: RunData, metric: str, higher: bool, targets: list[float]) -> list[Section]:
    loss = charts.lines("Training loss", "Mean loss of the local steps of each round, before mixing.",
                        [charts.variant("training loss", "loss", _loss_lines(run))])
    if not evaluated(run, metric):
        return [Section("Progress", notes=["No evaluation has been recorded yet."], charts=[loss] if loss else [])]
    names = [metric, *(name for name in metrics_of(run) if name != metric)]
    by_round = charts.lines(f"{title(metric)} by round", _what_happened(run, metric, higher),
                            [charts.variant(name, name, metric_lines(run, name)) for name in names], choose="metric")
    cost, alone = spent(run), spent(run.baseline) if run.baseline else {}
    found = []
    for index, (unit, scale, text) in enumerate((
            ("MB of messages", 1e6, "Bytes of all messages of all peers to their neighbours, whoever hosts them."),
            ("seconds", 1, "Seconds of local steps, encoding, exchange and mixing; each phase counts with its slowest process."))):
        def at(record, index=index, scale=scale):
            return cost[record["round"]][index] / scale
        lines = [line for line in metric_lines(run, metric, at) if line["role"] not in ("peer", "baseline")]
        if index == 1 and run.baseline:
            points = [(alone[r["round"]][1], number(r, "eval", metric, "mean")) for r in evaluated(run.baseline, metric)]
            lines.append(charts.series("training alone, mean of peers", points, "baseline", 2))
        found.append(charts.lines(f"{title(metric)} by {unit}", text, [charts.variant(metric, metric, lines)], x=unit))
    found += _by_ledger(run, metric)
    return [Section("Progress", charts=[c for c in (by_round, loss) if c]),
            Section("What it cost", charts=[c for c in found if c], tables=[crossings([run], metric, higher, targets)],
                    notes=[] if any(found) else [f"The mean {metric} over peers was never finite: there is nothing to reach."])]


def _by_ledger(run: RunData, metric: str) -> list[dict]:
    """The metric over messages, and over simulated seconds where there is a clock."""
    ledger, found = counted(run), []
    for index, (unit, text) in enumerate((
            ("messages", "Messages of all peers along directed edges; who is silent, or leaves a link out, sends none."),
            ("simulated seconds", "Of the slowest peer's clock on the network that the recipe describes."))):
        if any(of_round[index] for of_round in ledger.values()):
            lines = [line for line in metric_lines(run, metric, lambda record, index=index: ledger[record["round"]][index])
                     if line["role"] not in ("peer", "baseline")]
            found.append(charts.lines(f"{title(metric)} by {unit}", text, [charts.variant(metric, metric, lines)], x=unit))
    return [chart for chart in found if chart]


def _what_happened(run: RunData, metric: str, higher: bool) -> str:
    first, last = evaluated(run, metric)[0], evaluated(run, metric)[-1]
    values = {key: cell(number(last, "eval", metric, key)) for key in ("mean", "min", "max")}
    text = (f"Round {first['round']} to {last['round']}: the mean over {run.num_peers} peers went from "
            f"{cell(number(first, 'eval', metric, 'mean'))} to {values['mean']} (peers {values['min']} to {values['max']})")
    consensus = number(last, "eval", "consensus", metric)
    text += f", the consensus model to {cell(consensus)}" if consensus is not None else ""
    for name, record in _alone(run, metric):
        text += f"; {name}, to {cell(number(record, 'eval', metric, 'mean'))}"
    return f"{text}. {'Higher' if higher else 'Lower'} is better."


def _loss_lines(run: RunData) -> list[dict]:
    records = [r for r in run.records if isinstance(r.get("train_loss"), dict)]
    points = [(r["round"], *(number(r, "train_loss", key) for key in ("mean", "min", "max"))) for r in records]
    found = [charts.series("mean of peers, least to most", points)]
    return found + _each_peer([(r["round"], r["train_loss_peers"]) for r in records if isinstance(r.get("train_loss_peers"), list)])


def crossing(run: RunData, metric: str, higher: bool, target: float) -> tuple[int, float, float] | None:
    """The first evaluation at which the mean over peers is at the target or beyond: (round, bytes, seconds)."""
    cost = spent(run)
    for record in evaluated(run, metric):
        value = number(record, "eval", metric, "mean")
        if value is not None and (value >= target if higher else value <= target):
            return record["round"], *cost[record["round"]]
    return None


def default_targets(runs: list[RunData], metric: str, higher: bool) -> list[float]:
    """Half and nine tenths of the way from the first evaluation to the best one of all runs."""
    values = [v for run in runs for r in evaluated(run, metric) if (v := number(r, "eval", metric, "mean")) is not None]
    if not values:
        return []
    worst, top = (min(values), max(values)) if higher else (max(values), min(values))
    return [float(f"{worst + share * (top - worst):.3g}") for share in (0.5, 0.9)] if worst != top else []


def crossings(runs: list[RunData], metric: str, higher: bool, targets: list[float]) -> Table:
    """When each run, and its local training alone, first was at each target."""
    rows = []
    for run in [r for each in runs for r in (each, each.baseline) if r]:
        for target in targets:
            found = crossing(run, metric, higher, target)
            values = [str(found[0]), megabytes(found[1]), f"{found[2]:,.1f}"] if found else ["not reached", "–", "–"]
            rows.append([run.name, f"{target:g}", *values])
    return Table(f"First evaluation at which the mean over peers is {'at least' if higher else 'at most'} the target",
                 ["run", "target", "round", "messages", "seconds"], rows)


DISTANCES = ("consensus_distance", *(f"consensus_distance_{group}" for group in ("A", "B", "M", "head")))


def _disagreement(run: RunData) -> Section:
    """One chart for the consensus distances, one for every other scalar that the records hold, and what they hold by layer."""
    held = dict.fromkeys(name for record in run.records for name in scalars(record))

    def line(name: str, colour: int = 0) -> dict:
        points = [(r["round"], scalars(r)[name]) for r in run.records if name in scalars(r)]
        return charts.series(name.replace("_", " "), points, "line", colour)

    distances = [line(name, k) for k, name in enumerate(DISTANCES) if name in held]
    found = [charts.lines("Consensus distance after mixing", "How far peers are from their mean: the root of the mean squared "
                          "distance, of all numbers of a peer and by group.",
                          [charts.variant("consensus distance", "distance", distances)])]
    found += [charts.lines(title(name), MEANINGS.get(name, UNKNOWN), [charts.variant(name, name, [line(name)])])
              for name in held if name not in DISTANCES]
    found = [c for c in (*found, _layers(run)) if c]
    return Section("Disagreement and what mixing costs", charts=found,
                   notes=[] if found else ["No measures were recorded (measure.every is 0, or no round has been run)."])


def _layers(run: RunData) -> dict | None:
    records = charts.thin([r for r in run.records if layers(r)], MAX_CELLS)
    tables = {}
    for name in dict.fromkeys(name for r in records for name in layers(r)):
        rows = list(dict.fromkeys(layer for r in records for layer in layers(r).get(name, {})))
        values = [[number(layers(r), name, layer) for r in records] for layer in rows]
        tables[name] = charts.grid(name, rows, [r["round"] for r in records], values, row="layer", column="round", unit=name)
    return charts.heat("By layer", "Each row is a layer, each column a measured round.", list(tables.values()), choose="diagnostic")


def _time(run: RunData) -> Section:
    records = [r for r in run.records if isinstance(r.get("seconds"), dict)]
    if not records:
        return Section("Where the time went", notes=["No seconds have been recorded yet."])
    names = list(dict.fromkeys(name for r in records for name in r["seconds"]))
    width = -(-len(records) // MAX_BARS)
    groups = [records[k:k + width] for k in range(0, len(records), width)]
    parts = [(name, [_seconds(group, name) / len(group) for group in groups]) for name in names]
    total = {name: _seconds(records, name) for name in names}
    whole, most = sum(total.values()) or 1.0, max(total, key=total.get)
    text = f"Most of the time went to {most} ({total[most] / whole:.0%})."
    text += f" A bar is the mean of {width} rounds." if width > 1 else ""
    chart = charts.bars("Seconds of a round by phase", text, [group[-1]["round"] for group in groups], parts, "seconds")
    rows = [[name, f"{seconds:,.3f}", f"{seconds / whole:.1%}", "observing" if name in OBSERVING else "work"]
            for name, seconds in total.items()]
    table = Table("Seconds of the whole run by phase, of the slowest process", ["phase", "seconds", "share", "kind"], rows)
    return Section("Where the time went", charts=[chart] if chart else [], tables=[table])


def _seconds(records: list[dict], name: str) -> float:
    return sum(number(r, "seconds", name) or 0.0 for r in records)


def _network(run: RunData) -> Section:
    found, notes = network(run)
    return Section("The graph over time", charts=found, notes=notes)


def _data(run: RunData) -> Section:
    section, found = _shards(run), run.facts.get("data")
    if not isinstance(found, dict):
        return section
    rows = [[name, f"{split['rows']:,}", *(str((split["tokens"] or {}).get(key, "–")) for key in ("p50", "p90", "p99", "max")),
             *(f"{split['cut'].get(kind, 0):,}" for kind in ("text", "prompt", "response")), f"{split['empty']:,}"]
            for name, split in (("to train on", found["train"]), ("to evaluate on", found["valid"]))]
    table = Table("The examples", ["", "rows", "tokens: half have at most", "90 %", "99 %", "longest", "texts cut", "prompts cut",
                                   "responses cut", "empty"], rows)
    return replace(section, tables=[table, *section.tables], notes=[*found["warnings"], *section.notes])


def _shards(run: RunData) -> Section:
    shards = run.facts.get("shards")
    if not isinstance(shards, dict) or not shards.get("examples"):
        return Section("Who holds what", notes=["This run did not record how its data are spread over the peers."])
    examples, classes = shards["examples"], shards.get("classes")
    text = f"{sum(examples):,} training examples over {len(examples)} peers, {min(examples):,} to {max(examples):,} each."
    peers = [f"peer {k}" for k in range(len(examples))]
    if not classes:
        rows = [[peer, f"{count:,}"] for peer, count in zip(peers, examples, strict=True)]
        return Section("Who holds what", notes=[text], tables=[Table("Training examples of each peer", ["peer", "examples"], rows)])
    names = run.facts.get("label_names") or [str(k) for k in range(len(classes[0]))]
    share = [[count / max(1, sum(row)) for count in row] for row in classes]
    biggest = sum(max(row) for row in share) / len(share)
    text += f" On average {biggest:.0%} of a peer's examples are of its largest class."
    variants = [charts.grid("examples", peers, names, classes, row="peer", column="class", unit="examples"),
                charts.grid("share of the peer's examples", peers, names, share, row="peer", column="class", unit="share")]
    return Section("Who holds what", charts=[charts.heat("Examples of each class at each peer", text, variants)])


def _peers(run: RunData, metric: str) -> Section:
    table = peers_table(run, metric)
    notes = [] if table else ["No evaluation has been recorded yet."]
    if table and "after, on own data" in table.head:
        last = evaluated(run, metric)[-1]
        gap = [cell(number(last, "eval", "own", "gap", metric, key)) for key in ("mean", "min", "max")]
        by = (run.facts.get("own") or {}).get("by", "label")
        notes = [f"On own data: the same examples, each {by} weighing what it weighs in the peer's shard. The "
                 f"peers' {metric} there less that on all examples: {gap[0]} on average ({gap[1]} to {gap[2]})."]
    return Section("Every peer, before and after", tables=[table] if table else [], notes=notes)


def peers_table(run: RunData, metric: str) -> Table | None:
    """Before, after, and after training alone, of every peer, their mean and the consensus model."""
    records = evaluated(run, metric)
    if not records:
        return None
    own = on_own_data(records[-1]["eval"], metric)
    columns = [("before", records[0]), (f"after round {records[-1]['round']}", records[-1]), *_alone(run, metric),
               *([("after, on own data", {"eval": own})] if own else [])]
    examples = (run.facts.get("shards") or {}).get("examples") or []
    blank = [""] if examples else []
    rows = [["mean", *blank, *(cell(number(r, "eval", metric, "mean")) for _, r in columns)]]
    if any(number(r, "eval", "consensus", metric) is not None for _, r in columns):
        rows.append(["consensus", *blank, *(cell(number(r, "eval", "consensus", metric)) for _, r in columns)])
    rows += [[str(k), *([f"{examples[k]:,}" if k < len(examples) else "–"] if examples else []),
              *(cell(_of(r["eval"]["peers"][metric], k)) for _, r in columns)] for k in range(run.num_peers)]
    head = ["peer", *(["examples"] if examples else []), *(name for name, _ in columns)]
    return Table(f"{title(metric)} of every peer", head, rows)


def _samples(run: RunData) -> list[Section]:
    """What models wrote themselves, at the last evaluation."""
    records = [record for record in run.records if isinstance((record.get("eval") or {}).get("samples"), list)]
    if not records or not records[-1]["eval"]["samples"]:
        return []
    samples = records[-1]["eval"]["samples"]
    head = list(dict.fromkeys(key for sample in samples for key in sample))
    rows = [[str(sample.get(key, "")) for key in head] for sample in samples]
    title = f"Answers after round {records[-1]['round']}, written greedily"
    return [Section("What they say", tables=[Table(title, head, rows, words=True)])]


def _facts(run: RunData) -> Section:
    return Section("Facts of the run", tables=[Table("What it was", ["what", "value"], facts(run), words=True)],
                   folded=[("The whole recipe", run.config)])


def facts(run: RunData) -> list[list[str]]:
    """Model, data, method, machine, versions and commit, as far as the folder tells."""
    own = {k: v for k, v in run.facts.items() if k not in ("shards", "label_names", "method", "rule", "packages", "own", "data")}
    rows = [["folder", str(run.folder)], ["state", run.state], ["method", plugin(run.config.get("method"))],
            *([f"method: {key}", _short(value)] for key, value in (run.facts.get("method") or run.facts.get("rule") or {}).items()),
            ["rule", plugin(run.config.get("rule"))],
            ["topology", plugin(run.config.get("topology"))], ["codec", plugin(run.config.get("codec"))],
            ["partition", plugin(run.config.get("partition"))], ["seed", _short(run.config.get("seed"))],
            *([key.replace("_", " "), _short(value)] for key, value in own.items()),
            ["labels", _short(run.facts.get("label_names"))], ["data packages", _short(run.facts.get("packages"))],
            ["versions", _short(run.about.get("versions"))], ["hardware", _short(run.about.get("hardware"))],
            ["commit", _short(run.about.get("git_commit"))], ["started", _short(run.about.get("started"))]]
    return [row for row in rows if row[1] not in ("", "None")]


def plugin(value) -> str:
    if not isinstance(value, dict):
        return _short(value)
    return " ".join([str(value.get("name")), *(f"{k}={v}" for k, v in value.items() if k != "name")])


def _short(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items() if v not in (None, "", [], {}))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value) if value is not None else ""

