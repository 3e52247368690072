"""Both executors by number of peers: seconds of one local step of all hosted peers, on the CPU or `--device cuda`.

    python benchmarks/executors.py [--device cuda] [--peers 1 4 16 64]
"""

import argparse
import time
from functools import partial

import torch
from stamp import write

from dfl import tasks
from dfl.adapters import ranks
from dfl.adapters.attach import attach
from dfl.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from dfl.slots import Plan
from dfl.training.executors import Sequential, Stacked
from dfl.training.hosted import HostedPeers
from dfl.training.phase import ModelTrainer
from dfl.training.stream import DataStream

STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    bundle = tasks.load(ModelConfig(layers=2, dropout=0.0), DataConfig(max_length=32, max_train=1000, max_valid=50), seed=0)
    lora = LoraConfig(targets=("query", "value"))
    adapted = attach(bundle.model.to(device), lora, "sequence_classification", bundle.head_modules, 0,
                     partial(ranks.resolve, lora, max(args.peers), 0))
    rows = [measure(adapted, bundle, peers, batch, device, args.repeats) for batch in args.batch_size for peers in args.peers]
    write(f"executors_{device.type}", {"model": "MiniLM-L6, 2 layers", "rank": 8, "max_length": 32, "threads": 1,
                                       "device": args.device}, rows)


def measure(adapted, bundle, num_peers: int, batch_size: int, device, repeats: int) -> dict:
    """Both executors in turn, so that a noisy machine hits both; the fastest of the repeats counts."""
    parts = [range(p, len(bundle.train), num_peers) for p in range(num_peers)]
    streams = [DataStream(torch.tensor(list(part)).numpy(), batch_size, 0, p) for p, part in enumerate(parts)]
    train = TrainConfig(local_steps=STEPS, batch_size=batch_size)
    peers = HostedPeers(range(num_peers), adapted, streams, train, seed=0, device=device)
    plans = [Plan(frozenset("AB"), frozenset())] * num_peers
    executors = {"sequential": Sequential(), "stacked": Stacked()}
    seconds = {name: [] for name in executors}
    for repeat in range(repeats + 1):
        for name, executor in executors.items():
            start = time.perf_counter()
            ModelTrainer(peers, bundle.task, bundle.train, executor).run(peers.x, plans, [None] * num_peers, repeat)
            if repeat:  # the first is a warm-up
                seconds[name].append((time.perf_counter() - start) / STEPS)
    best = {name: min(values) for name, values in seconds.items()}
    row = {"peers": num_peers, "batch_size": batch_size, **{f"{k}_ms": round(1e3 * v, 2) for k, v in best.items()},
           "sequential_over_stacked": round(best["sequential"] / best["stacked"], 2)}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
