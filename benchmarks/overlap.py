"""Exchange while peers train (delay: 1): how much is hidden behind the local phase on a slow link, and what it costs in accuracy.

    python benchmarks/overlap.py link
    python benchmarks/overlap.py accuracy

Link: two hosts of one machine (network namespaces, so it needs root) that send at most 50 Mbit/s each (tbf), a process on each, four
peers on a ring, so that two messages a round go each way. Runs with and without a delay in turn; of each the median over its rounds
of the seconds that the slowest process waits for messages. Accuracy: the same recipe in one process, with evaluation at the end.
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
RECIPE = HERE / "launch" / "recipes" / "quickstart.yaml"
MEGABITS, RANK = 50, 64
PARTITIONS = {"skewed": "{name: dirichlet, alpha: 0.3}", "alike": "iid"}
COMMON = {"baseline": "null", "topology": "ring", "method": "lora", "partition": PARTITIONS["skewed"], "peers": 4,
          "threads": 1, "processes": 1}
LINK = {"lora.rank": RANK, "train.rounds": 10, "train.local_steps": 5, "eval.every": 0, "data.max_valid": 20, "data.max_train": 400}
LEARN = {"train.rounds": 24, "train.local_steps": 5, "eval.every": 24, "data.max_train": 2000}


def main() -> None:
    from stamp import write
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("link", "accuracy"))
    parser.add_argument("--times", type=int, default=2, help="runs of each kind on the link, seeds of the recipe")
    args = parser.parse_args()
    if args.part == "accuracy":
        found = {f"{name}, delay {delay}": [learn(delay, seed, partition) for seed in range(args.times)]
                 for name, partition in PARTITIONS.items() for delay in (0, 1)}
        write("overlap_accuracy", {"recipe": "quickstart", **COMMON, **LEARN, "partition": PARTITIONS}, found)
        return
    runs: dict[int, list[dict]] = {0: [], 1: []}
    for _ in range(args.times):
        for delay in runs:
            runs[delay].append(on_link(delay))
            print(delay, runs[delay][-1], flush=True)
    waited = {delay: statistics.median(run["exchange_s"] for run in found) for delay, found in runs.items()}
    write("overlap_link", {"megabits": MEGABITS, "recipe": "quickstart", **COMMON, **LINK},
          {**{f"delay {delay}": found for delay, found in runs.items()}, "hidden": round(1 - waited[1] / waited[0], 4)})


def words(run: Path, fields: dict) -> list[str]:
    return ["-m", "dfl", "train", str(RECIPE), *(f"--{key}={value}" for key, value in {**COMMON, **fields, "output": run}.items())]


def on_link(delay: int) -> dict:
    """Seconds of a round over two hosts, and the bytes of a message."""
    sys.path.insert(0, str(HERE / "tests"))
    from hosts import Hosts
    with tempfile.TemporaryDirectory() as folder, Hosts(2) as hosts:
        hosts.limit(MEGABITS)
        run = Path(folder) / "run"
        started = [hosts.start(name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(k),
                               "--nproc-per-node", "1", "--master-addr", "10.77.0.1", "--master-port", "29511",
                               *words(run, LINK | {"delay": delay}), env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                   for k, name in enumerate(hosts.names)]
        ends = [process.communicate() for process in started]
        if any(process.returncode for process in started):
            sys.exit("\n".join(end[1][-2000:] for end in ends))
        records = read_lines(run / "metrics.jsonl")[3:]
    seconds = {phase: statistics.median(record["seconds"][phase] for record in records) for phase in ("local", "exchange")}
    row = {f"{phase}_s": round(value, 4) for phase, value in seconds.items()}
    return row | {"message_bytes": records[0]["message_bytes"] // records[0]["edges"]}


def learn(delay: int, seed: int, partition: str) -> dict:
    """Accuracy at the end, of the peers' models on average and of the consensus model."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fields = LEARN | {"delay": delay, "seed": seed, "partition": partition}
        subprocess.run([sys.executable, *words(run, fields)], check=True, capture_output=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = read_lines(run / "metrics.jsonl")[-1]["eval"]
    return {"peers": round(found["accuracy"]["mean"], 4), "consensus": round(found["consensus"]["accuracy"], 4)}


if __name__ == "__main__":
    main()
