"""What stragglers cost a round with a deadline: the last blocks of who is late (SALF), nothing of who is late, or waiting.

    DFL_DATA=... python benchmarks/stragglers.py run --out DIR     # goes on where it was interrupted
    DFL_DATA=... python benchmarks/stragglers.py collect --out DIR

Six peers on a ring, TREC-6 dealt by a Dirichlet draw, MiniLM cut to four blocks with a trained head, 24 rounds of five
local steps with one second for each, over links of 50 Mbit/s and 50 ms, on a simulated clock. Speeds: `uniform`, in every
round each peer gets through one to four blocks, as likely one as another; `poisson`, as many as a Poisson variable of mean
three; `machines`, two peers get through all blocks, two through two and two through one, in every round.

Settings: `salf`, corrected by how likely a block is reached; `salf, uncorrected`; `drop`, who misses a block takes no part;
`undisturbed`, nobody is slow; `waiting`, the same run, where neighbours wait until all have trained all blocks. Its clock
follows from what the depths say of the time that a whole pass takes: four blocks at the round's pace; the blocks still
missing at the same mean pace (exponential, each); and four at the machine's pace.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from cells import command, finish
from stamp import RESULTS, write

import topologies
from dfl.adapters.layout import make_layout
from dfl.schedules.depths import Depths
from dfl.seeds import derive

SEEDS, PEERS, BLOCKS, ROUNDS, DEADLINE = (0, 1), 6, 4, 24, 1.0
SPEEDS = {"uniform": {"speed": "uniform"}, "poisson": {"speed": "poisson", "deadline": DEADLINE, "seconds": DEADLINE / 3},
          "machines": {"speed": "fixed", "deadline": DEADLINE, "seconds": [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]}}
SETTINGS = {"salf": {"estimator": "step"}, "drop": {"estimator": "none", "late": "drop"},
            "salf, uncorrected": {"estimator": "none"}}
LINK = {"bandwidth": 6.25e6, "latency": 0.05}
REGIME = {"peers": PEERS, "topology": "ring", "partition": {"name": "dirichlet", "alpha": 1.0}, "model.layers": BLOCKS,
          "lora.head": "mixed", "network": {"name": "links", **LINK, "compute": DEADLINE / 5}, "data.max_valid": 200,
          "train.rounds": ROUNDS, "train.local_steps": 5, "train.batch_size": 8, "train.lr": 2e-3, "train.lr_ratio.B": 8.0,
          "train.schedule": "linear", "train.autocast": "off", "eval.every": 6, "eval.consensus": False, "measure.every": 0,
          "processes": 1, "threads": 1}
RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "trec6.yaml"


def cells() -> list[tuple[str, str, int]]:
    """(setting, speed, seed) in the order in which they count; the undisturbed run is one for all speeds."""
    main = [(setting, speed, seed) for seed in SEEDS for setting, speed in
            [("undisturbed", "all"), *((setting, speed) for speed in SPEEDS for setting in ("salf", "drop"))]]
    return main + [("salf, uncorrected", speed, seed) for seed in SEEDS for speed in SPEEDS]


def method(setting: str, speed: str, seed: int) -> str | dict:
    if setting == "undisturbed":
        return "lora"
    return {"name": "salf", **SPEEDS[speed], "seed": seed, "deadline": DEADLINE, **SETTINGS[setting]}


def stored_at(out: Path, setting: str, speed: str, seed: int) -> Path:
    return out / f"{setting.replace(', ', '-')}-{speed}-s{seed}.json"


def run(out: Path) -> None:
    for cell in cells():
        found = finish(stored_at(out, *cell), RECIPE, REGIME, curve, seed=cell[2], method=method(*cell))
        if found:
            print(*cell, found[-1], flush=True)


def curve(records: list[dict]) -> list[dict]:
    """Accuracy of the peers over rounds, simulated seconds and bytes."""
    sent, found = 0, []
    for record in records:
        ledger = record.get("ledger", {})
        sent += sum(ledger.get(f"{kind}_bytes", 0) for kind in ("payload", "header", "index"))
        if "eval" in record:
            accuracy = record["eval"]["accuracy"]
            found.append({"round": record["round"], "seconds": ledger.get("seconds", 0.0), "bytes": sent,
                          "accuracy": accuracy["mean"], "worst": accuracy["min"]})
    return found


def depths(speed: str, seed: int, late: str = "blocks") -> Depths:
    given = {"deadline": DEADLINE, "seconds": 1.0, **SPEEDS[speed]}
    layout = make_layout([(f"layer.{block}", 1, 1, 1, 1.0) for block in range(BLOCKS)])
    return Depths(layout, **given, share=1.0, late=late, seed=seed, peers=PEERS)


def share_computed(setting: str, speed: str, seed: int) -> float:
    """Of all blocks' backward passes in the run."""
    if setting not in SETTINGS:
        return 1.0
    found = depths(speed, seed, SETTINGS[setting].get("late", "blocks"))
    return float(np.mean([found.depth(t, peer) / BLOCKS for t in range(ROUNDS) for peer in range(PEERS)]))


