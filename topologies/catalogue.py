"""All names in one table, and ``build``: from a name to a topology, with every refusal before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral

import networkx as nx

from topologies import circulant, files, graphs, random_graphs, sequences
from topologies import weights as weight_rules
from topologies.circulant import Circulant
from topologies.links import Lattice, Links
from topologies.mixing import Rule
from topologies.registry import Entry, call, takes
from topologies.topology import LazyTopology, StaticTopology, Topology


def exponential(num_peers: int, *, symmetric: bool = False) -> Circulant | Lattice:
    """i sends to i + 2^k for all 2^k < n; with ``symmetric``, and back (Ying et al. 2021, arXiv 2110.13363)."""
    steps = [2**k for k in range((num_peers - 1).bit_length())]
    if symmetric:
        return Lattice((num_peers,), [(sign * step,) for step in steps for sign in (1, -1)])
    return Circulant(num_peers, steps)


def directed_ring(num_peers: int) -> Circulant:
    """i sends to i + 1."""
    return Circulant(num_peers, [1])


STATIC: dict[str, Entry] = {
    **graphs.GRAPHS,
    "directed_ring": Entry(directed_ring, "each peer sends to the next one"),
    "exponential": Entry(exponential, "i sends to i + 2^k for every k, directed (symmetric)"),
    **random_graphs.RANDOM_GRAPHS,
    **files.FILES,
}
TOPOLOGIES: dict[str, Entry] = {**STATIC, **sequences.SEQUENCES}


def names() -> list[str]:
    """The names that ``build`` takes: static graphs first, then sequences."""
    return list(TOPOLOGIES)


def describe() -> dict[str, str]:
    """Name to a one-line description, for every topology."""
    return {name: entry.about for name, entry in TOPOLOGIES.items()}


def static_graph(spec, num_peers: int, seed: int = 0, allow_disconnected: bool = False) -> Links | Lattice | Circulant:
    """A graph from a name, ``{"name": name, **parameters}`` or a networkx graph; refused when not connected."""
    if isinstance(spec, nx.Graph):
        spec = {"name": "networkx", "graph": spec}
    params = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = params.pop("name", None)
    if not isinstance(name, str) or name not in STATIC:
        raise ValueError(f"graph {name!r} is not known; static graphs: {', '.join(STATIC)}")
    factory, seed = STATIC[name].factory, params.pop("graph_seed", seed)
    allow_disconnected = params.pop("allow_disconnected", allow_disconnected)
    graph = call(name, factory, num_peers, params, seed=seed, allow_disconnected=allow_disconnected)
    if isinstance(graph, Links) and not allow_disconnected and not takes(factory, "allow_disconnected"):
        _refuse_disconnected(name, graph)
    return graph


def _refuse_disconnected(name: str, links: Links) -> None:
    if not links.is_connected():
        alone = int((links.in_degree == 0).sum())
        kind = "strongly connected" if links.directed else "connected"
        raise ValueError(
            f"topology {name!r} is not {kind} ({len(links.sender)} arcs, {alone} of {links.num_peers} peers receive from nobody), "
            "so consensus cannot be reached; say allow_disconnected=True if that is wanted"
        )


def build(name: str, num_peers: int, *, weights="metropolis", seed: int = 0, **params) -> Topology:
    """The topology ``name`` on ``num_peers`` peers.

    ``weights``: a rule's name, or {"rule": name, **parameters}; sequences that define their own W take the default and
    "lazy". ``seed`` seeds the rounds and, unless ``graph_seed`` is given, a random static graph.
    ``allow_disconnected=True`` takes graphs on which consensus is impossible. ValueError for everything else.

    >>> build("one_peer_exponential", 8).neighbors(1, 0)
    {0: 0.5, 6: 0.5}
    """
    if isinstance(name, Mapping):
        name, params = (spec := dict(name)).pop("name", None), {**spec, **params}
    if not isinstance(name, str) or name not in TOPOLOGIES:
        raise ValueError(f"topology {name!r} is not known; known: {', '.join(TOPOLOGIES)}")
    _check_counts(num_peers, seed)
    rule = weight_rules.make(weights)
    topology = (_static if name in STATIC else _sequence)(name, int(num_peers), rule, int(seed), params)
    topology.name = name
    return topology


def _check_counts(num_peers, seed) -> None:
    if isinstance(num_peers, bool) or not isinstance(num_peers, Integral) or num_peers < 1:
        raise ValueError(f"num_peers must be an integer of at least 1, got {num_peers!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}")


def _static(name: str, num_peers: int, rule: Rule, seed: int, params: Mapping) -> Topology:
    return _still(name, static_graph({"name": name, **params}, num_peers, seed), rule)


def _still(name: str, graph: Links | Lattice | Circulant, rule: Rule) -> Topology:
    if isinstance(graph, Circulant) and rule.name in ("metropolis", "lazy"):
        return _own_weights(name, rule, circulant.equal_weights(name, graph))
    return StaticTopology(name, graph, rule)


def _sequence(name: str, num_peers: int, rule: Rule, seed: int, params: Mapping) -> Topology:
    factory, params = TOPOLOGIES[name].factory, dict(params)
    graph_seed, disconnected = params.pop("graph_seed", seed), params.pop("allow_disconnected", False)

    def base(spec, count):
        return static_graph(spec, count, graph_seed, disconnected)

    def inner(spec, count, weights="metropolis"):
        return build(spec, count, weights=weights, seed=seed)

    topology = call(name, factory, num_peers, params, rule=rule, seed=seed, static_graph=base, build=inner)
    if isinstance(topology, Links | Lattice | Circulant):  # a factory of another package that makes a graph
        if isinstance(topology, Links) and not disconnected:
            _refuse_disconnected(name, topology)
        return _still(name, topology, rule)
    return topology if takes(factory, "rule") else _own_weights(name, rule, topology)


def _own_weights(name: str, rule: Rule, topology: Topology) -> Topology:
    if rule.name == "lazy":
        return LazyTopology(topology)
    if rule.name != "metropolis":
        raise ValueError(f"topology {name!r} defines its own weights: weights can be 'metropolis' or 'lazy', got {rule.name!r}")
    return topology
