"""How many rounds, and how many seconds, a topology takes to agree: prediction, and simulation to hold it against."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from topologies import spectrum
from topologies.rounds import Traffic, sampled, traffic
from topologies.topology import Topology


class Network(NamedTuple):
    """Bytes and seconds: what a message weighs and how fast it travels. Peers of one node of ``node_size`` talk at
    ``node_bandwidth``. Links are full duplex; a peer's messages share its own link."""

    message_bytes: float = 1e6
    bandwidth: float = 1.25e8
    latency: float = 1e-3
    node_size: int = 1
    node_bandwidth: float = math.inf


DEFAULT = Network()


class Prediction(NamedTuple):
    """``rate``: factor by which |x - mean| shrinks a round in the long run; ``rounds`` and ``seconds`` to tolerance."""

    rate: float
    how: str
    rounds: float
    seconds: float
    seconds_per_round: float
    traffic: Traffic


def rate(topology: Topology, rounds: int = 200) -> tuple[float, str]:
    """(factor a round, how it was found); for random sequences that of the root of E|x - mean|^2."""
    if topology.period == 1:
        found = spectrum.slem(topology)
        return (found, "SLEM") if found > 1e-12 else (0.0, "exact after 1 round")
    exact = spectrum.finite_time(topology) if topology.period else None
    if exact:
        return 0.0, f"exact after {exact.rounds} rounds"
    if topology.period and topology.period * topology.num_peers**3 < spectrum.AFFORDABLE:
        return spectrum.cycle_rate(topology), "product over the period"
    estimate = spectrum.contraction_estimate(topology, rounds)
    return math.sqrt(max(0.0, estimate.value)), f"contraction, {estimate.how}"


def predict(topology: Topology, network: Network = DEFAULT, tolerance: float = 1e-3, rounds: int = 200) -> Prediction:
    """``rounds``: how many are sampled where no closed form is known. Infinite when there is no consensus."""
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
    factor, how = rate(topology, rounds)
    needed = _rounds(topology, factor, tolerance)
    per_round = seconds_per_round(topology, network, rounds)
    cost = traffic(topology, network.message_bytes, min(rounds, 100))
    return Prediction(factor, how, needed, needed * per_round, per_round, cost)


def _rounds(topology: Topology, factor: float, tolerance: float) -> float:
    if factor >= 1 - 1e-12:
        return math.inf
    if factor > 1e-12:
        return float(math.ceil(math.log(tolerance) / math.log(factor)))
    exact = spectrum.finite_time(topology)
    return float(exact.rounds if exact else 1)


def seconds_per_round(topology: Topology, network: Network, rounds: int = 100) -> float:
    """Mean over rounds of the slowest peer's latency and transfer."""
    return float(np.mean([_round_seconds(topology, network, t) for t in sampled(topology, min(rounds, 100))]))


def _round_seconds(topology: Topology, network: Network, t: int) -> float:
    entries, n = topology.entries(t), topology.num_peers
    used = entries.weight != 0.0
    sender, receiver = entries.links.sender[used], entries.links.receiver[used]
    if not len(sender):
        return 0.0
    inside = sender // network.node_size == receiver // network.node_size
    busy = sum(
        np.maximum(np.bincount(sender[which], minlength=n), np.bincount(receiver[which], minlength=n)) / speed
        for which, speed in ((~inside, network.bandwidth), (inside, network.node_bandwidth if network.node_size > 1 else 1.0))
    )
    return float(network.latency + busy.max() * network.message_bytes)


class Simulation(NamedTuple):
    """``distance``: (rounds + 1,) root mean square of |x - mean| relative to the start, over columns and runs;
    ``measured``: its factor a round over the second half; ``exact_after``: first round at rounding error, or None."""

    distance: np.ndarray
    measured: float
    exact_after: int | None


def simulate(build, rounds: int = 50, runs: int = 1, columns: int = 64, seed: int = 0, inner=None) -> Simulation:
    """Pure averaging of Gaussian columns. ``build(seed)`` gives the topology of a run; ``inner(entries, x)`` is what
    happens in a round, W x by default. Distance is to the current mean, which a doubly stochastic W keeps."""
    squares = np.zeros(rounds + 1)
    for run in range(runs):
        topology = build(seed + run)
        x = np.random.default_rng([seed, run]).standard_normal((topology.num_peers, columns))
        for t in range(rounds + 1):
            squares[t] += ((x - x.mean(axis=0)) ** 2).sum()
            entries = topology.entries(t)
            x = entries.apply(x) if inner is None else inner(entries, x)
    distance = np.sqrt(squares / squares[0]) if squares[0] else np.zeros(rounds + 1)
    return Simulation(distance, *_read(distance))


def _read(distance: np.ndarray) -> tuple[float, int | None]:
    rounding = np.flatnonzero(distance < 1e-12)
    exact = int(rounding[0]) if len(rounding) else None
    last = len(distance) - 1 if exact is None else exact - 1
    first = last // 2
    if last <= first:
        return 0.0, exact
    return float((distance[last] / distance[first]) ** (1.0 / (last - first))), exact
