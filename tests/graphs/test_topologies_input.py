"""What users get wrong: every defect is one ValueError that names the field, the value and what is allowed."""

import networkx as nx
import numpy as np
import pytest

import topologies

REFUSED = [
    (("rign", 4), {}, "known: path, ring"),
    (("ring", 0), {}, "num_peers must be an integer of at least 1, got 0"),
    (("ring", 2.5), {}, "num_peers must be an integer"),
    (("ring", True), {}, "num_peers must be an integer"),
    (("ring", 4), {"q": 1}, "no parameter 'q'; it takes: none"),
    (("ring", 4), {"weights": "metro"}, "weights='metro' is not known; known: metropolis"),
    (("ring", 4), {"weights": {"rule": "target"}}, "needs mass"),
    (("ring", 4), {"weights": {"rule": "target", "mass": [1, 2]}}, "got mass for 2 peers, the topology has 4"),
    (("ring", 2), {"weights": {"rule": "target", "mass": [1, -2]}}, "positive finite"),
    (("ring", 2), {"weights": {"rule": "metropolis", "x": 1}}, "no parameter 'x'"),
    (("ring", 4), {"weights": {"rule": "link_reliability", "success": 1.5}}, "probability"),
    (("ring", 4), {"weights": {"rule": "sinkhorn", "affinity": [[1, float("nan")], [0, 1]]}}, "finite non-negative"),
    (("star", 4), {"weights": {"rule": "sinkhorn", "own_affinity": 0.0}}, "cannot be satisfied"),
    (("ring", 4), {"weights": "given"}, "carry numbers"),
    (("ring", 4), {"seed": -1}, "seed must be an integer of at least 0"),
    (("torus", 10), {}, r"needs num_peers = rows x columns with both at least 3, got num_peers=10; try 9 or 12"),
    (("torus", 12), {"rows": 5}, "rows=5"),
    (("hypercube", 6), {}, "num_peers = 2\\^d, got 6; try 4 or 8"),
    (("hypercube_matching", 12), {}, "try 8 or 16"),
    (("grid_all_reduce", 10), {"group_size": 3}, "try 9 or 27"),
    (("grid_all_reduce", 8), {"group_size": 0}, "group_size of at least 2"),
    (("grid_all_reduce", 8), {"group_size": -1}, "group_size of at least 2"),
    (("grid_all_reduce", 8), {"group_size": 1}, "group_size of at least 2"),
    (("d_equistatic", 8), {"num_shifts": 10**9}, "num_shifts from 1 to 100,000"),
    (("matcha", 8), {"matchings": 0}, "list of lists of pairs"),
    (("hierarchical", 10), {"node_size": 4}, "divides num_peers"),
    (("hierarchical", 8), {}, "needs the parameter 'node_size'"),
    (("hierarchical", 12), {"node_size": 4, "between": "hypercube_matching"}, "try 2 or 4"),
    (("paley", 16), {}, "try 13 or 17"),
    (("margulis_gabber_galil", 10), {}, "try 9 or 16"),
    (("karate_club", 8), {}, "num_peers=34"),
    (("edge_activation", 4), {}, "needs the parameter 'p'"),
    (("edge_activation", 4), {"p": 1.5}, "p in \\[0, 1\\], got 1.5"),
    (("edge_activation", 4), {"p": 0.5, "base": "random_matching"}, "static graphs: path"),
    (("edge_activation", 4), {"p": 0.5, "base": {"name": "torus"}}, "torus"),
    (("encounters", 4), {"reading": "often"}, "'sequential'"),
    (("erdos_renyi", 30), {"p": 0.001}, "connected graph, which 1000 draws did not give"),
    (("random_regular", 5), {"degree": 3}, "num_peers x degree even"),
    (("one_peer_exponential", 8), {"weights": "fdla"}, "defines its own weights"),
    (("exponential", 8), {"weights": "fdla"}, "needs an undirected graph"),
    (("matcha", 8), {"budget": 0}, "budget in \\(0, 1\\]"),
    (("matcha", 4), {"matchings": [[(0, 1), (1, 2)]]}, "none twice"),
    (("matcha", 4), {"matchings": [[(0, 1)], [(2, 3)]]}, "connect all peers"),
    (("el_local", 4), {"s": 4}, "1 <= s < num_peers"),
    (("base_graph", 4), {"k": 0}, "at least 1"),
    (("erdos_renyi", 4), {"p": "often"}, "'erdos_renyi': p must be a number, got 'often'"),
    (("base_graph", 4), {"k": 1.5}, "k must be an integer, got 1.5"),
    (("base_graph", 4), {"k": True}, "k must be an integer, got True"),
    (("torus", 12), {"rows": "three"}, "rows must be an integer"),
    (("edge_list", 4), {"path": 7}, "path must be text"),
    (("matcha", 4), {"clip": 1}, "clip must be true or false"),
    ((["ring"], 4), {}, "known: path, ring"),
    (("ring", 4), {"weights": ["metropolis"]}, "is not known"),
    (("edge_activation", 4), {"p": 0.5, "base": ["ring"]}, "static graphs: path"),
    (("ring", "four"), {}, "num_peers must be an integer"),
    (("ring", 4), {"seed": "x"}, "seed must be an integer"),
    (("ring", 2), {"weights": {"rule": "target", "mass": ["a", 1]}}, "mass to be numbers"),
    (("ring", 2), {"weights": {"rule": "sinkhorn", "own_affinity": "a"}}, "own_affinity must be a number"),
    (("ring", 2), {"weights": {"rule": "sinkhorn", "affinity": [[1, 2], [1]]}}, "rows of equal length"),
    (("edge_activation", 4), {"p": float("nan")}, "p in"),
    (("random_geometric", 4), {"radius": float("nan")}, "radius above 0"),
    (("edge_list", 4), {"path": "nowhere.txt"}, "path to be a file"),
]


