"""What travels, when and through what: the same bits and the same ledger however peers are hosted."""

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
from dfl.transport.aside import Aside

pytestmark = pytest.mark.distributed
NUM, ROUNDS = 5, 8
LAYOUT = make_layout([("q", 2, 7, 5, 1.0), ("o", 2, 4, 9, 2.0)])
SLOTS = {
    "event over a lossy way": {"trigger": Choice("event", {"threshold": 0.8, "decay": "constant"}),
                               "channel": Choice("lossy", {"rate": 0.3})},
    "known start": {"trigger": Choice("event", {"threshold": 9.0, "start": "common", "norm": "product"})},
    "tensors": {"trigger": Choice("eventgrad", {"initial": 2, "horizon": 0.9})},
    "answers": {"trigger": Choice("efhc", {"r": 0.3, "bandwidth": [1.0, 2.0, 1.0, 4.0, 1.0]}), "codec": Choice("int8")},
    "random": {"trigger": Choice("random_gossip", {"probability": 0.3})},
    "event over segments": {"trigger": Choice("event", {"threshold": 0.8, "decay": "constant"}),
                            "channel": Choice("segments", {"rate": 0.2, "count": 3})},
    "stale": {"channel": Choice("segments", {"rate": 0.3, "mode": "stale"})},
    "sent again": {"channel": Choice("segments", {"rate": 0.3, "mode": "retransmit"})},
    "bursts": {"channel": Choice("bursts", {"mode": "renormalise", "count": 3})},
    "as often as noise allows": {"channel": Choice("noise", {"sigma": 0.1, "aggregations": "auto"})},
    "delay": {"channel": Choice("delay", {"by": 1, "jitter": 2})},
    "a clock": {"network": Choice("links", {"compute": [0.1, 0.2, 0.3, 0.1, 0.5]}),
                "trigger": Choice("efhc", {"r": 3e4, "bandwidth": "measured"})},
    "signs of differences": {"codec": Choice("sign", {"block": 8})},
    "sparq whole": {"codec": Choice("top_k", {"share": 0.2}), "trigger": Choice("sparq", {"c": 1000.0, "growth": 0.5})},
    "shared places": {"codec": Choice("random_k", {"share": 0.2})},
    "over the air": {"channel": Choice("over_the_air", {"snr": 10.0, "least_gain": 0.2, "refresh": 3})},
    "ahead": {"delay": 1}, "ahead, rounded": {"delay": 1, "codec": Choice("int8")},
    "ahead, event": {"delay": 1, "trigger": Choice("event", {"threshold": 0.8, "decay": "constant"})},
    "some are away": {"topology": {"name": "presence", "away": [[1, 2, 5], [4, 0, 3]]}, "wrapper": Choice("gradient_tracking")},
    "noise that cancels": {"channel": Choice("zip_noise", {"sigma": 0.3})},
    "masks": {"channel": Choice("masked")},
    "noise once": {"wrapper": Choice("muffliato", {"sigma": 0.1, "steps": 3})},
    "late": {"trigger": Choice("late", {"share": 0.5})}, "periodic": {"trigger": Choice("periodic", {"every": 3})},
    "one threshold for all": {"trigger": Choice("global_threshold", {"r": 0.3, "bandwidth": 1.0})},
    "answered by all": {"trigger": Choice("zero_threshold")},
    "four bits": {"codec": Choice("int4", {"rounding": "random", "memory": "differences"})},
    "levels": {"codec": Choice("qsgd")}, "directions": {"codec": Choice("low_rank")},
    "zeros": {"channel": Choice("segments", {"rate": 0.3, "mode": "zero_fill"})},
    "in error": {"channel": Choice("segments", {"rate": 0.3, "mode": "additive"})},
    **{f"poisoned, {guard}": {"channel": Choice("attack", {"kind": kind, "by": [1]}), "guard": Choice(guard, given)}
       for guard, kind, given in (("clipped", "sign_flip", {}), ("median", "alie", {}), ("trimmed_mean", "huge", {}),
                                  ("krum", "ipm", {"tolerate": 0}), ("geometric_median", "dissensus", {}),
                                  ("bridge", "sign_flip", {"screen": "bulyan", "tolerate": 0}), ("finite", "nan", {}))},
}


def rounds(transport, hosted, slots: dict) -> torch.Tensor:
    """The rows of the hosted peers, and beside them what their ledgers hold: (P, D + 10)."""
    slots = dict(slots)
    topology = topologies.build(slots.pop("topology", "ring"), NUM)
    built = build("lora", LAYOUT, delay=slots.pop("delay", 0), slots=slots, peers=NUM, rounds=ROUNDS, topology=topology)
    x = empty_rows(len(hosted), LAYOUT.size)
    heart, counted = Gossip(built.method, LAYOUT, topology, transport, hosted, x), []
    for t in range(ROUNDS):
        heart.begin(t, x, lr=0.1, local_steps=2)
        for row, peer in enumerate(hosted):
            if not heart.plans(t)[row].away:
                x[row] += 0.3 * torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(31 * t + peer))
        heart.arrive()
        report = heart.round(t, x, lr=0.1, local_steps=2)
        counted.append(torch.tensor([list(report.ledger[peer]) if peer in report.ledger else [0] * 10 for peer in hosted]))
    return torch.cat([x.double(), sum(counted).double()], 1)


def worker(rank: int, slots: dict, aside: bool = False) -> np.ndarray:
    transport = distributed(NUM, aside=Aside(torch.device("cpu")) if aside else None)
    found = rounds(transport, list(transport.hosted), slots).numpy()
    transport.close()
    return found


@pytest.mark.parametrize("name", SLOTS)
def test_hosting_does_not_matter(name):
    alone = rounds(InProcess(), list(range(NUM)), SLOTS[name]).numpy()
    together = np.concatenate(run_processes(worker, 2, SLOTS[name]))
    np.testing.assert_array_equal(together, alone)
    assert alone[:, LAYOUT.size].sum() > 0
    if "trigger" in SLOTS[name] and name not in ("tensors", "answered by all"):
        assert alone[:, LAYOUT.size].sum() < 2 * NUM * ROUNDS  # some are silent


@pytest.mark.parametrize("name", [name for name, slots in SLOTS.items() if "delay" in slots])
def test_what_goes_on_aside_has_the_same_bits(name):
    """As on a GPU, but for the stream: packing, sending, waiting and reading in another thread."""
    alone = rounds(InProcess(), list(range(NUM)), SLOTS[name]).numpy()
    np.testing.assert_array_equal(np.concatenate(run_processes(worker, 3, SLOTS[name], True)), alone)


def _fails(rank: int) -> str:
    transport = distributed(NUM, timeout=2.0, aside=Aside(torch.device("cpu")))
    if rank == 1:
        transport.leave(OSError("its disk is full"))
        return ""
    hosted = list(transport.hosted)
    with pytest.raises(ConnectionError) as error:
        transport.begin(0, {}, {}, {hosted[0]: [NUM - 1]}, {hosted[0]: [NUM - 1]})()
    transport.leave(error.value)
    return str(error.value)


def test_who_has_gone_meanwhile_is_named_where_the_exchange_is_waited_for():
    assert "its disk is full" in run_processes(_fails, 2)[0]
