"""What a report compares of runs: their metrics, and numbers out of their records."""

import math

from dfl.store.runs import RunData, mapping


def number(record: dict, *keys: str) -> float | None:
    """A number inside nested mappings; None where there is none, or where it was not finite."""
    value = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def primary_of(facts: dict, evaluation: dict) -> tuple[str, bool]:
    """The metric that a run is about, and whether more of it is better, as run.json says; without it, the first one evaluated."""
    primary = facts.get("primary")
    if not isinstance(primary, str):
        primary = next((name for name in mapping(evaluation.get("peers"))), "accuracy")
    return primary, higher_is_better(facts, primary)


def higher_is_better(facts: dict, metric: str) -> bool:
    """Whether more of a metric is better, as run.json says; taken to be so where it does not (`dfl.store.runs.read_run` says that)."""
    return mapping(facts.get("better")).get(metric) != "lower"


def metrics_of(run: RunData) -> list[str]:
    """Everything that was evaluated, in the order of the records."""
    names: dict[str, None] = {}
    for record in run.records:
        names |= dict.fromkeys(mapping(mapping(record.get("eval")).get("peers")))
    return list(names)


def choose_metric(runs: list[RunData], metric: str | None) -> tuple[str, bool]:
    """The metric a report is about, `metric` or the primary one of the runs, and whether more of it is better.

    ValueError when the runs do not share it, or not its direction.
    """
    primaries = {primary_of(run.facts, next((r["eval"] for r in run.records if mapping(r.get("eval"))), {}))[0]
                 for run in runs if run.facts.get("primary") or metrics_of(run)}
    known = sorted({name for run in runs for name in metrics_of(run)})
    if metric is None and len(primaries) > 1:
        raise ValueError(f"metric: the runs have several primary metrics ({', '.join(sorted(primaries))}); choose one that they "
                         "share, such as --metric loss")
    if metric is not None and known and metric not in known:
        raise ValueError(f"metric = {metric!r} was not evaluated; allowed: {', '.join(known)}")
    metric = metric or next(iter(primaries), "accuracy")
    ways = {higher_is_better(run.facts, metric) for run in runs if metric in mapping(run.facts.get("better"))}
    if len(ways) > 1:
        raise ValueError(f"metric = {metric!r}: in some of the runs more of it is better, in others less; choose another")
    return metric, next(iter(ways), True)


def evaluated(run: RunData, metric: str) -> list[dict]:
    """The records with this metric of every peer, oldest first."""
    return [r for r in run.records if isinstance(mapping(mapping(r.get("eval")).get("peers")).get(metric), list)]


def comparable(records: list[dict], round_: int) -> dict:
    """The record of that round, or the last one where there is none: of a run beside another that stands at `round_`."""
    return next((record for record in records if record["round"] == round_), records[-1])


def short_of_end(run: RunData, record: dict) -> str:
    """`, round 2 of 6` for a record from before the run's last round; nothing for one of its end, or where nobody knows the end."""
    end = run.done if run.finished else run.total
    return "" if end is None or record["round"] >= end else f", round {record['round']} of {end}"


# phases in which the run is observed; in the others, peers work
OBSERVING = ("measure", "evaluate")


def work_seconds(record: dict) -> float:
    """The seconds of all phases but measuring and evaluating."""
    return sum(number(record, "seconds", name) or 0.0 for name in mapping(record.get("seconds")) if name not in OBSERVING)


def spent(run: RunData) -> dict[int, tuple[float, float]]:
    """Round -> (bytes of all messages, seconds of work) from the beginning to the end of that round."""
    total_bytes, total_seconds, result = 0.0, 0.0, {}
    for record in run.records:
        total_bytes += number(record, "message_bytes") or 0
        total_seconds += work_seconds(record)
        result[record["round"]] = (total_bytes, total_seconds)
    return result


def counted(run: RunData) -> dict[int, tuple[float, float]]:
    """Round -> (messages along directed edges, seconds on the simulated clock) from the beginning to the end of that round."""
    messages, clock, result = 0.0, 0.0, {}
    for record in run.records:
        messages += number(record, "ledger", "messages") or 0
        clock = max(clock, number(record, "ledger", "seconds") or 0)
        result[record["round"]] = (messages, clock)
    return result


# what a record holds beside measurements of peers and rule
_BOOKKEEPING = {"round", "lr", "rates", "edges", "message_bytes", "wire_bytes", "control_bytes", "measured_bytes", "rejected_senders",
                "train_loss", "train_loss_peers", "seconds", "trains", "eval", "measures", "layers", "ledger", "hosted"}


def scalars(record: dict) -> dict[str, float | None]:
    """Every measure of a round and every scalar a rule reports, by name; of {mean, min, max}, the mean. None: not finite."""
    found = {}
    own = {key: value for key, value in record.items() if key not in _BOOKKEEPING}
    for key, value in (mapping(record.get("measures")) | own).items():
        value = value.get("mean") if isinstance(value, dict) and "mean" in value else value
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            found[key] = value
    return found


def layers(record: dict) -> dict[str, dict[str, float | None]]:
    """Diagnostics by layer: name -> layer -> value."""
    tables = mapping(record.get("layers")) or mapping(mapping(record.get("measures")).get("layers"))
    return {name: table for name, table in tables.items() if isinstance(table, dict) and table}