@pytest.mark.parametrize("args, options, message", REFUSED, ids=lambda value: str(value)[:40])
def test_refusals(args, options, message):
    with pytest.raises(ValueError, match=message):
        topologies.build(*args, **options).matrix(0)


FILES = [
    ("0 1\n1 1\n1 2", "self loop 1 - 1"),
    ("0 1\n1 0\n1 2", "edge 1 - 0 is there twice"),
    ("0 1\n1 2\n2 7", "peer 7 is not one of 0..2"),
    ("0 1\n1 x", "line 2: a peer id must be an integer"),
    ("0 1\n1 2 nan", "weight must be finite"),
    ("0 1 inf\n1 2 1", "weight must be finite"),
    ("0 1 0.1\n1 2 -1", "at least 0"),
    ("0 1 0.1\n1 2", "some lines have a weight and some have none"),
    ("0 1 2 3", "at most a weight"),
    ("0 1", "not connected .*allow_disconnected=True"),
    ("", "not connected"),
]


@pytest.mark.parametrize("text, message", FILES)
def test_defects_of_edge_lists(tmp_path, text, message):
    path = tmp_path / "edges.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        topologies.build("edge_list", 3, path=str(path))


def test_edge_lists(tmp_path):
    path = tmp_path / "edges.txt"
    path.write_text("# a path\n0 1 0.5\n1,2,0.25\n\n")
    plain = topologies.build("edge_list", 3, path=str(path))
    assert (plain.matrix(0) == topologies.build("path", 3).matrix(0)).all()
    given = topologies.build("edge_list", 3, path=str(path), weights="given")
    assert given.neighbors(0, 1) == {0: 0.5, 1: 0.25, 2: 0.25}
    directed = topologies.build("edge_list", 3, path=str(path), directed=True, allow_disconnected=True, weights="uniform")
    assert directed.neighbors(0, 1) == {0: 0.5, 1: 0.5} and directed.graph(0).is_directed()
    with pytest.raises(ValueError, match="not strongly connected"):
        topologies.build("edge_list", 3, path=str(path), directed=True, weights="uniform")
    path.write_text("0 1 0.8\n1 2 0.8\n")
    with pytest.raises(ValueError, match="peer 1 gives to others sums to 1.6"):
        topologies.build("edge_list", 3, path=str(path), weights="given").matrix(0)


def test_disconnected_graphs_are_taken_when_asked_for():
    graph = nx.Graph([(0, 1), (2, 3)])
    with pytest.raises(ValueError, match="not connected"):
        topologies.build("networkx", 4, graph=graph)
    for rule in ("metropolis", "fdla", "best_constant", "sinkhorn", "laplacian"):
        W = topologies.build("networkx", 4, graph=graph, allow_disconnected=True, weights=rule).matrix(0)
        np.testing.assert_allclose(W.sum(0), 1, atol=1e-12)
        assert W[0, 2] == 0
    assert topologies.build("erdos_renyi", 12, p=0.01, allow_disconnected=True).matrix(0).shape == (12, 12)
    assert topologies.build("edge_activation", 4, p=1.0, base=graph, allow_disconnected=True).matrix(0)[0, 1] == 0.5


