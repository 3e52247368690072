"""How far a plan is from what runs then take: `dfl plan` of a small language model, and runs of its combinations to the target.

    DFL_DATA=... python benchmarks/plan.py run --out DIR     # goes on where it was interrupted
    python benchmarks/plan.py collect --out DIR

DFL_DATA holds stories260k: 260,032 parameters of the Llama architecture, trained on TinyStories (llama2.c, Karpathy). Eight peers
read docstrings, each those of one package; the network is simulated, 50 Mbit/s and 50 ms a link, a local step takes 10 ms. The
plan is made first, from its own probes, and says which runs are made: of those that it expects to reach the target the best, the
worst, and others at equal distances between them in its order. A run ends with the first evaluation at the target, and has twice the
recipe's steps; evaluations are after every round. The family of curves
was chosen after four runs of this recipe (LOG.md); nothing else was fitted to it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from stamp import write

import dfl
from dfl.config import DataConfig
from dfl.plan import compared
from dfl.plan.ask import Ask
from dfl.plan.build import write_plan
from dfl.store.directory import ENDED
from dfl.tasks import docstrings

TARGET, NETWORK = 2.75, (50.0, 50.0)
CANDIDATES = {"topologies": "ring, exponential, one_peer_exponential, complete, {name: edge_activation, p: 0.1}",
              "methods": "lora, decaf", "codecs": "none, int8", "triggers": "always, {name: periodic, every: 2}",
              "intervals": "2, 8"}
REGIME = {"peers": 8, "model.task": "causal_lm", "data.source": "file", "data.text": "text", "data.max_length": 48,
          "partition": {"name": "column", "column": "group"}, "lora.rank": 16, "lora.alpha": 32, "lora.targets": "all-linear",
          "method": "lora", "topology": "ring", "train.rounds": 24, "train.local_steps": 8, "train.batch_size": 4, "train.lr": 2e-3,
          "eval.every": 1, "eval.primary": "loss", "measure.every": 0, "measure.layers": 0, "processes": 1, "threads": 1}
RUNS, PROBE, STEP_SECONDS = 8, 8, 0.01


class UntilTarget(dfl.Callback):
    """Ends a run when the mean over peers is at the target."""

    def on_evaluate(self, run, control, evaluation):
        if evaluation[run.primary]["mean"] <= TARGET:
            control.should_training_stop = True


def write_recipe(out: Path) -> Path:
    """The recipe with its data, docstrings of ten groups: two of each of five packages."""
    out.mkdir(parents=True, exist_ok=True)
    tables = docstrings.load(DataConfig(max_train=1500, max_valid=60), masked=False)[:2]
    for name, table in zip(("train", "valid"), tables, strict=True):
        rows = [{"text": text, "group": f"{label} {k % 2}"} for k, (text, label) in
                enumerate(zip(table.columns["text"], table.columns["label"], strict=True))]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = REGIME | {"model.name": f"{os.environ['DFL_DATA']}/stories260k", "data.train": str(out / "train.jsonl"),
                       "data.valid": str(out / "valid.jsonl"), "output": str(out / "run")}
    path = out / "recipe.yaml"
    path.write_text(json.dumps(dfl.config.resolve({}, list(fields.items())).to_dict()))  # JSON is YAML
    return path


def chosen(plan: dict) -> list[dict]:
    """The best, the worst and those at equal distances between them, of what is expected to reach the target."""
    there = [line for line in plan["combinations"] if line["rounds"] is not None]
    places = sorted({round(k * (len(there) - 1) / (RUNS - 1)) for k in range(RUNS)})
    return [there[place] for place in places]


def run(out: Path) -> None:
    recipe, planned = write_recipe(out), out / "planned"
    if not (planned / "plan.json").exists():
        ask = Ask(*NETWORK, TARGET, step_seconds=STEP_SECONDS, probe=PROBE, given=CANDIDATES)
        write_plan(recipe, [], ask, planned, say=lambda text: print(text, flush=True))
    for line in chosen(json.loads((planned / "plan.json").read_text())):
        folder = out / f"rank-{line['rank']}"
        if (folder / ENDED).exists():
            continue
        fields = {key.replace(".", "__"): value for key, value in line["fields"].items()}
        done = dfl.train(recipe, resume=True, callbacks=[UntilTarget()], output=str(folder), network=line["network"],
                         train__rounds=2 * line["train.rounds"], **fields)
        if not done.finished:
            raise SystemExit(75)
        print(line["rank"], line["fields"], line["rounds"], done.rounds, flush=True)


def collect(out: Path) -> None:
    plan = json.loads((out / "planned" / "plan.json").read_text())
    found = compared(out / "planned", sorted(out.glob("rank-*"), key=lambda path: int(path.name.split("-")[1])))
    write("plan", {"regime": REGIME, "candidates": CANDIDATES, "target": TARGET, "bandwidth_mbit": NETWORK[0],
                   "latency_ms": NETWORK[1], "step_seconds": STEP_SECONDS, "probe": PROBE},
          {"in_all": found["in_all"], "runs": found["runs"], "planned": len(plan["combinations"]), "left_out": plan["left_out"],
           "probes": plan["probes"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "collect"))
    parser.add_argument("--out", type=Path, default=Path("runs/plan"))
    args = parser.parse_args()
    if args.what == "run" and not os.environ.get("DFL_DATA"):
        sys.exit("set DFL_DATA to the folder with stories260k/")
    (run if args.what == "run" else collect)(args.out)


if __name__ == "__main__":
    main()
