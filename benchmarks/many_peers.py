"""What a process does when more peers are hosted elsewhere: CPU time, memory and bytes of a round, and of an evaluation's sums.

    python benchmarks/many_peers.py

Four peers a process on a ring: 8 and 32 peers in 2 and 8 processes with D = 1 M numbers a peer; 8, 32 and 128 in 2, 8 and 32
processes with D = 0.25 M, since 32 processes of the larger size want 15 GB. CPU seconds, not wall time: the processes share the
cores of one machine. They are forked from one that has imported everything: 32 imports of torch would take longer than all rounds.
Process 0 is told apart from the one that does most, as none should be special.
"""

import argparse
import resource
import tempfile
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

HOSTED, RANK, WIDTH = 4, 8, 768
CASES = [(8, 80), (32, 80), (8, 20), (32, 20), (128, 20)]  # peers, layers
ROUNDS = 6


def main() -> None:
    from stamp import write
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", type=int, nargs="+", help="those of the table alone")
    peers = parser.parse_args().peers
    rows = [case(num_peers, layers) for num_peers, layers in CASES if peers is None or num_peers in peers]
    write("many_peers", {"hosted": HOSTED, "rank": RANK, "topology": "ring", "rounds": ROUNDS}, {"cases": rows})


def case(num_peers: int, layers: int) -> dict:
    size = num_peers // HOSTED
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "topologies", "dfl.methods", "dfl.run.loop", "dfl.transport"])
        queue = context.SimpleQueue()
        workers = [context.Process(target=work, args=(rank, size, layers, f"{folder}/store", queue)) for rank in range(size)]
        for worker in workers:
            worker.start()
        found = dict(queue.get() for _ in workers)
        for worker in workers:
            worker.join()
    names = found[0].keys()
    row = {"peers": num_peers, "processes": size, "numbers_a_peer": 2 * layers * RANK * WIDTH, "process_0": found[0],
           "most": {name: max(one[name] for one in found.values()) for name in names}}
    print(row, flush=True)
    return row


def work(rank: int, size: int, layers: int, store: str, queue) -> None:
    """Medians over rounds, the first left out, of one process."""
    import topologies
    from dfl import methods
    from dfl.adapters.layout import empty_rows, make_layout
    from dfl.engine.gossip import Gossip
    from dfl.metrics.consensus import consensus
    from dfl.run.loop import Look
    from dfl.transport import Distributed
    from dfl.transport.group import Group
    torch.set_num_threads(1)
    num_peers = HOSTED * size
    layout = make_layout([(f"layer {k}", RANK, WIDTH, WIDTH, 1.0) for k in range(layers)])
    transport = Distributed(num_peers, Group(dist.FileStore(store, size), rank, size, timeout=600), device=torch.device("cpu"),
                            timeout=600)
    x, topology = empty_rows(HOSTED, layout.size), topologies.build("ring", num_peers)
    x.normal_(generator=torch.Generator().manual_seed(rank))
    method = methods.build("lora", methods.Context(layout))
    gossip = Gossip(method, layout, topology, transport, transport.hosted, x)
    peers = SimpleNamespace(common_scale=lambda: x.clone(), ids=list(transport.hosted),
                            adapted=SimpleNamespace(factors=lambda rows: rows, lora=layout))
    run = SimpleNamespace(peers=peers, rule=method.rule, gossip=gossip, topology=topology, transport=transport,
                          config=SimpleNamespace(peers=num_peers))
    look, numbers, times, sent = Look(True, False), torch.zeros(3, 16, dtype=torch.float64), [], []
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for t in range(ROUNDS):
        times.append({})
        transport.newly_sent()
        with measured(times[-1], "round_cpu_ms"):
            gossip.round(t, x)
            transport.agree(0)
            transport.summary(numbers)
        wire, control, _ = transport.newly_sent()
        before = look.before(run, t)
        with measured(times[-1], "measures_cpu_ms"):
            look.after(run, before)
        with measured(times[-1], "mean_of_factors_cpu_ms"):
            consensus(transport, x, layout, num_peers, product=False)
        sent.append({"round_bytes": wire + control, "control_bytes": control, "sums_bytes": transport.newly_sent()[2]})
    found = {name: sorted(one[name] for one in rows[1:])[len(rows) // 2] for rows in (times, sent) for name in rows[0]}
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
    queue.put((rank, {name: round(value, 1) for name, value in found.items()} | {"memory_mb": round(memory)}))
    transport.close()


class measured:  # noqa: N801  # reads as what it does
    """CPU milliseconds of this process, all threads, inside the block."""

    def __init__(self, into: dict, name: str):
        self.into, self.name = into, name

    def __enter__(self) -> None:
        self.started = time.process_time()

    def __exit__(self, *_) -> None:
        self.into[self.name] = 1e3 * (time.process_time() - self.started)


if __name__ == "__main__":
    main()
