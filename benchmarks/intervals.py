"""When TAD should switch: its own phases against the interval that was calibrated once, and against fixed ones.

    python benchmarks/intervals.py toy                              # the matrix toy, 150 rounds, four edge probabilities
    DFL_DATA=... python benchmarks/intervals.py real --jobs 2       # TREC-6 and SST-2, cut to 30 rounds of five local steps

`calibrated` is round(3 / sqrt(1 - rho)), the interval for T = auto before phases were found in the graphs themselves. The toy's theta
was chosen on seeds of its own (`choosing`), the figures reported are those of others. A finished real run is skipped.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from real_input import RESULTS, ROOT, execute
from stamp import write

import topologies
from dfl import simulate
from dfl.schedules.alternating import THETA

sys.path.append(str(ROOT / "tests"))
from toy import PEERS, Toy

ROUNDS, PROBABILITIES = 150, (0.02, 0.1, 0.3, 0.5)
CHOOSING, REPORTED = range(100, 105), range(5)
THETAS, INTERVALS = (0.3, 0.1, 0.03, 0.01, 0.003), (1, 5, 15)
# TREC-6 at the rates at which alternation learns (see `real_input.py ratios`), SST-2 at that of the grid
RATES = {"trec6": {"train.lr": 0.001, "train.lr_ratio.B": 100}, "sst2": {"train.lr": 0.01}}
CUT = {"train.rounds": 30, "train.local_steps": 5, "train.autocast": "off", "eval.every": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("toy", "real"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, default=1, help="of the real runs")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "dfl-intervals")
    args = parser.parse_args()
    torch.set_num_threads(1)
    toy(args.jobs) if args.study == "toy" else real(args)


def toy(jobs: int) -> None:
    cells = {("choosing", p, f"theta={theta:g}"): {"theta": theta} for p in PROBABILITIES for theta in THETAS}
    cells |= {("choosing", p, "calibrated"): {"T": calibrated(p)} for p in PROBABILITIES}
    cells |= {("reported", p, "auto"): {} for p in PROBABILITIES}
    cells |= {("reported", p, "calibrated"): {"T": calibrated(p)} for p in PROBABILITIES}
    cells |= {("reported", p, f"T={T}"): {"T": T} for p in PROBABILITIES for T in INTERVALS}
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = dict(zip(cells, pool.map(losses, cells, cells.values()), strict=True))
    write("intervals_toy", {"peers": PEERS, "rounds": ROUNDS, "theta": THETA, "choosing": list(CHOOSING), "reported": list(REPORTED),
                            "calibrated": {p: calibrated(p) for p in PROBABILITIES},
                            "figure": "peer loss at the end: mean over seeds, standard deviation over seeds, of each seed"},
          {use: {p: {name: value for (u, q, name), value in found.items() if (u, q) == (use, p)} for p in PROBABILITIES}
           for use in ("choosing", "reported")})


def graph(p: float, seed: int = 0):
    return topologies.build("edge_activation", PEERS, p=p, base="complete", seed=100 + seed)


def calibrated(p: float) -> int:
    return max(1, round(3 / (1 - topologies.spectrum.contraction(graph(p))) ** 0.5))


def losses(cell: tuple[str, float, str], params: dict) -> dict:
    use, p, name = cell
    found = []
    for seed in {"choosing": CHOOSING, "reported": REPORTED}[use]:
        problem = Toy(seed)
        result = simulate("tad", graph(p, seed), problem.factors(), problem.local_step, ROUNDS, measure_every=0, **params)
        found.append(problem.peer_loss(result.factors))
    print(f"{use} p={p:<5} {name}: {np.mean(found):.3f} ({np.std(found, ddof=1):.3f})", flush=True)
    return {"mean": float(np.mean(found)), "sd": float(np.std(found, ddof=1)), "seeds": found}


def real(args: argparse.Namespace) -> None:
    path = RESULTS / "intervals_real.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    plan = [run for seed in range(args.seeds) for run in plan_real(seed)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed([pool.submit(execute, run, args.scratch) for run in plan if run["name"] not in stored]):
            done = future.result()
            stored[done["name"]] = done
            path.write_text(json.dumps({run["name"]: stored[run["name"]] for run in plan if run["name"] in stored}, indent=1) + "\n")
            print(done["name"], done["final"]["mean"], flush=True)


def plan_real(seed: int) -> list[dict]:
    """Both tasks at two edge probabilities; at p = 0.1 the calibrated interval is T = 5."""
    runs = []
    for p, rules in ((0.02, {"auto": "auto", "calibrated": calibrated(0.02), "T1": 1, "T5": 5}),
                     (0.1, {"auto": "auto", "calibrated": calibrated(0.1), "T1": 1})):
        for task, rates in RATES.items():
            runs += [{"name": f"{task}-{label}-p{p:g}-s{seed}", "task": task,
                      "overrides": {"method": f"{{name: tad, T: {T}}}", "topology.p": p, "seed": seed, **CUT, **rates}}
                     for label, T in rules.items()]
    return runs


if __name__ == "__main__":
    main()
