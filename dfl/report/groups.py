"""Many runs as groups: which method, topology, setting and seed each is, and their differences in pairs.

A run is a method, a topology, a setting (every other field that varies) and a replicate (its seeds). Runs that differ in
nothing but the replicate are one group; methods are compared on equal topology, setting and replicate.
"""

import json
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from dfl.report.runs import evaluated, number, spent
from dfl.report.statistics import Estimate, estimate, paired
from dfl.store.runs import RunData

SEEDS = ("seed", "topology_seed", "data_seed")
# what does not change what a run computes
_IGNORED = {"output", "device", "backend", "threads", "timeout", "report_to", "callbacks", "baseline", "train.executor"} | set(SEEDS)
_LABELLED = ("method.", "rule.", "schedule.", "topology.")
_IGNORED_ROOMS = ("eval.", "measure.", "checkpoint.")


@dataclass(frozen=True)
class Member:
    """A run and its place in the comparison. `fields`: all of its configuration, dotted."""

    run: RunData
    method: str
    topology: str
    setting: str
    replicate: Hashable
    fields: dict

    @property
    def where(self) -> tuple[str, str]:
        return self.topology, self.setting


def dotted(tree: dict, prefix: str = "") -> dict:
    """{"method": {"T": 5}} as {"method.T": 5}; lists are one value."""
    flat = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _text(value) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value, default=str)


def _varies(of: list[dict], key: str) -> bool:
    return len({_text(fields.get(key)) for fields in of}) > 1


def place(runs: list[RunData]) -> tuple[list[Member], list[str]]:
    """Every run with the label of its method, topology and setting; and which fields were tied to the method.

    A label holds the parameters that vary among runs of the same name. A field that has one value for each method (a learning
    rate chosen for it) is no setting: it would leave nothing to compare.
    """
    trees = [dotted(run.config) for run in runs]
    methods, topologies = _labels(trees, "method", "rule", "schedule"), _labels(trees, "topology")
    own = [k for k, run in enumerate(runs) if not _is_baseline(run)] or range(len(runs))
    others = [key for key in dict.fromkeys(key for tree in trees for key in tree)
              if not key.startswith((*_LABELLED, *_IGNORED_ROOMS)) and key not in _IGNORED and _varies(trees, key)]
    tied = [key for key in others if len({methods[k] for k in own}) > 1 and not any(
        _varies([trees[k] for k in own if methods[k] == method], key) for method in methods)]
    notes = [f"{key} goes with the method: " + ", ".join(dict.fromkeys(f"{methods[k]} {_text(trees[k].get(key))}" for k in own)) + "."
             for key in tied]
    alone = [trees[k] for k, run in enumerate(runs) if _is_baseline(run)]
    members = []
    for run, tree, method, topology in zip(runs, trees, methods, topologies, strict=True):
        # local training beside each method has that method's values
        kept = [key for key in tied if _is_baseline(run) and _varies(alone, key)]
        method = " ".join([method, *(f"{key}={_text(tree.get(key))}" for key in kept)])
        setting = ", ".join(f"{key}={_text(tree.get(key))}" for key in others if key not in tied)
        members.append(Member(run, method, topology, setting, tuple(_text(tree.get(key)) for key in SEEDS), tree))
    return members, notes


def _labels(trees: list[dict], room: str, *slots: str) -> list[str]:
    """`tad T=5` where T varies among the runs with that name, else `tad`; `tad rule=decaf` where one of `slots` does."""
    names = [_text(tree.get(f"{room}.name", "?")) for tree in trees]
    labels = []
    for tree, name in zip(trees, names, strict=True):
        twins = [other for other, theirs in zip(trees, names, strict=True) if theirs == name]
        keys = dict.fromkeys(key for twin in twins for key in twin
                             if key.startswith((f"{room}.", *(f"{slot}." for slot in slots))) and key != f"{room}.name")
        varying = [key for key in keys if _varies(twins, key)]
        labels.append(" ".join([name, *(f"{key.removeprefix(room + '.').removesuffix('.name')}={_text(tree[key])}"
                                        for key in varying if key in tree)]))
    return labels


