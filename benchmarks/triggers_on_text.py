"""What event-triggered gossip saves on real text, and what that costs in accuracy, by seed.

    DFL_DATA=... python benchmarks/triggers_on_text.py run --out DIR     # goes on where it was interrupted
    DFL_DATA=... python benchmarks/triggers_on_text.py collect --out DIR
    python benchmarks/triggers_on_text.py table                          # the README's, of the committed results

Ten peers on a random graph of degree 4, TREC-6 dealt by a Dirichlet draw, or SST-2 with the skew of its recipe; MiniLM cut to 2
layers with a trained head, 400 local steps a peer in 80 rounds, on a simulated network of 50 Mbit/s and 50 ms. Settings
differ in their trigger alone; `always` is what savings are taken against. Accuracy is that on the evaluation file, after
the last round. Thresholds were chosen by the messages of one run with threshold 0.2 on seed 0, rates were not searched
for. Cells that had not ended when it was collected are missing.
"""

import json
from pathlib import Path

from cells import command, finish
from stamp import RESULTS, write

SEEDS = (0, 1, 2)
TRIGGERS = {"always": "always",
            **{f"event {least:g}": {"name": "event", "threshold": least} for least in (0.2, 0.4, 0.8)},
            "periodic 3": {"name": "periodic", "every": 3}, "late 0.3": {"name": "late", "share": 0.3}}
REGIME = {"method": "lora", "topology": {"name": "random_regular", "degree": 4}, "partition": {"name": "dirichlet", "alpha": 1.0},
          "lora.head": "mixed", "network": {"name": "links", "bandwidth": 6.25e6, "latency": 0.05, "compute": 0.05},
          "train.rounds": 80, "train.local_steps": 5, "train.batch_size": 8, "train.lr": 2e-3, "train.lr_ratio.B": 8.0,
          "train.schedule": "linear", "train.autocast": "off", "eval.every": 10, "measure.every": 0,
          "processes": 1, "threads": 1}
RECIPES = Path(__file__).parent.parent / "launch" / "recipes"
# by data: what is its own, and the settings that are run on it
SST2 = {key: value for key, value in REGIME.items() if key != "partition"} | {"data.max_valid": 600}
DATA = {"trec6": (REGIME, tuple(TRIGGERS)), "sst2": (SST2, ("always", "event 0.2", "event 0.4", "periodic 3"))}


def cells() -> list[tuple[str, str, int]]:
    """(data, setting, seed) in the order in which they count: every setting of a seed before the next seed."""
    return [(data, name, seed) for data, (_, names) in DATA.items() for seed in SEEDS for name in names]


def stored_at(out: Path, data: str, name: str, seed: int) -> Path:
    return out / f"{'' if data == 'trec6' else data + '-'}{name.replace(' ', '-')}-s{seed}.json"


def run(out: Path) -> None:
    for data, name, seed in cells():
        found = finish(stored_at(out, data, name, seed), RECIPES / f"{data}.yaml", DATA[data][0], summary, seed=seed,
                       trigger=TRIGGERS[name])
        if found:
            print(data, name, seed, found["final"], flush=True)


def summary(records: list[dict]) -> dict:
    """The curve over what was sent, and the end of it."""
    counted, curve = {"messages": 0, "due": 0, "bytes": 0}, []
    for record in records:
        sent = record.get("ledger", {})
        counted["messages"] += sent.get("messages", 0)
        counted["due"] += sent.get("due", 0)
        counted["bytes"] += sum(sent.get(f"{kind}_bytes", 0) for kind in ("payload", "header", "index"))
        if "eval" in record:
            found = record["eval"]
            curve.append({"round": record["round"], **counted, "seconds": sent.get("seconds", 0.0),
                          "accuracy": found["accuracy"]["mean"], "worst": found["accuracy"]["min"],
                          "consensus": found["consensus"]["accuracy"]})
    saved = 1 - counted["messages"] / counted["due"] if counted["due"] else 0.0  # who trains alone has none due
    return {"final": curve[-1], "saved": saved, "curve": curve}


def collect(out: Path) -> None:
    found: dict[str, dict[str, dict]] = {data: {} for data in DATA}
    for data, name, seed in cells():
        stored = stored_at(out, data, name, seed)
        if stored.exists():
            found[data].setdefault(name, {})[str(seed)] = json.loads(stored.read_text())
    write("triggers_on_text", {"recipes": [f"launch/recipes/{data}.yaml" for data in DATA], "triggers": TRIGGERS, "seeds": list(SEEDS),
                               "regimes": {data: regime for data, (regime, _) in DATA.items()}},
          {data: {"in_short": in_short(runs), "runs": runs} for data, runs in found.items()})


def in_short(found: dict[str, dict]) -> dict:
    """By setting: messages saved, and points of accuracy against `always` on the same seed, mean and each."""
    short = {}
    for name, seeds in found.items():
        cost = {seed: 100 * (found["always"][seed]["final"]["accuracy"] - one["final"]["accuracy"]) for seed, one in seeds.items()
                if seed in found.get("always", {})}
        short[name] = {"saved": mean(one["saved"] for one in seeds.values()), "points_lost": mean(cost.values()),
                       "points_lost_by_seed": cost, "accuracy": mean(one["final"]["accuracy"] for one in seeds.values()),
                       "seconds": mean(one["final"]["seconds"] for one in seeds.values())}
    return short


def table() -> str:
    results = json.loads((RESULTS / "triggers_on_text.json").read_text())["results"]
    lines = ["| data | setting | seeds | messages saved | points lost (by seed) | accuracy | seconds |", "| --- " * 7 + "|"]
    for data, found in results.items():
        for name, one in found["in_short"].items():
            lost = ", ".join(f"{points:.1f}" for points in one["points_lost_by_seed"].values())
            lines.append(f"| {data} | {name} | {len(one['points_lost_by_seed'])} | {100 * one['saved']:.0f}% | "
                         f"{one['points_lost']:.1f} ({lost}) | {100 * one['accuracy']:.1f} | {one['seconds']:.0f} |")
    return "\n".join(lines)


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    command(__doc__, "runs/triggers_on_text", run=run, collect=collect, table=table)
