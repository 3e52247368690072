"""Random static graphs, redrawn until connected. ``RANDOM_GRAPHS`` lists them; all are functions of (seed, parameters)."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import networkx as nx
import numpy as np

from topologies.links import Links
from topologies.randomness import generator
from topologies.registry import Entry, refuse

TRIES = 1000


def redrawn(draw):
    """Draws with fresh generators until the graph is connected; ``Links.draw`` tells which one was taken."""

    @functools.wraps(draw)
    def until_connected(num_peers, *, seed=0, allow_disconnected=False, **params):
        for attempt in range(TRIES):
            links = draw(num_peers, generator(seed, attempt, "graph"), **params)
            if allow_disconnected or links.is_connected():
                return replace(links, draw=attempt)
        hint = "make it denser or say allow_disconnected=True"
        raise refuse(draw.__name__, f"a connected graph, which {TRIES} draws did not give", f"{num_peers=}, {params}", hint)

    own = [p for name, p in inspect.signature(draw).parameters.items() if name != "rng"]
    extra = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("seed", "allow_disconnected")]
    until_connected.__signature__ = inspect.Signature([*own, *extra])
    return until_connected


def pairs(num_peers: int, probability, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each pair i < j kept with its probability: a number, or a function of (i, j). One row of pairs at a time."""
    kept = []
    for i in range(num_peers - 1):
        j = np.arange(i + 1, num_peers)
        chance = probability(i, j) if callable(probability) else probability
        kept.append(np.stack([np.full(len(j), i), j])[:, rng.random(len(j)) < chance])
    return tuple(np.concatenate(kept, axis=1)) if kept else (np.empty(0, dtype=np.int64),) * 2


def erdos_renyi(num_peers: int, rng, *, p: float) -> Links:
    """Each pair linked with probability p (Gilbert 1959)."""
    _probability("erdos_renyi", "p", p)
    return Links.from_arcs(num_peers, *pairs(num_peers, p, rng))


def random_geometric(num_peers: int, rng, *, radius: float = 0.4) -> Links:
    """Uniform points of the unit square, linked below a distance."""
    if not radius > 0:
        raise refuse("random_geometric", "radius above 0", radius)
    place = rng.random((num_peers, 2))

    def near(i, j):
        return (np.hypot(*(place[j] - place[i]).T) < radius).astype(float)

    return Links.from_arcs(num_peers, *pairs(num_peers, near, rng))


def stochastic_block(num_peers: int, rng, *, blocks: int = 2, p_in: float = 0.8, p_out: float = 0.1) -> Links:
    """Consecutive blocks of (nearly) equal size; links inside with p_in, between with p_out (Holland et al. 1983)."""
    if not 1 <= blocks <= num_peers:
        raise refuse("stochastic_block", "blocks between 1 and num_peers", f"blocks={blocks}, num_peers={num_peers}")
    _probability("stochastic_block", "p_in", p_in)
    _probability("stochastic_block", "p_out", p_out)
    block = np.arange(num_peers) * blocks // num_peers
    return Links.from_arcs(num_peers, *pairs(num_peers, lambda i, j: np.where(block[i] == block[j], p_in, p_out), rng))


def random_regular(num_peers: int, rng, *, degree: int = 4) -> Links:
    """Every peer with ``degree`` others, uniformly; n x degree even."""
    if not 0 <= degree < max(num_peers, 1) or num_peers * degree % 2:
        got = f"degree={degree}, num_peers={num_peers}"
        raise refuse("random_regular", "0 <= degree < num_peers and num_peers x degree even", got)
    return Links.from_networkx(nx.random_regular_graph(degree, num_peers, seed=_number(rng)))


def small_world(num_peers: int, rng, *, degree: int = 4, p: float = 0.2) -> Links:
    """A ring of ``degree`` nearest neighbours, each link rewired with probability p (Watts, Strogatz 1998)."""
    if not 2 <= degree < num_peers or degree % 2:
        got = f"degree={degree}, num_peers={num_peers}"
        raise refuse("small_world", "an even degree of at least 2 and below num_peers", got)
    _probability("small_world", "p", p)
    return Links.from_networkx(nx.watts_strogatz_graph(num_peers, degree, p, seed=_number(rng)))


def barabasi_albert(num_peers: int, rng, *, m: int = 2) -> Links:
    """Each newcomer links to m peers in proportion to their degrees (Barabasi, Albert 1999); n > m."""
    if not 1 <= m < num_peers:
        raise refuse("barabasi_albert", "1 <= m < num_peers", f"m={m}, num_peers={num_peers}")
    return Links.from_networkx(nx.barabasi_albert_graph(num_peers, m, seed=_number(rng)))


def random_tree(num_peers: int, rng) -> Links:
    """A uniform labelled tree, from a random Pruefer sequence."""
    if num_peers <= 2:
        return Links.from_arcs(num_peers, np.arange(num_peers - 1), np.arange(1, num_peers))
    return Links.from_networkx(nx.from_prufer_sequence(rng.integers(num_peers, size=num_peers - 2).tolist()))


def _probability(name: str, param: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise refuse(name, f"{param} in [0, 1]", value)


def _number(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


RANDOM_GRAPHS: dict[str, Entry] = {
    "erdos_renyi": Entry(redrawn(erdos_renyi), "each pair linked with probability p, fixed over rounds (p)", {"p": 0.3}),
    "random_geometric": Entry(redrawn(random_geometric), "points of the unit square linked below a distance (radius)"),
    "random_regular": Entry(redrawn(random_regular), "every peer with `degree` random others (degree)"),
    "small_world": Entry(redrawn(small_world), "Watts-Strogatz: a ring lattice with rewired links (degree, p)"),
    "barabasi_albert": Entry(redrawn(barabasi_albert), "preferential attachment: a few hubs (m)"),
    "stochastic_block": Entry(redrawn(stochastic_block), "communities (blocks, p_in, p_out)"),
    "random_tree": Entry(redrawn(random_tree), "a uniform random tree"),
}
