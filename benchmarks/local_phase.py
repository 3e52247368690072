"""The local phase on a CPU or a GPU: a step of hosted peers against bare PEFT loops over the same model and batches.

    python benchmarks/local_phase.py [--device cuda] [--peers 1 4 16] [--batch-size 8]

Two bare loops: as many single peers in turn (one model, batches of the recipe), and one central LoRA whose batch is that of all
peers together. They collate, run forward and backward, clip and step, and nothing else. All take turns; ratios are medians over
the turns. MiniLM with all its layers, rank 8 on query and value, AdamW, sequences of up to 64 tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable
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
    parser.add_argument("--peers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(peers, args.batch_size, torch.device(args.device), args.turns) for peers in args.peers]
    about = {"model": "MiniLM-L6", "rank": 8, "max_length": 64, "threads": 1, "steps": STEPS}
    write(f"local_phase_{torch.device(args.device).type}", about | vars(args), rows)


def measure(num_peers: int, batch_size: int, device: torch.device, turns: int) -> dict:
    """A row: ms a step of all peers, and ratios of ours to the bare loops in the same turn."""
    bundle = tasks.load(ModelConfig(), DataConfig(max_length=64, max_train=2000, max_valid=50), seed=0)
    lora = LoraConfig(targets=("query", "value"), head="frozen")
    adapted = attach(bundle.model.to(device), lora, "sequence_classification", bundle.head_modules, 0,
                     partial(ranks.resolve, lora, num_peers, 0))
    streams = [DataStream(torch.arange(p, len(bundle.train), num_peers).numpy(), batch_size, 0, p) for p in range(num_peers)]
    train = TrainConfig(local_steps=STEPS, batch_size=batch_size)
    peers = HostedPeers(range(num_peers), adapted, streams, train, seed=0, device=device)
    plans = [Plan(frozenset("AB"), frozenset())] * num_peers
    ways: dict[str, Callable[[int], object]] = {
        name: partial(ModelTrainer(peers, bundle.task, bundle.train, executor).run, peers.x, plans, [None] * num_peers)
        for name, executor in (("sequential", Sequential()), ("stacked", Stacked()))}
    ways["bare"] = partial(bare, peers, bundle, [[stream] for stream in streams])
    ways["central"] = partial(bare, peers, bundle, [streams])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way(turn)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - began)
    times = {f"{name}_ms": round(1e3 * statistics.median(found) / STEPS, 2) for name, found in seconds.items()}
    ratios = {f"{ours}_to_{other}": ratio(seconds[ours], seconds[other])
              for ours in ("sequential", "stacked") for other in ("bare", "central")}
    row = {"peers": num_peers, **times, **ratios}
    print(row, flush=True)
    return row


def ratio(ours: list[float], other: list[float]) -> list[float]:
    """Least, median and largest ratio over the turns."""
    ratios = sorted(one / two for one, two in zip(ours, other, strict=True))
    return [round(ratios[0], 3), round(statistics.median(ratios), 3), round(ratios[-1], 3)]


def bare(peers: HostedPeers, bundle, batches: list[list[DataStream]], turn: int) -> None:
    """STEPS steps of a plain loop over the PEFT model for each entry of `batches`, whose streams make one batch together."""
    model, device = peers.adapted.model, peers.device
    trained = [site_parameter for site in peers.adapted.sites for site_parameter in (site.a, site.b)]
    for parameter in trained:
        parameter.requires_grad_()
    model.train()
    for streams in batches:
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True)
        for k in range(STEPS):
            chosen = [i for stream in streams for i in stream.batch(turn * STEPS + k)]
            batch = {key: value.to(device) for key, value in bundle.task.collate([bundle.train.features[i] for i in chosen]).items()}
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.eval()


if __name__ == "__main__":
    main()