def whole_pass(found: Depths, t: int, peer: int, seed: int) -> float:
    """Seconds until a peer would have been through all blocks of a round's steps."""
    depth = found.depth(t, peer)
    if found.speed == "fixed":
        return max(DEADLINE, BLOCKS * found.seconds(peer))
    if depth == BLOCKS:
        return DEADLINE
    if found.speed == "uniform":
        return DEADLINE * BLOCKS / depth
    draw = np.random.Generator(np.random.Philox(derive(seed, "whole pass", peer, t)))
    return DEADLINE + float(draw.gamma(BLOCKS - depth, found.seconds(peer)))


def clocks(speed: str, seed: int, message_bytes: float) -> Iterator[float]:
    """The latest clock after each round in which all wait for their neighbours."""
    found, graph, travel = depths(speed, seed), topologies.build("ring", PEERS), LINK["latency"] + message_bytes / LINK["bandwidth"]
    now = np.zeros(PEERS)
    for t in range(ROUNDS):
        now = now + [whole_pass(found, t, peer, seed) for peer in range(PEERS)]
        now = np.array([max(now[j] + travel * (j != i) for j in graph.neighbors(t, i)) for i in range(PEERS)])
        yield float(now.max())


def waited(points: list[dict], speed: str, seed: int) -> list[dict]:
    """The curve of the undisturbed run, by the clock of peers at that speed who wait for each other."""
    messages = PEERS * 2 * points[-1]["round"]
    ticks = [0.0, *clocks(speed, seed, points[-1]["bytes"] / messages)]
    return [{**point, "seconds": ticks[point["round"]]} for point in points]


def collect(out: Path) -> None:
    found: dict[str, dict] = {speed: {} for speed in SPEEDS}
    for setting, of, seed in cells():
        stored = stored_at(out, setting, of, seed)
        for speed in (SPEEDS if of == "all" else (of,)) if stored.exists() else ():
            points = json.loads(stored.read_text())
            curves = {setting: points} | ({"waiting": waited(points, speed, seed)} if of == "all" else {})
            for name, one in curves.items():
                found[speed].setdefault(name, {})[str(seed)] = {"computed": share_computed(name, speed, seed), "curve": one}
    write("stragglers", {"recipe": "launch/recipes/trec6.yaml", "regime": REGIME, "speeds": SPEEDS, "settings": SETTINGS,
                         "deadline": DEADLINE, "seeds": list(SEEDS)}, {"in_short": in_short(found), "runs": found})


def in_short(found: dict[str, dict]) -> dict:
    """By speed and setting, means over seeds: the end, the accuracy of a waiting run at that time, and what was computed."""
    return {speed: {setting: {"seeds": len(seeds), "computed": mean([one["computed"] for one in seeds.values()]),
                              **{name: mean([one["curve"][-1][name] for one in seeds.values()])
                                 for name in ("seconds", "bytes", "accuracy", "worst")},
                              "accuracy_by_seed": {seed: one["curve"][-1]["accuracy"] for seed, one in seeds.items()},
                              "waiting_by_then": mean([at(settings["waiting"][seed]["curve"], one["curve"][-1]["seconds"])
                                                       for seed, one in seeds.items() if seed in settings.get("waiting", {})])}
                    for setting, seeds in settings.items()} for speed, settings in found.items()}


def at(points: list[dict], seconds: float) -> float:
    """The accuracy at that time, on the straight line between two evaluations."""
    return float(np.interp(seconds, [point["seconds"] for point in points], [point["accuracy"] for point in points]))


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def table() -> str:
    """The table of benchmarks/README.md, of the committed result."""
    result = json.loads((RESULTS / "stragglers.json").read_text())["results"]
    lines = ["| speeds | setting | seeds | blocks computed | seconds | MB sent | accuracy, by seed | worst peer | waiting by then |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for speed, settings in result["in_short"].items():
        for setting, one in settings.items():
            seeds = ", ".join(f"{100 * value:.1f}" for value in one["accuracy_by_seed"].values())
            by_then = "" if one["waiting_by_then"] is None else f"{100 * one['waiting_by_then']:.1f}"
            lines.append(f"| {speed} | {setting} | {one['seeds']} | {one['computed']:.0%} | {one['seconds']:.0f} | "
                         f"{one['bytes'] / 1e6:.1f} | {100 * one['accuracy']:.1f} ({seeds}) | {100 * one['worst']:.1f} | {by_then} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(__doc__, "runs/stragglers", run=run, collect=collect, table=table)
