"""Overhead of a round in another checkout of this project against this one, in turn in one sitting: ratios count.

    git worktree add ../before a9b7008    # the last before a round was six choices
    python benchmarks/before_after.py ../before --commit a9b7008

The recipe of `round_phases.py` at its base and in one process. What a round takes beside the local phase is encode, exchange, mix; of
each run the median over its rounds, then the median over the runs. A run's least round is told as well: what others do on the
machine only adds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dfl.store.records import read_lines

HERE = Path(__file__).parent.parent
CASES = {"8 peers in 2 processes": (8, 2), "8 peers in 1 process": (8, 1)}
PHASES = ("encode", "exchange", "mix")
ROUNDS = 25


def main() -> None:
    from stamp import write
    parser = argparse.ArgumentParser()
    parser.add_argument("before", type=Path)
    parser.add_argument("--commit", required=True, help="what lies in `before`")
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    cases = {name: compared(args.before, peers, processes, args.times) for name, (peers, processes) in CASES.items()}
    write("before_after", {"recipe": "quickstart on a ring, method lora, 1 local step, batch 1", "rounds": ROUNDS, "times": args.times,
                           "before": args.commit, "phases": PHASES}, cases)


def compared(before: Path, peers: int, processes: int, times: int) -> dict:
    runs: dict[str, list[list[float]]] = {"before": [], "now": []}
    for _ in range(times):
        for name, root in (("before", before), ("now", HERE)):
            runs[name].append(seconds(root, peers, processes))
    row = {}
    for kind, of in (("median", statistics.median), ("least", min)):
        found = {name: 1e3 * statistics.median(of(run) for run in values) for name, values in runs.items()}
        row[kind] = {f"{name}_ms": round(value, 3) for name, value in found.items()}
        row[kind]["ratio"] = round(found["now"] / found["before"], 3)
    pairs = [statistics.median(now) / statistics.median(then) for then, now in zip(runs["before"], runs["now"], strict=True)]
    row["ratios_of_pairs"] = [round(pair, 3) for pair in pairs]
    print(peers, processes, row, flush=True)
    return row


def seconds(root: Path, peers: int, processes: int) -> list[float]:
    """Encode, exchange and mix of every round but the first two, of the slowest process."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        method = "method" if (root / "dfl" / "methods.py").exists() else "rule"
        fields = {"baseline": "null", "topology": "ring", method: "lora", "partition": "iid", "peers": peers, "lora.rank": 8,
                  "train.rounds": ROUNDS, "train.local_steps": 1, "train.batch_size": 1, "eval.every": 0, "data.max_valid": 20,
                  "data.max_train": 200, "threads": 1, "output": run}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                   "-m", "dfl", "train", str(root / "launch" / "recipes" / "quickstart.yaml"),
                   *(f"--{key}={value}" for key, value in fields.items())]
        subprocess.run(command, check=True, capture_output=True, cwd=root,
                       env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)})
        records = read_lines(run / "metrics.jsonl")[3:]
    return [sum(record["seconds"][phase] for phase in PHASES) for record in records]


if __name__ == "__main__":
    main()
