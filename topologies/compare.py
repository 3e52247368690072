"""Tables: every topology ranked by predicted time to consensus, and all that is known about one of them."""

from __future__ import annotations

import inspect
import math

from topologies import spectrum
from topologies.catalogue import TOPOLOGIES, build
from topologies.predict import DEFAULT, Network, predict
from topologies.registry import parameters
from topologies.rounds import b_connectivity
from topologies.topology import Topology


def candidates(num_peers: int, names=None, seed: int = 0, node_size: int = 1) -> list[tuple[str, dict, Topology]]:
    """(name, parameters, topology) of all that can be built on ``num_peers`` peers without a file."""
    found = []
    for name in names or TOPOLOGIES:
        if name not in TOPOLOGIES:
            raise ValueError(f"topology {name!r} is not known; known: {', '.join(TOPOLOGIES)}")
        params = dict(TOPOLOGIES[name].example)
        if name == "hierarchical" and node_size > 1:
            params["node_size"] = node_size
        try:
            found.append((name, params, build(name, num_peers, seed=seed, **params)))
        except ValueError:
            if names:  # asked for by name: say why it is not possible
                raise
    return found


def compare(num_peers: int, network: Network = DEFAULT, tolerance: float = 1e-3, names=None, seed: int = 0) -> list[dict]:
    """Ranked by predicted seconds to ``tolerance``; sequences without consensus, or that lose the mean, come last."""
    rows = []
    for name, params, topology in candidates(num_peers, names, seed, network.node_size):
        found = predict(topology, network, tolerance)
        rows.append(
            {
                "name": name,
                "parameters": params,
                "sums": topology.sums,
                "rounds": found.rounds if math.isfinite(found.rounds) else None,
                "seconds": found.seconds if math.isfinite(found.seconds) else None,
                "seconds_per_round": found.seconds_per_round,
                "rate": found.rate,
                "how": found.how,
                "messages_per_round": found.traffic.messages,
                "busiest_peer_messages": found.traffic.busiest,
                "bytes_to_consensus": found.rounds * found.traffic.bytes_in_all if math.isfinite(found.rounds) else None,
            }
        )
    return sorted(rows, key=lambda row: (row["sums"] != "doubly", row["seconds"] is None, row["seconds"] or 0.0))


def table(rows: list[dict]) -> str:
    """The comparison as text."""
    lines = ["    topology                rounds   seconds    rate msgs/round busiest MB in all  found by"]
    for rank, row in enumerate(rows, 1):
        rounds, seconds = ("never", "never") if row["rounds"] is None else (f"{row['rounds']:.0f}", f"{row['seconds']:.3g}")
        megabytes = "-" if row["bytes_to_consensus"] is None else f"{row['bytes_to_consensus'] / 1e6:.4g}"
        note = "" if row["sums"] == "doubly" else f"; {row['sums']}-stochastic, the mean moves"
        lines.append(
            f"{rank:3} {row['name']:22} {rounds:>7} {seconds:>9} {row['rate']:7.4f} {row['messages_per_round']:10.4g} "
            f"{row['busiest_peer_messages']:7.3g} {megabytes:>9}  {row['how']}{note}"
        )
    return "\n".join(lines)


def about(name: str) -> dict:
    """What the catalogue says of a name: one line, its documentation, its parameters with defaults."""
    entry = TOPOLOGIES[name]
    wrapped = inspect.unwrap(entry.factory)
    given = {p.name: "required" if p.default is p.empty else p.default for p in parameters(entry.factory).values()}
    return {"name": name, "about": entry.about, "documentation": inspect.getdoc(wrapped) or "", "parameters": given}


def facts(topology: Topology, rounds: int = 200) -> dict:
    """What is known of a built topology, as JSON values."""
    exact, contraction = spectrum.finite_time(topology), spectrum.contraction_estimate(topology, rounds)
    static = topology.period == 1
    found = predict(topology, rounds=rounds)
    return {
        "num_peers": topology.num_peers,
        "sums": topology.sums,
        "symmetric": topology.symmetric,
        "period": topology.period,
        "slem": spectrum.slem(topology) if static else None,
        "spectral_gap": spectrum.spectral_gap(topology) if static else None,
        "contraction": contraction.value,
        "contraction_standard_error": contraction.standard_error,
        "contraction_how": contraction.how,
        "product_rate": spectrum.product_rate(topology, rounds),
        "exact_after_rounds": exact.rounds if exact else None,
        "exact_from_any_start": exact.from_any_start if exact else None,
        "effective_neighbors_at_0.9": spectrum.effective_neighbors(topology, 0.9) if static else None,
        "mixing_time_bound": _finite(spectrum.mixing_time(topology)) if static else None,
        "b_connectivity": b_connectivity(topology, rounds),
        "messages_per_round": found.traffic.messages,
        "busiest_peer_messages": found.traffic.busiest,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
