"""What one poisoned peer in ten costs the honest nine on real text, under each guard.

    DFL_DATA=... python benchmarks/guards_on_text.py run --out DIR     # goes on where it was interrupted
    DFL_DATA=... python benchmarks/guards_on_text.py collect --out DIR
    python benchmarks/guards_on_text.py table                          # the README's, of the committed results

Ten peers on a random graph of degree 4 that is drawn anew in every round, TREC-6 dealt by a Dirichlet draw; MiniLM cut to 2
layers with a trained head, 250 local steps a peer in 50 rounds. Peer 0 is poisoned: its messages are (`sign_flip`: its factors and
its head times -2; `dissensus`; `alie`), or its labels (`labels`), by which it trains and says what it learnt. Guards have their
default parameters unless named, and act on the head as on the factors; nothing else differs between cells of a seed. Accuracy is
that of the other nine on the evaluation file, after the last round. Cells that had not ended when it was collected are missing.
"""

import json
from pathlib import Path

from cells import command, finish
from stamp import RESULTS, write

SEEDS, POISONED = (0, 1), 0
ATTACKS = {"none": {}, "sign_flip": {"channel": {"name": "attack", "kind": "sign_flip", "strength": 2.0, "by": [POISONED]}},
           "dissensus": {"channel": {"name": "attack", "kind": "dissensus", "by": [POISONED]}}, "labels": {"data.flipped": [POISONED]},
           "alie": {"channel": {"name": "attack", "kind": "alie", "by": [POISONED]}}}
GUARDS = {"norm": "norm", "geometric_median": "geometric_median", "clipped": "clipped",
          "clipped, factors": {"name": "clipped", "metric": "factors"}, "trimmed_mean": "trimmed_mean", "median": "median",
          "krum": "krum"}
REGIME = {"method": "lora", "topology": {"name": "random_regular", "degree": 4}, "partition": {"name": "dirichlet", "alpha": 1.0},
          "lora.head": "mixed", "train.rounds": 50, "train.local_steps": 5, "train.batch_size": 8, "train.lr": 2e-3,
          "train.lr_ratio.B": 8.0, "train.schedule": "linear", "train.autocast": "off", "eval.every": 25, "eval.consensus": False,
          "measure.every": 0, "processes": 1, "threads": 1}
RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "trec6.yaml"


def cells() -> list[tuple[str, str, int]]:
    """(guard, attack, seed) in the order in which they count."""
    return [(guard, attack, seed) for seed in SEEDS for attack in ATTACKS for guard in GUARDS]


def stored_at(out: Path, guard: str, attack: str, seed: int) -> Path:
    return out / f"{guard.replace(', ', '-')}-{attack}-s{seed}.json"


def run(out: Path) -> None:
    for guard, attack, seed in cells():
        found = finish(stored_at(out, guard, attack, seed), RECIPE, REGIME | ATTACKS[attack], honest, seed=seed, guard=GUARDS[guard])
        if found:
            print(guard, attack, seed, found, flush=True)


def honest(records: list[dict]) -> dict:
    """The nine after the last round, and how many messages were refused in all."""
    by_peer = [accuracy for peer, accuracy in enumerate(records[-1]["eval"]["peers"]["accuracy"]) if peer != POISONED]
    return {"accuracy": sum(by_peer) / len(by_peer), "worst": min(by_peer), "by_peer": by_peer,
            "rejected": sum(record.get("rejected", 0) for record in records)}


def collect(out: Path) -> None:
    found: dict[str, dict[str, dict]] = {}
    for guard, attack, seed in cells():
        stored = stored_at(out, guard, attack, seed)
        if stored.exists():
            found.setdefault(guard, {}).setdefault(attack, {})[str(seed)] = json.loads(stored.read_text())
    write("guards_on_text", {"recipe": "launch/recipes/trec6.yaml", "regime": REGIME, "attacks": ATTACKS, "guards": GUARDS,
                             "poisoned": [POISONED], "seeds": list(SEEDS)}, found)


def table() -> str:
    """By guard and attack the mean accuracy of the honest nine, the worst of them, and each seed's mean."""
    results = json.loads((RESULTS / "guards_on_text.json").read_text())["results"]
    lines = [f"| guard | {' | '.join(ATTACKS)} |", "| --- " * (1 + len(ATTACKS)) + "|"]
    lines += [f"| {guard} | {' | '.join(_entry(found.get(attack, {})) for attack in ATTACKS)} |" for guard, found in results.items()]
    return "\n".join(lines)


def _entry(seeds: dict[str, dict]) -> str:
    if not seeds:
        return ""
    accuracies, worst = [100 * one["accuracy"] for one in seeds.values()], min(100 * one["worst"] for one in seeds.values())
    by_seed = f" ({', '.join(f'{one:.1f}' for one in accuracies)})" if len(seeds) > 1 else ""
    return f"{sum(accuracies) / len(accuracies):.1f}{by_seed}, worst {worst:.1f}"


if __name__ == "__main__":
    command(__doc__, "runs/guards_on_text", run=run, collect=collect, table=table)
