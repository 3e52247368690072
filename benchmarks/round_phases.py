"""Phases of a round (local, encode, exchange, mix, and the measures of every round) of the real loop, by peers, processes and rank.

    python benchmarks/round_phases.py
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dfl.store.records import read_lines

BASE = {"peers": 8, "processes": 2, "rank": 8}
VARIED = {"peers": (4, 16), "processes": (1, 4, 8), "rank": (2, 64)}
PHASES = ("local", "encode", "exchange", "mix", "measure")
ROUNDS = 6
RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "quickstart.yaml"


def main() -> None:
    from stamp import write
    cases = [BASE] + [BASE | {key: value} for key, values in VARIED.items() for value in values]
    rounds = [phases(**case) for case in cases]
    write("round_phases", {"recipe": "quickstart on a ring, 5 local steps, batch 8", "rounds": ROUNDS, "base": BASE},
          {"rounds": rounds})


def phases(peers: int, processes: int, rank: int) -> dict:
    """Median seconds of each phase (slowest process) over the rounds after the first."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fields = {"baseline": "null", "topology": "ring", "method": "lora", "partition": "iid", "peers": peers, "lora.rank": rank,
                  "train.rounds": ROUNDS, "train.local_steps": 5, "eval.every": 0, "measure.every": 1, "measure.layers": 0,
                  "data.max_valid": 50, "threads": 1, "output": run}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                   "-m", "dfl", "train", str(RECIPE), *(f"--{key}={value}" for key, value in fields.items())]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        records = read_lines(run / "metrics.jsonl")[2:]
    seconds = {phase: sorted(r["seconds"][phase] for r in records)[len(records) // 2] for phase in PHASES}
    whole = sum(seconds[phase] for phase in PHASES[:4])
    row = {"peers": peers, "processes": processes, "rank": rank, "message_bytes": records[0]["message_bytes"] // records[0]["edges"],
           "wire_bytes": records[0]["wire_bytes"], **{f"{k}_ms": round(1e3 * v, 3) for k, v in seconds.items()},
           "exchange_and_mix_share": round((seconds["encode"] + seconds["exchange"] + seconds["mix"]) / whole, 4)}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
