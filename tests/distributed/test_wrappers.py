"""Optimisers across peers over several processes: the same bits however peers are hosted, whatever else travels or is remembered."""

import numpy as np
import pytest
import torch
from one_round import build
from processes import distributed, run_processes

import topologies
from dfl.adapters.layout import empty_rows, make_layout
from dfl.engine.gossip import Gossip
from dfl.methods import Choice
from dfl.transport import InProcess
from dfl.wrappers import WRAPPERS

pytestmark = pytest.mark.distributed
NUM, ROUNDS = 5, 6
LAYOUT = make_layout([("q", 2, 7, 5, 1.0), ("o", 2, 4, 9, 2.0)])
TOLD = {"lr": 0.1, "local_steps": 2, "rates": {"A": 0.1, "B": 0.3}}
# what a wrapper needs beside its name: parameters, the graph
SETTINGS = {name: (Choice(name), {"name": "ring"}) for name in WRAPPERS if name != "none"} | {
    "proxskip": (Choice("proxskip", {"p": 0.5, "penalty": "l1", "strength": 0.01}), {"name": "ring"}),
    "two exchanges": (Choice("flexatc", {"member": "aug_dgm"}), {"name": "ring"}),
    "push_sum": (Choice("push_sum"), {"name": "star", "weights": "push_sum"}),
    "push_diging": (Choice("push_diging"), {"name": "star", "weights": "push_sum"}),
    "relay": (Choice("relay"), {"name": "tree"}),
    "muffliato": (Choice("muffliato", {"sigma": 0.1}), {"name": "ring"})}


def rounds(transport, hosted, name: str) -> torch.Tensor:
    """The rows of the hosted peers at the end (P, D)."""
    wrapper, graph = SETTINGS[name]
    topology = topologies.build(graph["name"], NUM, **{key: value for key, value in graph.items() if key != "name"})
    built = build("lora", LAYOUT, slots={"wrapper": wrapper}, peers=NUM, rounds=ROUNDS, topology=topology)
    x = empty_rows(len(hosted), LAYOUT.size)
    heart = Gossip(built.method, LAYOUT, topology, transport, hosted, x)
    for t in range(ROUNDS):
        after_step = heart.after_step(t, **TOLD)
        for row, peer in enumerate(hosted):
            for k in range(2):
                x[row] += 0.1 * torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(31 * t + peer + 1000 * k))
                x[row] = after_step(row, x[row], k) if after_step else x[row]
        heart.round(t, x, **TOLD)
    return x


def worker(rank: int):
    """The rows of the hosted peers at the end, by setting."""
    transport = distributed(NUM)
    return {name: rounds(transport, list(transport.hosted), name).numpy() for name in SETTINGS}


def test_hosting_does_not_matter():
    parts = run_processes(worker, 2)
    plain = {name: rounds(InProcess(), list(range(NUM)), name).numpy() for name in SETTINGS}
    for name, alone in plain.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), alone, err_msg=name)
    # each is an optimiser of its own, but for led, which is the first member of flexatc
    assert len({alone.tobytes() for alone in plain.values()}) == len(plain) - 1
