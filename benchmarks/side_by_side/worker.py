"""One peer of the job under one system: python worker.py SYSTEM WARM ROUNDS, with RANK and MASTER_* set. Prints a line of JSON."""

import json
import os
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent.parent)]
from job import Job  # noqa: E402


def loopback_bytes() -> int:
    """Sent through the loopback of this process's network so far; /sys would tell of another network."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def main(system: str, warm: int, rounds: int) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    job, times = Job(rank), []

    def mark() -> None:
        times.append((time.monotonic(), loopback_bytes()))

    if system == "flower":
        import flower
        flower.train(job, warm + rounds, mark)
    else:
        from systems import SYSTEMS
        work = SYSTEMS[system](job, rank)
        for _ in range(warm + rounds):
            next(work)
            mark()
    print(json.dumps({"rank": rank, "began": times[warm - 1], "ended": times[-1], "message_bytes": job.vector.nbytes,
                      "accuracy": job.accuracy()}), flush=True)
    os._exit(0)  # others' threads and servers need not be asked


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
