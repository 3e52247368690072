"""What every topology promises, for every name, size and weight rule: one table, one set of assertions."""

import numpy as np
import pytest

import topologies
from topologies.catalogue import STATIC, TOPOLOGIES
from topologies.weights import RULES

FROM_FILES = {"edge_list", "graphml", "networkx", "contact_trace", "mobility_trace"}
NAMES = [name for name in TOPOLOGIES if name not in FROM_FILES]
EXPENSIVE = ("fdla", "fastest_mixing_chain", "link_reliability")
ROUNDS = (0, 1, 2, 7)
VARIANTS = [(name, dict(TOPOLOGIES[name].example)) for name in NAMES] + [
    ("exponential", {"symmetric": True}),
    ("edge_activation", {"p": 0.5, "base": "ring"}),
    ("encounters", {"p": 0.3, "reading": "matching"}),
    ("encounters", {"p": 0.3, "reading": "metropolis"}),
    ("pairwise_gossip", {"base": "star"}),
    ("edge_cycle", {"base": "tree"}),
    ("random_walk", {"base": "star", "moves": "uniform"}),
    ("base_graph", {"k": 2}),
    ("base_graph", {"k": 4}),
    ("grid_all_reduce", {"group_size": 3}),
    ("hierarchical", {"node_size": 2, "between": "ring", "every": 3}),
    ("hierarchical", {"node_size": 1, "between": {"name": "edge_activation", "p": 0.4}}),
    ("matcha", {"base": "complete", "budget": 0.3, "clip": True}),
    ("od_equidyn", {"eta": 1.0}),
    ("el_local", {"s": 1}),
    ("presence", {"base": {"name": "edge_activation", "p": 0.5}, "away": [[0, 0, 3], [0, 7]]}),
    ("presence", {"base": "hypercube_matching", "away": []}),
]
# What `name` cannot be built with, and the whole of it: everything else must build.
SIZES = {
    "wheel": lambda n: n >= 4,
    "complete_bipartite": lambda n: n >= 2,
    "torus": lambda n: n in (9, 12, 15, 16),
    "circular_ladder": lambda n: n >= 6 and n % 2 == 0,
    "hypercube": lambda n: n & (n - 1) == 0,
    "hypercube_matching": lambda n: n & (n - 1) == 0,
    "petersen": lambda n: n == 10,
    "karate_club": lambda n: n == 34,
    "davis_women": lambda n: n == 32,
    "margulis_gabber_galil": lambda n: n in (1, 4, 9, 16),
    "paley": lambda n: n in (5, 13, 17),
    "barbell": lambda n: n >= 4,
    "caveman": lambda n: n > 4 and any(n % m == 0 for m in range(2, n // 2 + 1)),
    "random_regular": lambda n: n >= 5,
    "small_world": lambda n: n >= 5,
    "barabasi_albert": lambda n: n >= 3,
    "stochastic_block": lambda n: n >= 2,
}


def can_be_built(name, params, n):
    if name == "grid_all_reduce":
        size = params.get("group_size", 2)
        return n in [size**d for d in range(6)]
    if name == "hierarchical":
        return n % params["node_size"] == 0
    if name in ("el_local", "el_oracle"):
        s = params.get("s", 2)
        return n == 1 or s < n
    if name == "presence":
        named = all(peer < n for peer, *_ in params["away"])
        return named and SIZES.get(params.get("base") if isinstance(params.get("base"), str) else "", lambda n: True)(n)
    return SIZES.get(name, lambda n: True)(n)


def build_all(name, params, weights="metropolis", sizes=range(1, 18)):
    sizes = sorted({*sizes, *([TOPOLOGIES[name].example_peers] if name in ("karate_club", "davis_women") else [])})
    for n in sizes:
        if can_be_built(name, params, n):
            yield topologies.build(name, n, weights=weights, seed=3, **params)
        else:
            with pytest.raises(ValueError, match=r"needs .*got"):
                topologies.build(name, n, weights=weights, seed=3, **params)


def check_matrix(topology, t, alive=None):
    W, n = topology.matrix(t, alive), topology.num_peers
    assert W.shape == (n, n) and W.dtype == np.float64 and np.isfinite(W).all()
    if topology.sums in ("doubly", "row"):
        np.testing.assert_allclose(W.sum(1), 1, atol=1e-12)
    if topology.sums in ("doubly", "column"):
        np.testing.assert_allclose(W.sum(0), 1, atol=1e-12)
    if topology.symmetric:
        assert (W == W.T).all() or np.abs(W - W.T).max() < 1e-14
    if topology.nonnegative:
        assert W.min() >= 0
    return W


def check_rows(topology, t, W, alive=None):
    """neighbors and receivers are the rows and columns of the matrix, to the bit; ascending, without zeros."""
    for i in range(topology.num_peers):
        row, dense = topology.neighbors(t, i, alive), np.zeros(topology.num_peers)
        assert list(row) == sorted(row) and all(row.values())
        dense[list(row)] = list(row.values())
        assert (dense == W[i]).all()
        assert topology.receivers(t, i, alive) == [j for j in np.flatnonzero(W[:, i]) if j != i]


def check_local_rows(topology, t, W, alive=None):
    """What large networks use, computed without the other rows, gives the same bits."""
    there = range(topology.num_peers) if alive is None else np.flatnonzero(alive)
    for i in map(int, there):
        assert topology._row(t, i, alive) == topology.neighbors(t, i, alive)
        assert topology._column(t, i, alive) == topology.receivers(t, i, alive)


def check_support(topology, t, W):
    graph = topology.graph(t)
    assert sorted(graph) == list(range(topology.num_peers))
    arcs = {(int(j), int(i)) for i, j in zip(*np.nonzero(W), strict=True) if i != j}
    both = arcs if graph.is_directed() else {(min(a), max(a)) for a in arcs}
    assert both <= {e if graph.is_directed() else (min(e), max(e)) for e in graph.edges()}
    for i in range(topology.num_peers):
        if graph.degree(i) == 0:
            assert W[i, i] == 1.0


@pytest.mark.parametrize("name, params", VARIANTS, ids=str)
def test_every_topology_with_its_default_weights(name, params):
    for topology in build_all(name, params):
        first = topology.matrix(0)
        for t in ROUNDS:
            W = check_matrix(topology, t)
            if topology.period == 1:
                assert (W == first).all()
                if t in ROUNDS[1:-1]:  # rows and columns of a static one: in the first round and the last
                    continue
            check_rows(topology, t, W)
            check_local_rows(topology, t, W)
            check_support(topology, t, W)


@pytest.mark.parametrize("name, params", VARIANTS, ids=str)
def test_every_topology_among_survivors(name, params):
    for topology in build_all(name, params, sizes=(1, 2, 5, 8, 9, 16)):
        rng = np.random.default_rng(topology.num_peers)
        for t in ROUNDS:
            alive = rng.random(topology.num_peers) < 0.6
            W = check_matrix(topology, t, alive)
            gone = np.flatnonzero(~alive)
            np.testing.assert_array_equal(W[gone], np.eye(topology.num_peers)[gone])
            np.testing.assert_array_equal(W[:, gone], np.eye(topology.num_peers)[:, gone])
            check_rows(topology, t, W, alive)
            if not alive.all():
                check_local_rows(topology, t, W, alive)
            np.testing.assert_array_equal(W, topology.matrix(t, np.flatnonzero(alive)))
            assert (topology.matrix(t, np.ones_like(alive)) == topology.matrix(t)).all()


@pytest.mark.parametrize("name, params", VARIANTS, ids=str)
def test_random_access_and_seeds(name, params):
    """W(9) is the same in whatever order rounds are asked for, and in another process that asks for it alone."""
    n = TOPOLOGIES[name].example_peers
    if not can_be_built(name, params, n):
        n = 9
    first, second = (topologies.build(name, n, seed=5, **params) for _ in range(2))
    walked = [first.matrix(t) for t in range(10)]
    assert (second.matrix(9) == walked[9]).all() and (second.matrix(0) == walked[0]).all()
    if first.period:
        assert (first.matrix(2 + first.period) == first.matrix(2)).all()
    np.random.seed(0)
    assert (second.matrix(4) == walked[4]).all()


def rule_params(rule, n):
    return {"rule": rule, "mass": list(range(1, n + 1))} if rule == "target" else {"rule": rule}


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "given"])
@pytest.mark.parametrize("name", [name for name in STATIC if name not in FROM_FILES])
def test_every_static_graph_with_every_rule(name, rule):
    small = (1, 2, 3, 4, 6, 8, 9, 10, 13, 16)
    params, expensive = dict(TOPOLOGIES[name].example), rule in EXPENSIVE
    for n in small[:8] if expensive else small:
        directed = name in ("directed_ring", "exponential")
        if not can_be_built(name, params, n):
            continue
        if directed and not RULES[rule][2] and rule != "metropolis":
            with pytest.raises(ValueError, match="needs an undirected graph"):
                topologies.build(name, n, weights=rule_params(rule, n), **params)
            continue
        topology = topologies.build(name, n, weights=rule_params(rule, n), **params)
        W = check_matrix(topology, 0)
        check_rows(topology, 0, W)
        check_local_rows(topology, 0, W)
        check_support(topology, 0, W)
        alive = np.arange(n) % 3 != 1
        check_matrix(topology, 0, alive)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("given", *EXPENSIVE)])
def test_every_rule_on_links_that_come_and_go(rule):
    for n in (1, 2, 3, 7, 10):
        topology = topologies.build("edge_activation", n, p=0.3, weights=rule_params(rule, n))
        for t in ROUNDS:
            W = check_matrix(topology, t)
            check_rows(topology, t, W)
            check_local_rows(topology, t, W)
            check_support(topology, t, W)
