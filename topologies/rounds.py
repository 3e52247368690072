"""What a sequence costs and how long it needs to connect everybody: traffic and B-connectivity."""

from __future__ import annotations

from typing import NamedTuple

import networkx as nx
import numpy as np

from topologies.links import Links
from topologies.topology import Topology


class Traffic(NamedTuple):
    """Means over rounds. ``messages``: of all peers together; ``busiest``: most messages that one peer sends or gets."""

    messages: float
    busiest: float
    bytes_in_all: float
    bytes_of_busiest: float


def sampled(topology: Topology, rounds: int) -> range:
    """The rounds that stand for all: one period if that is not longer than ``rounds``."""
    return range(min(topology.period, rounds) if topology.period else rounds)


def traffic(topology: Topology, message_bytes: float = 1.0, rounds: int = 100) -> Traffic:
    """Bytes per round: one message of ``message_bytes`` for each non-zero W[i, j], i != j."""
    counts = np.array([_counts(topology, t) for t in sampled(topology, rounds)], dtype=np.float64).mean(axis=0)
    return Traffic(*map(float, (*counts, *(counts * message_bytes))))


def _counts(topology: Topology, t: int) -> tuple[int, int]:
    entries = topology.entries(t)
    used = entries.weight != 0.0
    n, sent, got = topology.num_peers, entries.links.sender[used], entries.links.receiver[used]
    return len(sent), max(np.bincount(sent, minlength=n).max(), np.bincount(got, minlength=n).max())


def b_connectivity(topology: Topology, rounds: int = 1000) -> int | None:
    """The least B such that the links of every B consecutive rounds together connect all peers (strongly, if directed).

    Periodic topologies are looked at for all starts, others for all windows within the first ``rounds``. None if there
    is a start from which everything seen does not connect; the last windows of a random sequence, which the end of the
    sample cuts short, do not count once a full window has been seen.
    """
    starts = topology.period or rounds
    horizon = 2 * starts if topology.period else rounds
    worst = 0
    for start in range(starts):
        length = _until_connected(topology, start, horizon)
        if length is None:
            return worst if worst and not topology.period and horizon - start <= worst else None
        worst = max(worst, length)
    return worst


def _until_connected(topology: Topology, start: int, horizon: int) -> int | None:
    n = topology.num_peers
    label, union = np.arange(n), nx.DiGraph()
    union.add_nodes_from(range(n))
    for t in range(start, horizon):
        links = topology.entries(t).links
        if not topology.symmetric:
            union.add_edges_from(zip(links.sender.tolist(), links.receiver.tolist(), strict=True))
            connected = nx.is_strongly_connected(union)
        else:  # contract what is connected already, then spread over the new links
            label = label[Links.from_arcs(n, label[links.sender], label[links.receiver]).components()[label]]
            connected = not label.any()
        if connected:
            return t - start + 1
    return None
