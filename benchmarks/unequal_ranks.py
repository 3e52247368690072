"""Rules for peers of unequal ranks on the matrix toy: ranks 2, 2, 4, 4, 8, 8, 8, 8, sixty rounds of twenty steps.

    python benchmarks/unequal_ranks.py [--seeds 3] [--jobs 8]

f_i = 1/2 ||E_i + B_i A_i - M_i||², M_i a shared rank-4 matrix plus a private rank-2 one (32 x 32), noise on both gradients. The loss
is the mean over peers of 1/2 ||E_i + B_i A_i - mean M||², E_i what a rule keeps beside the factors; bytes are those of a message.
"""

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from stamp import write

import topologies
from dfl import methods
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, Context
from dfl.transport import InProcess

RANKS, SIZE, STEPS, LR, ROUNDS = (2, 2, 4, 4, 8, 8, 8, 8), 32, 20, 0.01, 60
GRAPHS = {"complete": {"name": "complete"}, "p=0.1": {"name": "edge_activation", "p": 0.1, "base": "complete"}}
RULES = {"decaf": ("decaf", {}), "hetlora": ("hetlora", {}), "carry": ("carry", {}), "fedhl": ("fedhl", {}),
         "fedhl, the paper's weights": ("fedhl", {"drift_power": 2}), "fedhl without E in training": ("fedhl", {"forward": False}),
         "fedhl without E, the paper's weights": ("fedhl", {"forward": False, "drift_power": 2})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    cells = [(graph, name, seed) for graph in GRAPHS for name in RULES for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = dict(zip(cells, pool.map(run, cells), strict=True))
    table = {graph: {name: summary([found[graph, name, seed] for seed in range(args.seeds)]) for name in RULES} for graph in GRAPHS}
    write("unequal_ranks", {"ranks": RANKS, "rounds": ROUNDS, "steps": STEPS, "seeds": args.seeds}, table)


def summary(runs: list[tuple[float, float]]) -> dict[str, float]:
    losses, sent = zip(*runs, strict=True)
    return {"loss": statistics.mean(losses), "sd": statistics.stdev(losses) if len(losses) > 1 else 0.0,
            "kilobytes a peer and message": statistics.mean(sent) / 1e3}


def run(cell: tuple[str, str, int]) -> tuple[float, float]:
    """The loss at the end, and the bytes of a message on average."""
    graph, name, seed = cell
    method_name, params = RULES[name]
    rng, num = np.random.default_rng(seed), len(RANKS)
    shared = 2 / np.sqrt(4 * SIZE) * rng.standard_normal((SIZE, 4)) @ rng.standard_normal((4, SIZE))
    targets = torch.from_numpy(shared + rng.standard_normal((num, SIZE, 2)) @ rng.standard_normal((num, 2, SIZE)) / np.sqrt(2 * SIZE))
    layout = make_layout([("toy", max(RANKS), SIZE, SIZE, 1.0)])
    (pair,), x = layout.pairs, empty_rows(num, layout.size, dtype=torch.float64)
    filled = torch.tensor([[slot < rank for slot in range(max(RANKS))] for rank in RANKS])
    a, b = a_view(x, pair), b_view(x, pair)
    a.copy_(torch.from_numpy(1.5 * np.linalg.qr(rng.standard_normal((SIZE, max(RANKS))))[0].T) * filled[..., None])
    topology = topologies.build(num_peers=num, seed=seed, **GRAPHS[graph])
    method = methods.build(method_name, Context(layout, ranks=RANKS, peers=num, rounds=ROUNDS, topology=topology), params,
                           {"guard": Choice("finite")})
    gossip = Gossip(method, layout, topology, InProcess(), range(num), x)
    messages = sent = 0
    for t in range(ROUNDS):
        train(a, b, targets - residuals(gossip), filled, rng)
        report = gossip.round(t, x)
        messages, sent = messages + report.messages, sent + report.message_bytes
    loss = float((residuals(gossip) + b @ a - targets.mean(0)).square().sum((1, 2)).mean() / 2)
    print(f"{graph}, {name}, seed {seed}: {loss:.2f}", flush=True)
    return loss, sent / messages


def residuals(gossip: Gossip) -> torch.Tensor:
    """E_i (N, O, I), zero for a rule whose models have none."""
    rows = gossip.residuals()
    if rows is None:
        return torch.zeros(len(gossip.peers), SIZE, SIZE, dtype=torch.float64)
    (pair,) = gossip.method.rule.residual.pairs
    return b_view(rows, pair) @ a_view(rows, pair)


def train(a, b, targets, filled, rng) -> None:
    for _ in range(STEPS):
        residual = b @ a - targets
        noise = torch.from_numpy(0.1 / np.sqrt(SIZE) * rng.standard_normal((2, *a.shape)))
        grad_a, grad_b = b.mT @ residual + noise[0], residual @ a.mT + noise[1].mT
        a -= LR * grad_a * filled[..., None]
        b -= LR * grad_b * filled[:, None]


if __name__ == "__main__":
    main()