def test_networkx_graphs_and_graphml(tmp_path):
    graph = nx.Graph([("b", "a"), ("b", "c")])
    topology = topologies.build("networkx", 3, graph=graph)
    assert sorted(topology.graph(0).edges()) == [(0, 1), (1, 2)]
    assert topologies.build("edge_activation", 3, p=1.0, base=graph).neighbors(0, 0).keys() == {0, 1}
    nx.write_graphml(graph, tmp_path / "g.graphml")
    loaded = topologies.build("graphml", 3, path=str(tmp_path / "g.graphml"))
    assert (loaded.matrix(0) == topology.matrix(0)).all()
    (tmp_path / "bad.graphml").write_text("<graphml")
    for bad, message in (
        (lambda: topologies.build("graphml", 3, path=str(tmp_path / "bad.graphml")), "not readable as GraphML"),
        (lambda: topologies.build("networkx", 3, graph=nx.MultiGraph([(0, 1), (0, 1), (1, 2)])), "there twice"),
        (lambda: topologies.build("networkx", 2, graph=nx.Graph([(0, 0), (0, 1)])), "self loop"),
        (lambda: topologies.build("networkx", 5, graph=graph), "3 nodes, but num_peers=5"),
        (lambda: topologies.build("networkx", 5, graph="ring"), "to be a networkx graph, got str"),
        (lambda: topologies.build("networkx", 2, graph=nx.Graph([(0, 1, {"weight": -1})])), "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_relabelling_peers_relabels_W():
    graph, order = nx.karate_club_graph(), np.random.default_rng(0).permutation(34)
    graph = nx.Graph(graph.edges())
    moved = nx.relabel_nodes(graph, dict(enumerate(order.tolist())))
    for rule in ("metropolis", "metropolis_tight", "lazy", "max_degree", "best_constant", "laplacian", "sinkhorn", "uniform"):
        W, V = (topologies.build("networkx", 34, graph=g, weights=rule).matrix(0) for g in (graph, moved))
        np.testing.assert_allclose(V[np.ix_(order, order)], W, atol=1e-12)


def test_traces(tmp_path):
    contacts = tmp_path / "contacts.csv"
    contacts.write_text("start,end,i,j\n0,2,0,1\n1,3,1,2\n")
    topology = topologies.build("contact_trace", 3, path=str(contacts))
    assert [sorted(topology.graph(t).edges()) for t in range(4)] == [[(0, 1)], [(0, 1), (1, 2)], [(1, 2)], [(0, 1)]]
    assert topology.period == 3
    coarse = topologies.build("contact_trace", 3, path=str(contacts), seconds=3)
    assert sorted(coarse.graph(0).edges()) == [(0, 1), (1, 2)] and coarse.period == 1
    moving = tmp_path / "positions.csv"
    moving.write_text("time node x y\n0 0 0 0\n0 1 3 0\n5 1 30 0\n5 2 30 4\n")
    topology = topologies.build("mobility_trace", 3, path=str(moving), radius=5)
    assert [sorted(topology.graph(t).edges()) for t in range(2)] == [[(0, 1)], [(1, 2)]]
    assert topologies.build("mobility_trace", 3, path=str(moving), radius=5, seconds=1).period == 6
    for text, message in (
        ("0,2,0\n", "expected start, end, i, j"),
        ("2,0,0,1\n", "ends before it starts"),
        ("0,2,1,1\n", "of a peer with itself"),
        ("0,2,0,9\n", "peer 9 is not one of 0..2"),
        ("0,inf,0,1\n", "finite"),
        ("start,end,i,j\n", "no line with"),
    ):
        contacts.write_text(text)
        with pytest.raises(ValueError, match=message):
            topologies.build("contact_trace", 3, path=str(contacts))
    with pytest.raises(ValueError, match="radius above 0"):
        topologies.build("mobility_trace", 3, path=str(moving), radius=0)


def test_alive_and_ids_are_checked():
    ring = topologies.build("ring", 4)
    for alive in ([True, False], [0, 9], [-1], [0.5]):
        with pytest.raises(ValueError, match="alive"):
            ring.matrix(0, alive)
    with pytest.raises(ValueError, match="peer 4 is not one of 0..3"):
        ring.neighbors(0, 4)
    for t in (-1, 0.5):
        with pytest.raises(ValueError, match="round t must be"):
            ring.matrix(t)
    assert (ring.matrix(0, []) == np.eye(4)).all() and (ring.matrix(0, {0, 1}) == ring.matrix(0, (1, 0))).all()


def test_small_sizes_are_the_same_graph():
    for n in (1, 2):
        expected = topologies.build("complete", n).matrix(0)
        for name in ("ring", "path", "star", "grid", "tree", "hypercube", "exponential", "binomial_tree", "base_graph"):
            np.testing.assert_array_equal(topologies.build(name, n).matrix(0), expected)
    assert topologies.build("star", 7).graph(0).number_of_nodes() == 7
    assert topologies.build("ring", 2).neighbors(0, 0) == {0: 0.5, 1: 0.5}
    assert topologies.build("torus", 9).graph(0).degree(0) == 4


def test_more_neighbours_than_peers_are_all_the_others():
    wide, full = (topologies.build("base_graph", 6, k=k) for k in (10**9, 5))
    np.testing.assert_array_equal(wide.matrix(0), full.matrix(0))
