"""Phases of a round (local, encode, exchange, mix) of the real loop, by peers, processes and rank; and the exchange alone
against plain batched gloo sends of the same bytes.

    python benchmarks/round_phases.py
"""

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
    exchanges = [exchange_alone(processes, megabytes) for processes in (2, 8) for megabytes in (0.1, 1.18)]
    write("round_phases", {"recipe": "quickstart on a ring, 5 local steps, batch 8", "rounds": ROUNDS, "base": BASE},
          {"rounds": rounds, "exchange_alone": exchanges})


def phases(peers: int, processes: int, rank: int) -> dict:
    """Median seconds of each phase (slowest process) over the rounds after the first."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        fields = {"baseline": "null", "topology": "ring", "method": "lora", "partition": "iid", "peers": peers, "lora.rank": rank,
                  "train.rounds": ROUNDS, "train.local_steps": 5, "eval.every": 0, "data.max_valid": 50, "threads": 1, "output": run}
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


def exchange_alone(processes: int, megabytes: float) -> dict:
    """A ring of one peer a process: our exchange and mix against plain batched isend/irecv, in turn in one run."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        queue = context.SimpleQueue()
        workers = [context.Process(target=_exchange_worker, args=(rank, processes, f"{folder}/store", megabytes, queue))
                   for rank in range(processes)]
        for worker in workers:
            worker.start()
        row = queue.get()
        for worker in workers:
            worker.join()
    print(row, flush=True)
    return row


def _exchange_worker(rank: int, size: int, store: str, megabytes: float, queue) -> None:
    import topologies
    from dfl import methods
    from dfl.adapters.layout import empty_rows, make_layout
    from dfl.engine.gossip import Gossip
    from dfl.transport import Distributed
    from dfl.transport.group import Group
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=60))
    width = int(megabytes * 1e6 / 4 / 16)
    layout = make_layout([("layer", 8, width, width, 1.0)])
    cpu = torch.device("cpu")
    group = Group(dist.PrefixStore("dfl", dist.FileStore(store, size)), rank, size, timeout=60)
    transport, x = Distributed(size, group, device=cpu), empty_rows(1, layout.size)
    method = methods.build("lora", methods.Context(layout), slots={"guard": methods.Choice("finite")})
    gossip = Gossip(method, layout, topologies.build("ring", size), transport, [rank], x)
    neighbours = sorted({(rank - 1) % size, (rank + 1) % size} - {rank})
    received = [torch.empty(layout.size) for _ in neighbours]

    def plain(t: int) -> None:
        ops = [dist.P2POp(dist.irecv, buffer, q) for buffer, q in zip(received, neighbours, strict=True)]
        for work in dist.batch_isend_irecv(ops + [dist.P2POp(dist.isend, x[0], q) for q in neighbours]):
            work.wait()

    def ours(t: int) -> None:
        gossip.round(t, x)

    seconds = {"plain": [], "ours": []}
    for t in range(40):
        for name, function in (("plain", plain), ("ours", ours)):
            dist.barrier()
            start = time.perf_counter()
            function(t)
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
    middle = {name: sorted(values[5:])[len(values[5:]) // 2] for name, values in seconds.items()}
    if rank == 0:
        queue.put({"processes": size, "message_mb": megabytes, "plain_gloo_ms": round(1e3 * middle["plain"], 3),
                   "exchange_and_mix_ms": round(1e3 * middle["ours"], 3), "ratio": round(middle["ours"] / middle["plain"], 2)})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
