"""Seconds and megabytes to a given accuracy, by rule, trigger and codec, each changed alone and some together.

    DFL_DATA=... python benchmarks/to_accuracy.py run --out DIR      # goes on where it was interrupted; a few minutes a cell
    python benchmarks/to_accuracy.py restore --out DIR               # the committed cells into DIR: another machine goes on
    DFL_DATA=... python benchmarks/to_accuracy.py collect --out DIR  # a stamped JSON
    python benchmarks/to_accuracy.py table                           # the README's table from it

The regime of `triggers_on_text.py`, with an evaluation every four rounds: ten peers, TREC-6 in unequal parts, MiniLM cut to 2
layers, a simulated network of 50 Mbit/s and 50 ms. What counts is when the mean of the peers' accuracy on 200 questions of
the test file first reaches TARGET, between two evaluations by the straight line. No rate was searched for: all have those
of LoRA.
"""

import json
from pathlib import Path

import triggers_on_text
from cells import command, finish
from stamp import RESULTS, write
from triggers_on_text import RECIPES, REGIME, mean

TARGET, SEEDS = 0.6, (0, 1)
CLOCK = REGIME | {"eval.every": 4, "data.max_valid": 200}
EVENT = {"name": "event", "threshold": 0.2}
# what is changed of LoRA that always speaks in float32
SETTINGS = {
    "lora": {}, "codec bfloat16": {"codec": "bfloat16"}, "codec int8": {"codec": "int8"}, "codec int4": {"codec": "int4"},
    "trigger event": {"trigger": EVENT}, "trigger periodic 3": {"trigger": {"name": "periodic", "every": 3}},
    "rule ffa": {"method": "ffa"}, "rule tad": {"method": "tad"}, "rule decaf": {"method": "decaf"},
    "event, int8": {"trigger": EVENT, "codec": "int8"}, "decaf, int8": {"method": "decaf", "codec": "int8"},
    "alone": {"method": "local"},
}


def cells() -> list[tuple[str, int]]:
    """In the order in which they count."""
    return [(name, seed) for seed in SEEDS for name in SETTINGS]


def stored_at(out: Path, name: str, seed: int) -> Path:
    return out / f"{name.replace(', ', '-').replace(' ', '-')}-s{seed}.json"


def run(out: Path) -> None:
    for name, seed in cells():
        found = finish(stored_at(out, name, seed), RECIPES / "trec6.yaml", CLOCK | SETTINGS[name], curve, seed=seed)
        if found:
            print(name, seed, reached(found), flush=True)


def curve(records: list[dict]) -> list[dict]:
    return triggers_on_text.summary(records)["curve"]


def reached(curve: list[dict], target: float = TARGET) -> dict[str, float] | None:
    """Rounds, seconds and megabytes (sent by all) when a curve first comes to the target; None where it does not."""
    for before, after in zip(curve, curve[1:], strict=False):
        if before["accuracy"] < target <= after["accuracy"]:
            part = (target - before["accuracy"]) / (after["accuracy"] - before["accuracy"])
            found = {key: before[key] + part * (after[key] - before[key]) for key in ("round", "seconds", "bytes")}
            return {"rounds": round(found["round"], 1), "seconds": round(found["seconds"], 2), "MB": round(found["bytes"] / 1e6, 2)}
    return None


def restore(out: Path) -> None:
    """The committed cells where `run` looks for them: another machine goes on."""
    out.mkdir(parents=True, exist_ok=True)
    for name, seeds in json.loads((RESULTS / "to_accuracy.json").read_text())["results"]["curves"].items():
        for seed, found in seeds.items():
            if not (stored := stored_at(out, name, int(seed))).exists():
                stored.write_text(json.dumps(found, indent=1))


def collect(out: Path) -> None:
    found: dict[str, dict] = {}
    for name, seed in cells():
        if (stored := stored_at(out, name, seed)).exists():
            found.setdefault(name, {})[str(seed)] = json.loads(stored.read_text())
    config = {"recipe": "launch/recipes/trec6.yaml", "regime": CLOCK, "settings": SETTINGS, "seeds": list(SEEDS), "target": TARGET}
    short = {name: {seed: reached(curve) for seed, curve in seeds.items()} for name, seeds in found.items()}
    write("to_accuracy", config, {"reached": short, "at_the_end": {
        name: {seed: round(100 * curve[-1]["accuracy"], 1) for seed, curve in seeds.items()} for name, seeds in found.items()},
        "curves": found})


def table() -> str:
    results = json.loads((RESULTS / "to_accuracy.json").read_text())["results"]
    lines = ["| setting | seeds | rounds | seconds | MB | accuracy at the end |", "| --- | --- | --- | --- | --- | --- |"]
    for name, seeds in results["reached"].items():
        end = mean(results["at_the_end"][name].values())
        if all(seeds.values()):
            rounds, seconds, sent = (mean(one[key] for one in seeds.values()) for key in ("rounds", "seconds", "MB"))
            lines.append(f"| {name} | {len(seeds)} | {rounds:.0f} | {seconds:.1f} | {sent:.1f} | {end:.1f} |")
        else:
            lines.append(f"| {name} | {len(seeds)} | not reached by {sum(not one for one in seeds.values())} | - | - | {end:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, "runs/to_accuracy", run=run, restore=restore, collect=collect, table=table)