def distinct(members: list[Member]) -> tuple[list[Member], list[str]]:
    """One run for each method, topology, setting and replicate: the one with most rounds. A second one is no second seed."""
    kept: dict[Hashable, Member] = {}
    notes = []
    for member in members:
        key = member.method, member.where, member.replicate
        other = kept.get(key)
        if other and not (_is_baseline(member.run) or _is_baseline(other.run)):
            notes.append(f"{other.run.name} and {member.run.name} differ in no field that counts: only the longer one is used.")
        if other is None or member.run.done > other.run.done:
            kept[key] = member
    return list(kept.values()), notes


def _is_baseline(run: RunData) -> bool:
    return run.folder.name == "baseline-local"


def outcome(run: RunData, metric: str, higher: bool) -> dict[str, float | None]:
    """What a finished run ended with."""
    last = evaluated(run, metric)[-1]
    cost = spent(run)[run.done]
    measured = [r for r in run.records if r.get("measures")]
    return {"mean": number(last, "eval", metric, "mean"), "worst": number(last, "eval", metric, "min" if higher else "max"),
            "consensus": number(last, "eval", "consensus", metric), "bytes": cost[0], "seconds": cost[1],
            "cross": number(measured[-1], "measures", "cross_term_relative") if measured else None}


def choose_baseline(methods: list[str], asked: str | None) -> str | None:
    """The label of the method to compare with: `asked` as a label or as the name of one label; else lora, local, or the first."""
    for name in (asked,) if asked else ("lora", "local"):
        found = [method for method in methods if method == name] or [method for method in methods if method.split()[0] == name]
        if len(found) == 1 or (found and not asked):
            return found[0]
        if asked:
            what = "several methods" if found else "no method"
            raise ValueError(f"baseline = {asked!r} is {what} of these runs; allowed: {', '.join(methods)}")
    return methods[0] if methods else None


def grouped(members: list[Member]) -> dict[tuple, list[Member]]:
    """(method, topology, setting) -> its runs, in the order of the members."""
    groups = defaultdict(list)
    for member in members:
        groups[(member.method, *member.where)].append(member)
    return dict(groups)


def place_name(where: tuple[str, str]) -> str:
    return ", ".join(part for part in where if part)


def differences(members: list[Member], values: dict[int, float | None], base: str | None) -> list[tuple[str, str, Estimate]]:
    """(method, place, mean of method - base over the seeds that both have); where there are several places, over all of them too."""
    groups = grouped(members)
    by_seed = {key: {m.replicate: values[id(m)] for m in group} for key, group in groups.items()}
    found = []
    for method in dict.fromkeys(key[0] for key in groups):
        if method == base:
            continue
        pairs = {}
        for where in (key[1:] for key in groups if key[0] == method):
            own, theirs = by_seed[(method, *where)], by_seed.get((base, *where), {})
            result = paired(own, theirs)
            if result:
                found.append((method, place_name(where), result))
                pairs[where] = {s: own[s] - theirs[s] for s in own if own[s] is not None and theirs.get(s) is not None}
        if len(pairs) > 1:
            shared = set.intersection(*(set(p) for p in pairs.values()))
            size = max((abs(v) for v in values.values() if v is not None), default=None)
            overall = estimate([sum(p[s] for p in pairs.values()) / len(pairs) for s in sorted(shared)], scale=size)
            found += [(method, f"all ({len(pairs)} places)", overall)] if overall else []
    return found


def axes(members: list[Member]) -> list[str]:
    """The fields with at least two numeric values among the runs of one method."""
    fields = dict.fromkeys(key for m in members for key in m.fields if key not in _IGNORED and not key.startswith(_IGNORED_ROOMS))
    return [key for key in fields if len({m.fields[key] for m in members if is_number(m.fields.get(key))}) > 1]


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def curve(group: list[Member], read) -> list[tuple]:
    """(round, mean, least, most) over the seeds that have that round. `read`: run -> {round: value}."""
    by_round = defaultdict(list)
    for member in group:
        for t, value in read(member.run).items():
            if value is not None:
                by_round[t].append(value)
    return [(t, sum(v) / len(v), min(v), max(v)) for t, v in sorted(by_round.items())]


