"""Exchange and mix of ours against plain batched gloo: the same bytes and the same weighted sum, in turns in one run.

    python benchmarks/exchange.py            # the table
    python benchmarks/exchange.py where      # and where each microsecond of ours goes

One peer a process on a ring of 2, 4 and 8 processes, messages of 0.1 and 5 MB in three parts (A, B, head). Plain is one batch of
isend and irecv and a sum in place, without a header, a check or a guard. Turns are blocks of rounds, first plain, then ours: a
ratio is of two neighbouring blocks, each from the first start to the last end over all processes. CPU seconds, of all threads of all
processes, are told beside the wall's, as the processes share the cores of one machine.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PROCESSES, MEGABYTES = (2, 4, 8), (0.1, 5.0)
RANK, BLOCK, TURNS, WARM = 8, 10, 25, 3
# what a round of ours is made of: (module, function, what it does); of nested ones each has only its own time
STEPS = (("dfl.engine.sending", "Sending.speak", "trigger and encode"), ("dfl.transport.wire", "draft", "pack"),
         ("dfl.transport.wire", "fill", "pack"), ("dfl.transport.frames", "digest", "digest"),
         ("dfl.transport.frames", "seal", "header"), ("dfl.transport.frames", "contents", "header"),
         ("dfl.transport.group", "Group.begin", "gloo: begin"), ("dfl.transport.group", "Group.end", "gloo: wait"),
         ("dfl.transport.wire", "Reader.read", "read the table"), ("dfl.transport.distributed", "Distributed.begin", "who gets what"),
         ("dfl.transport.distributed", "Distributed._end_unknown", "who gets what"),
         ("dfl.engine.receiving", "Receiving.open", "decode"), ("dfl.engine.messages", "norms", "norms"),
         ("dfl.engine.receiving", "Receiving.guard", "guard"), ("dfl.engine.receiving", "Receiving.complete", "complete"),
         ("dfl.engine.gossip", "Gossip._mix", "weighted sum and write-back"))


def main() -> None:
    from stamp import write
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=("ratios", "where"), default="ratios")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    parser.add_argument("--megabytes", type=float, nargs="+", default=MEGABYTES)
    parser.add_argument("--turns", type=int, default=TURNS)
    args = parser.parse_args()
    rows = [case(size, megabytes, args.what == "where", args.turns) for size in args.processes for megabytes in args.megabytes]
    name = "exchange" if args.what == "ratios" else "exchange_where"
    about = {"topology": "ring", "rounds_a_turn": BLOCK, "turns": args.turns, "memory_mb_per_s": bandwidth(), "load": os.getloadavg()}
    write(name, about, {"cases": rows})


def bandwidth() -> int:
    """Megabytes a second that one core reads and writes, copying 64 MB."""
    source, target, best = torch.ones(2**24), torch.empty(2**24), float("inf")
    for _ in range(8):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return round(2 * source.nbytes / best / 1e6)


def case(size: int, megabytes: float, where: bool, turns: int = TURNS) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "topologies", "dfl.methods", "dfl.engine.gossip", "dfl.transport"])
        workers = [context.Process(target=work, args=(rank, size, folder, megabytes, where, turns)) for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(size)]
    row = {"processes": size, "message_mb": megabytes, **table([done for done, _ in found])}
    if where:
        row["where_us"] = {name: round(statistics.mean(steps[name] for _, steps in found), 1) for name in found[0][1]}
    print(row, flush=True)
    return row


def table(found: list[list[dict]]) -> dict:
    """Of the turns of all processes: medians, and the quartiles of the ratios of neighbouring blocks."""
    times: dict[str, list[float]] = {}
    for turn in zip(*found, strict=True):
        for name in ("plain", "ours"):
            began, ended, cpu = zip(*(one[name] for one in turn), strict=True)
            times.setdefault(f"{name}_ms", []).append(1e3 * (max(ended) - min(began)) / BLOCK)
            times.setdefault(f"{name}_cpu_ms", []).append(1e3 * sum(cpu) / BLOCK)
    row = {name: round(statistics.median(values), 3) for name, values in times.items()}
    for kind in ("ms", "cpu_ms"):
        ratios = [ours / plain for ours, plain in zip(times[f"ours_{kind}"], times[f"plain_{kind}"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row["ratio" if kind == "ms" else "cpu_ratio"] = {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
    return row


def work(rank: int, size: int, folder: str, megabytes: float, where: bool, num_turns: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/plain", size), rank=rank, world_size=size,
                            timeout=timedelta(seconds=300))
    x, plain = plain_round(rank, size, megabytes)
    same, ours, close = our_round(rank, size, megabytes, folder)
    spent: dict[str, float] = {}
    turns = []
    for k in range(WARM + num_turns):
        if k == WARM and where:
            watch_steps(spent)
        turns.append({"plain": block(plain, k), "ours": block(ours, k)})
    assert torch.equal(x, same[0]), "the two have mixed differently"
    rounds = num_turns * BLOCK
    steps = {name: 1e6 * seconds / rounds for name, seconds in spent.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps((turns[WARM:], steps)))
    dist.barrier()
    close()
    dist.destroy_process_group()


def block(round, k: int) -> tuple[float, float, float]:
    """When a block of rounds began and ended, and its CPU seconds."""
    dist.barrier()
    started, cpu = time.perf_counter(), time.process_time()
    for t in range(k * BLOCK, (k + 1) * BLOCK):
        round(t)
    return started, time.perf_counter(), time.process_time() - cpu


def make_rows(rank: int, megabytes: float):
    from dfl.adapters.layout import empty_rows, make_layout
    from dfl.transport.base import FREE
    width = int(megabytes * 1e6 / 4 / (2 * RANK) * 0.98)
    layout = make_layout([("layer", RANK, width, width, 1.0)], [("head", (width // 4,))])
    x = empty_rows(1, layout.size, before=FREE)
    x.normal_(generator=torch.Generator().manual_seed(rank))
    return layout, x


def plain_round(rank: int, size: int, megabytes: float):
    """The row, and one round of plain gloo on it, summed in ascending order of peers as ours is."""
    import topologies
    row = make_rows(rank, megabytes)[1][0]
    weights = topologies.build("ring", size).neighbors(0, rank)
    neighbours = sorted(j for j in weights if j != rank)
    received = {j: torch.empty_like(row) for j in neighbours}
    terms = [(received.get(j, row), weights[j]) for j in sorted(weights)]

    def plain(t: int) -> None:
        ops = [dist.P2POp(dist.irecv, received[j], j) for j in neighbours] + [dist.P2POp(dist.isend, row, j) for j in neighbours]
        for sent in dist.batch_isend_irecv(ops):
            sent.wait()
        (first, weight), *middle, (last, last_weight) = terms
        first.mul_(weight)  # in the buffer that it lies in
        for values, weight in middle:
            first.add_(values, alpha=weight)
        torch.add(first, last, alpha=last_weight, out=row)

    return row, plain


def our_round(rank: int, size: int, megabytes: float, folder: str):
    import topologies
    from dfl import methods
    from dfl.engine.gossip import Gossip
    from dfl.transport import Distributed
    from dfl.transport.group import Group
    layout, x = make_rows(rank, megabytes)
    transport = Distributed(size, Group(dist.FileStore(f"{folder}/ours", size), rank, size, timeout=300), device=torch.device("cpu"))
    transport.lend(x)
    method = methods.build("lora", methods.Context(layout, head="mixed"))
    gossip = Gossip(method, layout, topologies.build("ring", size), transport, [rank], x)
    return x, lambda t: gossip.round(t, x), transport.close


def watch_steps(spent: dict[str, float]) -> None:
    """From now on the CPU seconds that each step takes of this thread, without those inside it, go into `spent`."""
    import importlib
    inside = [0.0]

    def timed(function, name):
        @functools.wraps(function)
        def wrapper(*arguments, **keywords):
            inside.append(0.0)
            started = time.thread_time()
            try:
                return function(*arguments, **keywords)
            finally:
                took = time.thread_time() - started
                spent[name] = spent.get(name, 0.0) + took - inside.pop()
                inside[-1] += took
        return wrapper

    for module, path, name in (*STEPS, ("dfl.engine.gossip", "Gossip.round", "the rest of a round")):
        *owners, last = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, last, timed(getattr(owner, last), name))


if __name__ == "__main__":
    main()
