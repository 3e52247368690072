"""Rules on real text: TREC-6 and SST-2 with label skew, ten peers, edge activation. Writes one stamped JSON a study.

    DFL_DATA=... python benchmarks/real_input.py rates --jobs 2     # learning rate of each rule at p = 0.5
    DFL_DATA=... python benchmarks/real_input.py ratios             # one rate for A and B, or more for B
    DFL_DATA=... python benchmarks/real_input.py grid --jobs 2      # rules x p x seeds with those rates
    python benchmarks/real_input.py table                           # the README's table from the committed results

A finished run is skipped, so that an interrupted study goes on where it was.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from dfl.store.records import read_lines

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RATES = (5e-3, 1e-2, 2e-2)
INTERVALS = (1, 5, 15)
RULES = ("lora", "ffa", "rolora", "decaf")


def main() -> None:
    args = parse()
    if args.study == "table":
        print(table())
        return
    path = RESULTS / f"real_input_{args.study}.json"
    path.parent.mkdir(exist_ok=True)
    stored = json.loads(path.read_text()) if path.exists() else {}

    def plan() -> list[dict]:
        plans = {"rates": plan_rates, "ratios": plan_ratios, "grid": lambda: plan_grid(args.task, args.seeds, stored)}
        return plans[args.study]()

    # what the first runs show decides which of them are repeated
    while todo := [run for run in plan() if run["name"] not in stored]:
        print(f"{len(todo)} runs to do", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            for future in as_completed([pool.submit(execute, run, args.scratch) for run in todo]):
                done = future.result()
                stored[done["name"]] = done
                ordered = {run["name"]: stored[run["name"]] for run in plan() if run["name"] in stored}
                path.write_text(json.dumps(ordered, indent=1) + "\n")
                print(done["name"], done["final"]["mean"], flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("rates", "ratios", "grid", "table"))
    parser.add_argument("--task", choices=("trec6", "sst2", "both"), default="both")
    parser.add_argument("--seeds", type=int, default=3, help="for lora and the best tad at p = 0.02")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "dfl-real-input")
    return parser.parse_args()


def plan_rates() -> list[dict]:
    """Short runs on TREC-6 at strong connectivity, where the papers choose the rate."""
    return [{"name": f"{rule}-lr{lr:g}", "task": "trec6",
             "overrides": {"method": rule_text(rule), "topology.p": 0.5, "train.lr": lr, "train.rounds": 30, "eval.every": 0}}
            for rule in (*RULES, "tad") for lr in RATES]


def plan_ratios() -> list[dict]:
    """Frozen A with two rates; TAD and LoRA with one rate or a hundred times more for B; 300 steps, p = 0.5.

    `deeper` is another regime: three layers, a head of standard deviation 0.3, batches of 16.
    """
    deeper = {"model.layers": 3, "model.head_std": 0.3, "train.batch_size": 16}
    chosen = [("ffa", 0.02, 1, {}), ("ffa", 0.1, 1, {}), ("tad", 0.01, 1, {}), ("tad", 0.001, 100, {}),
              ("lora", 0.001, 100, {}), ("tad", 0.01, 1, deeper), ("tad", 0.001, 100, deeper)]
    return [{"name": f"{rule}-lr{lr:g}-B{lr * ratio:g}{'-deeper' if regime else ''}", "task": "trec6",
             "overrides": {"method": rule_text(rule), "topology.p": 0.5, "train.lr": lr, "train.lr_ratio.B": ratio,
                           "train.rounds": 30, "eval.every": 0, **regime}}
            for rule, lr, ratio, regime in chosen]


def rule_text(rule: str, interval: int = 5) -> str:
    return f"{{name: tad, T: {interval}}}" if rule == "tad" else rule


def chosen_rates() -> dict[str, float]:
    """The rate with the best final mean accuracy over peers, for each rule; `local` takes that of lora."""
    stored = json.loads((RESULTS / "real_input_rates.json").read_text())
    best: dict[str, tuple[float, float]] = {}
    for run in stored.values():
        rule, lr = run["name"].split("-lr")
        best[rule] = max(best.get(rule, (0.0, 0.0)), (run["final"]["mean"], float(lr)))
    rates = {rule: lr for rule, (_, lr) in best.items()}
    return rates | {"local": rates["lora"]}


def plan_grid(task: str, seeds: int, stored: dict) -> list[dict]:
    """One seed of everything; once its cells are there, more seeds of lora and of the best tad at p = 0.02."""
    rates = chosen_rates()
    methods = [(rule, rule, rule_text(rule)) for rule in RULES] + [(f"tad{T}", "tad", rule_text("tad", T)) for T in INTERVALS]

    def run(task, label, rule, text, p, seed):
        return {"name": f"{task}-{label}-p{p:g}-s{seed}", "task": task,
                "overrides": {"method": text, "topology.p": p, "train.lr": rates[rule], "seed": seed}}

    runs = []
    if task in ("trec6", "both"):
        runs += [run("trec6", *m, p, 0) for p in (0.02, 0.1) for m in methods]
        runs.append(run("trec6", "local", "local", "local", 0.02, 0))
        cells = {T: stored.get(f"trec6-tad{T}-p0.02-s0") for T in INTERVALS}
        if all(cells.values()):
            best = max(INTERVALS, key=lambda T: cells[T]["final"]["mean"])
            repeated = [methods[0], (f"tad{best}", "tad", rule_text("tad", best))]
            runs += [run("trec6", *m, 0.02, seed) for seed in range(1, seeds) for m in repeated]
    if task in ("sst2", "both"):
        runs += [run("sst2", *m, 0.02, 0) for m in [*methods, ("local", "local", "local")]]
    return runs


def execute(run: dict, scratch: Path) -> dict:
    """One run in a process of its own: what came out of it, and how it was made."""
    output = scratch / run["name"]
    command = [sys.executable, "-m", "dfl", "train", f"launch/recipes/{run['task']}.yaml", "--overwrite", "--threads", "1",
               "--output", str(output)]
    for key, value in run["overrides"].items():
        command += [f"--{key}", str(value)]
    started = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return summarise(run, output, command, time.time() - started)


def summarise(run: dict, output: Path, command: list[str], seconds: float) -> dict:
    records = read_lines(output / "metrics.jsonl")
    about = json.loads((output / "run.json").read_text())
    evaluated = [r for r in records if "eval" in r]
    rounds = [r for r in records if r["round"]]
    late = [r["measures"] for r in rounds[-len(rounds) // 3:]]
    phases = {key: sum(r["seconds"].get(key, 0.0) for r in rounds) for key in ("local", "encode", "exchange", "mix", "measure",
                                                                                 "evaluate")}
    return {**run, "command": " ".join(["python", *command[1:]]).replace(str(output), f"runs/{run['name']}"),
            "before": evaluated[0]["eval"]["accuracy"]["mean"], "final": evaluated[-1]["eval"]["accuracy"],
            "best": max(r["eval"]["accuracy"]["mean"] for r in evaluated),
            "consensus": evaluated[-1]["eval"]["consensus"]["accuracy"],
            "last_third": {key: float(np.mean([m[key] for m in late])) for key in late[0]},
            "edges": sum(r["edges"] for r in rounds), "message_bytes": sum(r["message_bytes"] for r in rounds),
            "seconds": {"all": round(seconds, 1), **{k: round(v, 4) for k, v in phases.items()}},
            **{key: about[key] for key in ("versions", "hardware", "git_commit", "started")}}


def table() -> str:
    """Final mean accuracy over peers (and minimum, consensus) by rule and p, from the committed grid."""
    stored = json.loads((RESULTS / "real_input_grid.json").read_text())
    cells: dict[tuple, list[dict]] = {}
    for run in stored.values():
        task, label, p, _ = run["name"].rsplit("-", 3)
        cells.setdefault((task, p.removeprefix("p"), label), []).append(run)
    lines = ["| data | p | rule | lr | peers' mean | worst peer | consensus | cross term (relative) | MB sent |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for (task, p, label), runs in cells.items():
        means = [100 * r["final"]["mean"] for r in runs]
        spread = f" ± {np.std(means, ddof=1):.1f} ({len(means)} seeds)" if len(means) > 1 else ""
        lines.append(f"| {task} | {'–' if label == 'local' else p} | {label} | {runs[0]['overrides']['train.lr']:g} "
                     f"| {np.mean(means):.1f}{spread} | {100 * np.mean([r['final']['min'] for r in runs]):.1f} "
                     f"| {100 * np.mean([r['consensus'] for r in runs]):.1f} "
                     f"| {np.mean([r['last_third']['cross_term_relative'] for r in runs]):.3f} "
                     f"| {np.mean([r['message_bytes'] for r in runs]) / 1e6:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
