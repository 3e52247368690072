"""Graphs, time-varying sequences, mixing weights and their spectra, for gossip on n peers.

>>> import topologies
>>> ring = topologies.build("ring", 4)
>>> ring.neighbors(0, 1)
{0: 0.3333333333333333, 1: 0.33333333333333337, 2: 0.3333333333333333}
"""

from __future__ import annotations

import inspect

from topologies import graphs, sequences, spectrum
from topologies import weights as weight_rules
from topologies.topology import StaticTopology, Topology

__all__ = ["Topology", "build", "describe", "names", "spectrum"]


def _edge_activation(num_peers, rule, seed, *, p, base="complete", **base_params):
    return sequences.EdgeActivation(_graph(base, num_peers, base_params), rule, p=p, seed=seed)


def _one_peer_exponential(num_peers, rule, seed):
    return sequences.OnePeerExponential(num_peers, rule)


SEQUENCES = {
    "edge_activation": (_edge_activation, "each link of a base graph on with probability p, afresh every round (p, base)"),
    "one_peer_exponential": (_one_peer_exponential, "round t: i sends to i + 2^(t mod log2 n); exact for n = 2^k"),
}


def describe() -> dict[str, str]:
    """Name to a one-line description, for every topology."""
    return {name: about for name, (_, about) in sorted({**graphs.GRAPHS, **SEQUENCES}.items())}


def names() -> list[str]:
    """The names that ``build`` takes, sorted."""
    return list(describe())


def build(name: str, num_peers: int, *, weights: str = "metropolis", seed: int = 0, **params) -> Topology:
    """The topology ``name`` on ``num_peers`` peers. ValueError for unknown names, parameters and impossible sizes."""
    if name not in describe():
        raise ValueError(f"topology {name!r} is not known; known: {', '.join(names())}")
    if isinstance(num_peers, bool) or int(num_peers) != num_peers or num_peers < 1:
        raise ValueError(f"num_peers must be an integer of at least 1, got {num_peers!r}")
    rule = _rule(weights)
    if name in SEQUENCES:
        return _call(name, SEQUENCES[name][0], (int(num_peers), rule, int(seed)), params)
    return StaticTopology(name, _graph(name, int(num_peers), params), rule)


def _rule(name):
    return weight_rules.rule(name)


def _graph(name, num_peers, params):
    if name not in graphs.GRAPHS:
        raise ValueError(f"base={name!r} is not a static graph; known: {', '.join(sorted(graphs.GRAPHS))}")
    return _call(name, graphs.GRAPHS[name][0], (num_peers,), params)


def _call(name, factory, args, params):
    """Checks the parameters by the factory's own signature before it is called."""
    signature = inspect.signature(factory).parameters.values()
    known = [p.name for p in signature if p.kind is p.KEYWORD_ONLY]
    needed = [p.name for p in signature if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature)
    for param in params:
        if param not in known and not open_ended:
            raise ValueError(f"topology {name!r} has no parameter {param!r}; it takes: {', '.join(known) or 'none'}")
    for param in needed:
        if param not in params:
            raise ValueError(f"topology {name!r} needs the parameter {param!r}")
    return factory(*args, **params)
