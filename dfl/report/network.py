"""The graph of a run over time, from its recipe: links of each round, and what weight each peer gave the others."""

import numpy as np

from dfl.report import charts
from dfl.store.runs import RunData

# more peers are not drawn as a graph, more rounds only evenly thinned
MAX_PEERS, MAX_FRAMES = 128, 200


def rebuild(config: dict):
    """The topology of a recipe. ValueError where it cannot be built here."""
    from dfl.config import from_dict
    from dfl.config.topology import build_topology
    return build_topology(from_dict(config))


def network(run: RunData) -> tuple[list[dict], list[str]]:
    """The charts of a run's graph, and what has to be said where there are none."""
    rounds = [r["round"] for r in run.records if r["round"] > 0]
    if not rounds:
        return [], ["No round has been recorded, so there is no graph to show."]
    try:
        topology = rebuild(run.config)
        return _charts(run, topology, rounds), []
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        return [], [f"The graph could not be rebuilt from the recipe: {' '.join(str(error).split())}"]


def _charts(run: RunData, topology, rounds: list[int]) -> list[dict]:
    shown = charts.thin(rounds, MAX_FRAMES)
    if topology.period:
        shown = [t for t in rounds if t <= topology.period][:MAX_FRAMES] or shown[:1]
    num, total, frames, degrees = topology.num_peers, 0.0, [], []
    for t in shown:
        w = topology.matrix(t - 1)
        total = total + w
        degrees.append((w != 0).sum(1) - 1)
        frames.append(charts.frame(w) if num <= MAX_PEERS else "")
    found = []
    if num <= MAX_PEERS:
        found += [_graph(topology, shown, frames, rounds), _weights(total / len(shown), shown)]
    # a sequence that repeats is shown once and counted in every round
    again = {t: (t - 1) % topology.period for t in charts.thin(rounds)} if topology.period else {t: k for k, t in enumerate(shown)}
    counted = [t for t, k in again.items() if k < len(degrees)]
    found.append(_degrees(run, counted, np.array(degrees)[[again[t] for t in counted]]))
    return [chart for chart in found if chart]


def _graph(topology, shown: list[int], frames: list[str], rounds: list[int]) -> dict:
    from topologies.draw import positions
    place = positions(topology)
    repeats = {None: "", 1: " It is the same in every round."}.get(topology.period, f" It repeats after {topology.period} rounds.")
    thinned = f" {len(shown)} of {len(rounds)} rounds, evenly." if len(shown) < len(rounds) and not topology.period else ""
    arcs = "" if topology.symmetric else " A dot lies near the receiver."
    return {"kind": "graph", "title": "Who receives from whom, round by round", "peers": topology.num_peers,
            "directed": not topology.symmetric,
            "text": f"Topology {topology.name} on {topology.num_peers} peers. A line is a link with a weight in W(t); peers that "
                    f"receive from nobody are hollow.{arcs}{repeats}{thinned}",
            "positions": [[charts.clean(v) for v in place[i]] for i in range(topology.num_peers)], "rounds": shown, "frames": frames}


def _weights(mean: np.ndarray, shown: list[int]) -> dict | None:
    num = len(mean)
    others = mean[~np.eye(num, dtype=bool)]
    text = (f"Mean of W over {'one round' if len(shown) == 1 else f'{len(shown)} rounds'}. On average a peer keeps "
            f"{mean.diagonal().mean():.2f} for itself; "
            + (f"{(others == 0).mean():.0%} of all ordered pairs of peers never received from each other directly." if num > 1 else
               "there is only one peer."))
    peers = [f"peer {i}" for i in range(num)]
    return charts.heat("Weight given to each peer", text,
                       [charts.grid("mean weight", peers, peers, mean, row="receiver", column="sender", unit="weight")])


def _degrees(run: RunData, shown: list[int], degrees: np.ndarray) -> dict | None:
    alone = (degrees == 0).sum(1)
    messages = [(r["round"], r.get("edges")) for r in run.records if isinstance(r.get("edges"), int)]
    points = [(t, row.mean(), row.min(), row.max()) for t, row in zip(shown, degrees, strict=True)]
    text = (f"In a round a peer receives from {degrees.mean():.2f} others on average; in {(alone > 0).mean():.0%} of the rounds "
            "somebody receives from nobody. Messages are those that were sent.")
    lonely = charts.series("without a neighbour", list(zip(shown, alone, strict=True)))
    numbers = charts.series("neighbours", points)
    variants = [charts.variant("peers received from", "neighbours of a peer (mean, least to most)", [numbers]),
                charts.variant("peers without a neighbour", "peers", [lonely]),
                charts.variant("messages sent", "messages in the round", [charts.series("messages", messages)])]
    return charts.lines("Connectivity", text, variants)
