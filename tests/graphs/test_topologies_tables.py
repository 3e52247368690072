"""Closed forms and published tables: static graphs, sequences, weights, spectra. Derivations stand with the code."""

import math

import networkx as nx
import numpy as np
import pytest

import topologies
from topologies import spectrum
from topologies.coloring import matchings
from topologies.links import Links
from topologies.sequences.activation import activation_contraction


def slem(name, n, weights="metropolis", **params):
    return spectrum.slem(topologies.build(name, n, weights=weights, **params).matrix(0))


def rho(name, n, **params):
    found = spectrum.contraction_estimate(topologies.build(name, n, **params))
    assert found.standard_error == 0.0
    return found.value


@pytest.mark.parametrize("n", range(4, 40))
def test_closed_forms_of_static_graphs(n):
    assert slem("ring", n) == pytest.approx((1 + 2 * math.cos(2 * math.pi / n)) / 3, abs=1e-12)
    assert slem("path", n) == pytest.approx((1 + 2 * math.cos(math.pi / n)) / 3, abs=1e-12)
    assert slem("star", n) == pytest.approx(1 - 1 / n, abs=1e-12)
    assert slem("complete", n) == pytest.approx(0, abs=1e-12)
    if n % 2 == 0:
        assert slem("exponential", n) == pytest.approx(1 - 2 / (math.ceil(math.log2(n)) + 1), abs=1e-12)
        assert np.linalg.eigvalsh(topologies.build("ring", n).matrix(0)).min() == pytest.approx(-1 / 3, abs=1e-12)


@pytest.mark.parametrize("a, b", [(3, 3), (4, 3), (5, 5), (8, 4), (8, 8), (9, 7)])
def test_closed_form_of_the_torus(a, b):
    assert slem("torus", a * b, rows=b) == pytest.approx((3 + 2 * math.cos(2 * math.pi / a)) / 5, abs=1e-12)


@pytest.mark.parametrize("d", range(2, 8))
def test_closed_form_of_the_hypercube(d):
    assert slem("hypercube", 2**d) == pytest.approx((d - 1) / (d + 1), abs=1e-12)
    assert np.linalg.eigvalsh(topologies.build("hypercube", 2**d).matrix(0)).min() == pytest.approx(-(d - 1) / (d + 1), abs=1e-12)


STATIC = [
    ("petersen", 10, {}, 0.5),
    ("exponential", 25, {}, 0.510861),
    ("exponential", 33, {}, 0.607800),
    ("exponential", 100, {}, 0.75),
    ("ring", 100, {}, 0.998684),
    ("grid", 8, {"rows": 2}, 0.853553),
    ("grid", 9, {}, 0.767423),
    ("grid", 16, {}, 0.868641),
    ("barbell", 8, {}, 0.929150),
    ("barbell", 10, {}, 0.950260),
    ("barbell", 16, {}, 0.977315),
    ("caveman", 12, {"clique": 4}, 0.899476),
    ("caveman", 16, {"clique": 4}, 0.934416),
    ("lollipop", 8, {"clique": 4}, 0.947222),
    ("tree", 15, {}, 0.975803),
    ("karate_club", 34, {}, 0.968764),
    ("davis_women", 32, {}, 0.917902),
    ("complete_bipartite", 10, {}, 0.666667),
]


@pytest.mark.parametrize("name, n, params, expected", STATIC, ids=lambda value: str(value))
def test_table_of_static_graphs(name, n, params, expected):
    assert slem(name, n, **params) == pytest.approx(expected, abs=6e-7)


def test_davis_has_its_smallest_eigenvalue_where_it_should():
    assert np.linalg.eigvalsh(topologies.build("davis_women", 32).matrix(0)).min() == pytest.approx(-0.434279, abs=1e-6)


def test_paley_is_a_square_root_expander():
    """Strongly regular: adjacency eigenvalues (-1 +- sqrt n) / 2."""
    for n in (5, 13, 17, 29):
        degree = (n - 1) // 2
        expected = (1 + (math.sqrt(n) - 1) / 2) / (1 + degree)
        lowest = abs(1 - (1 + math.sqrt(n)) / 2) / (1 + degree)
        assert slem("paley", n) == pytest.approx(max(expected, lowest), abs=1e-12)


def test_margulis_keeps_its_gap_as_it_grows():
    gaps = [1 - slem("margulis_gabber_galil", m * m) for m in (8, 16, 22)]
    assert min(gaps) > 0.08


RULES = [
    ("star", 8, "max_degree", 0.875),
    ("barbell", 8, "max_degree", 0.929150),
    ("ring", 8, "best_constant", 0.744521),
    ("ring", 16, "best_constant", 0.926670),
    ("star", 8, "best_constant", 0.777778),
    ("hypercube", 8, "best_constant", 0.5),
    ("path", 8, "best_constant", 0.923880),
    ("barbell", 8, "best_constant", 0.881917),
    ("ring", 4, "lazy", 0.666667),
    ("ring", 16, "lazy", 0.974627),
    ("star", 8, "lazy", 0.9375),
    ("hypercube", 8, "lazy", 0.75),
    ("path", 4, "fdla", 0.707107),
    ("star", 5, "fdla", 0.666667),
    ("barbell", 6, "fdla", 0.816497),
    ("ring", 10, "laplacian", 0.936339),
    ("ring", 8, "metropolis_tight", 1.0),
]


@pytest.mark.parametrize("name, n, weights, expected", RULES)
def test_table_of_weight_rules(name, n, weights, expected):
    assert slem(name, n, weights) == pytest.approx(expected, abs=6e-7)


def test_optimal_weights_themselves():
    assert topologies.build("ring", 8, weights="best_constant").neighbors(0, 0)[1] == pytest.approx(0.436130, abs=1e-6)
    assert topologies.build("path", 4, weights="fdla").neighbors(0, 0)[1] == pytest.approx(0.5, abs=1e-5)
    assert topologies.build("star", 5, weights="fdla").neighbors(0, 1)[0] == pytest.approx(1 / 3, abs=1e-5)
    assert topologies.build("barbell", 6, weights="fdla").neighbors(0, 2)[3] == pytest.approx(0.5, abs=1e-5)
    row = topologies.build("ring", 10, weights="laplacian").neighbors(0, 0)
    assert row == pytest.approx({0: 2 / 3, 1: 1 / 6, 9: 1 / 6})


@pytest.mark.long
def test_fdla_is_at_least_as_fast_as_every_other_symmetric_rule():
    for name in ("karate_club", "tree", "barbell", "grid"):
        n = 34 if name == "karate_club" else 12
        fdla, chain = slem(name, n, "fdla"), slem(name, n, "fastest_mixing_chain")
        others = [slem(name, n, rule) for rule in ("metropolis", "metropolis_tight", "max_degree", "best_constant", "sinkhorn")]
        assert fdla <= min(others) + 1e-8 and fdla <= chain + 1e-8
        assert chain <= min(slem(name, n, rule) for rule in ("metropolis", "max_degree", "sinkhorn")) + 1e-8


def test_fdla_of_an_edge_transitive_graph_is_the_best_constant():
    """Boyd, Diaconis, Xiao 2004: weights may be taken equal on an edge orbit, and a ring has one."""
    for n in (5, 8, 11):
        assert slem("ring", n, "fdla") == pytest.approx(slem("ring", n, "best_constant"), abs=1e-8)


@pytest.mark.long
def test_larger_graphs_take_another_solver_to_the_same_optimum(monkeypatch):
    """Beyond 32 peers, SCS: on rings the best constant is the optimum, on others that of Clarabel, to six digits."""
    from topologies import convex

    used, run, solve = [], convex._run, convex.solve
    monkeypatch.setattr(convex, "_run", lambda *args, **settings: used.append(settings["solver"]) or run(*args, **settings))
    assert slem("ring", 34, "fdla") == pytest.approx(slem("ring", 34, "best_constant"), abs=1e-6)
    split = slem("random_regular", 34, "fdla", degree=3)
    assert used == ["SCS", "SCS"]
    monkeypatch.setattr(convex, "solve", lambda *args, **settings: solve(*args, **{**settings, "interior": 64}))
    assert split == pytest.approx(slem("random_regular", 34, "fdla", degree=3), abs=1e-6)
    assert used == ["SCS", "SCS", "CLARABEL"]


def test_an_optimum_that_cannot_be_had_is_refused(monkeypatch):
    from topologies import convex

    message = "weights='fdla' is too large a problem: .* 300 rows, at most 256 .* take weights='best_constant'"
    with pytest.raises(ValueError, match=message):
        slem("ring", 300, "fdla")
    with pytest.raises(ValueError, match="weights='link_reliability' is too large a problem: .* 130 rows, at most 128"):
        slem("ring", 65, "link_reliability")
    monkeypatch.setattr(convex, "STEPS", 10)
    with pytest.raises(ValueError, match="weights='fdla' was not found: the solver ended with 'optimal_inaccurate'"):
        slem("random_regular", 34, "fdla", degree=3)


def test_link_reliability_of_parts_that_do_not_meet_is_that_of_each():
    graph, p = nx.Graph([(0, 2), (2, 4), (1, 3), (3, 5), (5, 1)]), np.full((6, 6), 0.9)
    p[0, 2] = p[2, 0] = p[1, 3] = p[3, 1] = 0.3
    rule = {"rule": "link_reliability", "success": p}
    W = topologies.build("networkx", 6, graph=graph, allow_disconnected=True, weights=rule).matrix(0)
    for part in ([0, 2, 4], [1, 3, 5]):
        alone = nx.convert_node_labels_to_integers(graph.subgraph(part), ordering="sorted")
        own = {"rule": "link_reliability", "success": p[np.ix_(part, part)]}
        expected = topologies.build("networkx", 3, graph=alone, weights=own).matrix(0)
        np.testing.assert_allclose(W[np.ix_(part, part)], expected, atol=1e-6)


def test_sinkhorn_table():
    M = [[1, 0.5, 0, 0.2], [0.5, 1, 0.3, 0], [0, 0.3, 1, 0.7], [0.2, 0, 0.7, 1]]
    W = topologies.build("ring", 4, weights={"rule": "sinkhorn", "affinity": M}).matrix(0)
    np.testing.assert_allclose(np.diag(W), [0.598841, 0.555483, 0.487652, 0.531010], atol=1e-6)
    np.testing.assert_allclose([W[0, 1], W[0, 3], W[1, 2], W[2, 3]], [0.288377, 0.112781, 0.156139, 0.356209], atol=1e-6)
    assert np.abs(W - W.T).max() < 1e-14
    assert spectrum.slem(W) == pytest.approx(0.734038, abs=1e-6)


def test_target_law_is_preserved():
    mass = np.array([1.0, 5, 2, 2, 9, 1, 3])
    W = topologies.build("tree", 7, weights={"rule": "target", "mass": mass}).matrix(0)
    np.testing.assert_allclose(mass @ W, mass, atol=1e-12)
    x = np.linalg.matrix_power(W, 2000) @ np.arange(7.0)
    np.testing.assert_allclose(x, np.full(7, mass @ np.arange(7.0) / mass.sum()), atol=1e-9)


def test_uniform_neighbours_are_biased_by_degree_and_push_sum_is_not():
    W = topologies.build("star", 6, weights="uniform").matrix(0)
    pi = np.array([6, 2, 2, 2, 2, 2]) / 16
    np.testing.assert_allclose(pi @ W, pi, atol=1e-12)
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2), (2, 3), (3, 0)])
    W = topologies.build("networkx", 4, graph=graph, weights="push_sum").matrix(0)
    x, mass = np.array([1.0, 2, 3, 6]), np.ones(4)
    for _ in range(200):
        x, mass = W @ x, W @ mass
    assert mass.sum() == pytest.approx(4) and mass.min() > 0
    np.testing.assert_allclose(x / mass, 3.0, atol=1e-9)


def test_link_reliability_minimises_the_expected_square():
    """At the optimum the closed E[W^T W] of the docstring beats Metropolis, and agrees with sampled losses."""
    p = np.full((6, 6), 0.9)
    p[0, 1] = p[1, 0] = 0.2
    ring = topologies.build("ring", 6)

    def expected(W):
        i, j = np.nonzero(np.triu(W, 1))
        L = [np.outer(e, e) for e in np.eye(6)[i] - np.eye(6)[j]]
        mean = np.eye(6) - sum(p[a, b] * W[a, b] * Le for a, b, Le in zip(i, j, L, strict=True))
        spread = sum(2 * p[a, b] * (1 - p[a, b]) * W[a, b] ** 2 * Le for a, b, Le in zip(i, j, L, strict=True))
        return mean @ mean + spread

    W = topologies.build("ring", 6, weights={"rule": "link_reliability", "success": p.tolist()}).matrix(0)
    assert spectrum.distance(expected(W)) < spectrum.distance(expected(ring.matrix(0))) - 0.02
    rng, total = np.random.default_rng(0), np.zeros((6, 6))
    for _ in range(4000):
        lossy = W * (rng.random((6, 6)) < p)
        np.fill_diagonal(lossy, 0)
        np.fill_diagonal(lossy, 1 - lossy.sum(1))
        total += lossy.T @ lossy / 4000
    np.testing.assert_allclose(total, expected(W), atol=0.02)
    for name in ("tree", "barbell"):
        certain = slem(name, 7, {"rule": "link_reliability", "success": 1.0})
        assert certain == pytest.approx(slem(name, 7, "fastest_mixing_chain"), abs=1e-6)


LENGTHS = {
    1: {2: 1, 3: 3, 4: 2, 5: 5, 6: 4, 7: 5, 8: 3, 9: 7, 10: 6, 12: 5, 16: 4, 25: 9, 27: 9, 32: 5, 64: 6, 100: 11},
    2: {3: 1, 4: 2, 5: 3, 6: 2, 7: 4, 8: 3, 9: 2, 10: 4, 12: 3, 16: 4, 25: 6, 27: 3, 32: 5, 64: 6, 100: 8},
    3: {4: 1, 5: 3, 6: 2, 7: 3, 8: 2, 9: 2, 10: 4, 12: 2, 16: 2, 25: 5, 32: 3, 64: 3, 100: 6},
    4: {5: 1, 6: 2, 7: 3, 8: 2, 9: 2, 10: 2, 12: 2, 16: 2, 25: 2, 32: 3, 64: 3, 100: 3},
}


@pytest.mark.parametrize("k", LENGTHS)
def test_base_graph_lengths(k):
    for n, length in LENGTHS[k].items():
        assert topologies.build("base_graph", n, k=k).plan.length == length
    for n in range(2, 130):
        assert topologies.build("base_graph", n, k=k).plan.length <= 2 * math.log(n, k + 1) + 2


@pytest.mark.parametrize("k", LENGTHS)
def test_base_graph_is_exact_for_every_size(k):
    for n in [*range(2, 66), 81, 97, 100, 127, 128, 129]:
        topology, product = topologies.build("base_graph", n, k=k), np.eye(n)
        for t in range(topology.plan.length):
            W = topology.matrix(t)
            assert (W == W.T).all() and (np.count_nonzero(W - np.diag(np.diag(W)), axis=1) <= k).all()
            product = W @ product
        np.testing.assert_allclose(product, 1 / n, atol=1e-10)


def test_base_graph_worked_examples():
    """Each brace is a step: n = 5: {01, 23} {02, 13} {01, 34 with 4/5} {01, 23} {02, 13}; n = 6: 4 steps."""

    def pairs(n, t):
        W = topologies.build("base_graph", n).matrix(t)
        return {f"{i}{j}": round(W[i, j], 6) for i, j in zip(*np.nonzero(np.triu(W, 1)), strict=True)}

    half = dict.fromkeys
    assert [pairs(5, t) for t in range(5)] == [
        half(("01", "23"), 0.5), half(("02", "13"), 0.5), {"01": 0.5, "34": 0.8}, half(("01", "23"), 0.5), half(("02", "13"), 0.5),
    ]  # fmt: skip
    assert [pairs(6, t) for t in range(4)] == [
        half(("01", "34"), 0.5), {"12": 0.666667, "45": 0.666667}, half(("01", "34"), 0.5), half(("03", "14", "25"), 0.5),
    ]  # fmt: skip


def test_one_peer_exponential_is_exact_for_powers_of_two_only():
    for n in (2, 4, 8, 32):
        found = spectrum.finite_time(topologies.build("one_peer_exponential", n))
        assert found.rounds == int(math.log2(n)) and found.from_any_start
    for n, residual in ((6, 0.2165), (12, 0.2091)):
        topology, product = topologies.build("one_peer_exponential", n), np.eye(n)
        assert spectrum.finite_time(topology) is None
        for t in range(topology.period):
            product = topology.matrix(t) @ product
        assert np.linalg.norm(product - 1 / n, 2) == pytest.approx(residual, abs=1e-4)
    factors = [topologies.build("one_peer_exponential", 8).matrix(t) for t in range(3)]
    assert [np.linalg.norm(W - 1 / 8, 2) for W in factors] == pytest.approx([0.923880, 1, 1], abs=1e-6)


@pytest.mark.parametrize("name, params, n, rounds", [
    ("hypercube_matching", {}, 16, 4), ("grid_all_reduce", {"group_size": 3}, 27, 3), ("grid_all_reduce", {}, 8, 3),
    ("hierarchical", {"node_size": 4}, 32, 6), ("complete", {}, 7, 1),
])  # fmt: skip
def test_exact_sequences(name, params, n, rounds):
    assert spectrum.finite_time(topologies.build(name, n, **params)).rounds == rounds


def test_alternating_ring():
    for n, norm in ((4, 0), (6, 0.5), (8, 0.707107), (16, 0.923880), (32, 0.980785)):
        topology = topologies.build("alternating_ring", n)
        product = topology.matrix(1) @ topology.matrix(0)
        assert np.linalg.norm(product - 1 / n, 2) == pytest.approx(norm, abs=1e-6)
        assert spectrum.cycle_rate(topology) ** 2 == pytest.approx(math.cos(2 * math.pi / n) ** 2, abs=1e-9)


def test_edge_cycle():
    for n, radius in ((4, 0.25), (6, 0.481367), (8, 0.632225)):
        topology = topologies.build("edge_cycle", n)
        assert spectrum.cycle_rate(topology) ** n == pytest.approx(radius, abs=1e-6)


@pytest.mark.long
def test_random_matchings():
    for n, expected in ((4, 0.3333), (8, 0.42857), (16, 0.46667), (32, 0.48387), (7, 0.5)):
        assert rho("random_matching", n) == pytest.approx(expected, abs=1e-4)
    for n in (4, 7):  # the shuffle is near enough to uniform: every pair is matched equally often
        topology = topologies.build("random_matching", n, seed=1)
        mean = np.mean([topology.matrix(t) for t in range(1500)], axis=0)
        np.testing.assert_allclose(mean, topology.second_moment(), atol=0.04)


def test_pairwise_gossip():
    assert rho("pairwise_gossip", 9) == pytest.approx(1 - 1 / 8)
    for n, expected in ((8, 0.963388), (16, 0.995242)):
        assert rho("pairwise_gossip", n, base="ring") == pytest.approx(expected, abs=1e-6)


EQUITOPO = [
    ("od_equidyn", 0.5, {8: 0.43750, 16: 0.46875, 32: 0.48438}),
    ("od_equidyn", 1.0, {8: 0.75, 16: 0.875, 32: 0.9375}),
    ("ou_equidyn", 0.5, {8: 0.50781, 16: 0.54114, 17: 0.54811, 32: 0.55952, 100: 0.57047}),
    ("ou_equidyn", 1.0, {8: 0.78125, 16: 0.89203, 100: 0.98299}),
]


@pytest.mark.parametrize("name, eta, table", EQUITOPO)
def test_equitopo_table(name, eta, table):
    for n, expected in table.items():
        assert rho(name, n, eta=eta) == pytest.approx(expected, abs=6e-6)
    topology = topologies.build(name, 7, eta=eta, seed=2)
    sampled = np.mean([topology.matrix(t).T @ topology.matrix(t) for t in range(3000)], axis=0)
    np.testing.assert_allclose(sampled, topology.second_moment(), atol=0.03)


def test_undirected_equidyn_is_the_greedy_walk():
    """Partners by arithmetic are those of the walk: from the start, i takes i + a if both are free."""
    from topologies.sequences.exponential import pair_blocks

    for n in range(2, 20):
        for offset in range(1, n // 2 + 1):
            partner = list(range(n))
            for i in range(n):
                j = (i + offset) % n
                if partner[i] == i and partner[j] == j:
                    partner[i], partner[j] = j, i
            assert pair_blocks(np.arange(n), offset, n).tolist() == partner


# Peers 1 and 7, 6 and 7, .. of an eight-peer graph with 12 edges in five matchings.
MATCHA = [[(1, 5), (6, 7), (0, 4), (2, 3)], [(1, 7), (3, 6)], [(1, 0), (3, 7), (5, 6)], [(1, 2), (7, 0)], [(3, 1)]]


def test_matcha_table():
    for budget, expected in ((0.1, 0.93679), (0.3, 0.77652), (0.5, 0.64397), (0.7, 0.60096), (1.0, 0.653777)):
        assert rho("matcha", 8, matchings=MATCHA, budget=budget) == pytest.approx(expected, abs=1e-5)
    half = topologies.build("matcha", 8, matchings=MATCHA, budget=0.5)
    np.testing.assert_allclose(half.probabilities, [0.984, 0, 0.758, 0.758, 0], atol=1e-3)
    assert half.alpha == pytest.approx(0.39643, abs=1e-5)
    assert topologies.build("matcha", 8, matchings=MATCHA, budget=1.0).alpha == pytest.approx(2 / 7, abs=1e-6)
    plain = topologies.build("matcha", 8, matchings=MATCHA, budget=0.5, optimise=False)
    assert plain.alpha == pytest.approx(0.44444, abs=1e-5)
    assert spectrum.contraction(plain) == pytest.approx(0.79056, abs=1e-5)
    sampled = np.mean([half.matrix(t) @ half.matrix(t) for t in range(4000)], axis=0)
    np.testing.assert_allclose(sampled, half.second_moment(), atol=0.02)
    clipped = topologies.build("matcha", 8, matchings=MATCHA, budget=0.5, clip=True)
    assert clipped.alpha == pytest.approx(1 / 5) and clipped.nonnegative


@pytest.mark.parametrize("seed", range(20))
def test_edge_colouring_makes_few_matchings(seed):
    graph = nx.gnp_random_graph(4 + seed // 2, 0.6, seed=seed)
    links = Links.from_networkx(graph)
    groups = matchings(links)
    assert len(groups) <= links.in_degree.max() + 1
    assert sorted(edge for group in groups for edge in group) == sorted(zip(*map(list, links.edges), strict=True))
    assert all(len({end for edge in group for end in edge}) == 2 * len(group) for group in groups)


ACTIVATION = {
    8: {0.02: 0.9245, 0.05: 0.8238, 0.1: 0.6860, 0.2: 0.4875, 0.3: 0.3533, 0.5: 0.1853, 0.8: 0.0538},
    10: {0.02: 0.9062, 0.05: 0.7870, 0.1: 0.6343, 0.2: 0.4287, 0.3: 0.2992, 0.5: 0.1526, 0.8: 0.0429},
    32: {0.02: 0.7479, 0.05: 0.5269, 0.1: 0.3361, 0.2: 0.1780, 0.3: 0.1106, 0.5: 0.0499, 0.8: 0.0130},
    100: {0.5: 0.016, 0.2: 0.062, 0.1: 0.132, 0.05: 0.249, 0.02: 0.475, 0.01: 0.654},
}


@pytest.mark.parametrize("n", ACTIVATION)
def test_edge_activation_table(n):
    """The table is sampled (+- .001, up to .002 where few links make it noisy), ours is exact."""
    for p, expected in ACTIVATION[n].items():
        assert rho("edge_activation", n, p=p) == pytest.approx(expected, abs=0.0016)


@pytest.mark.parametrize("n, p", [(1, 0.3), (2, 0.3), (3, 0.2), (4, 0.5), (5, 0.7), (4, 0.0), (4, 1.0)])
def test_exact_contraction_of_edge_activation_by_enumeration(n, p):
    topology = topologies.build("edge_activation", n, p=p)
    moment = sum(q * spectrum.square(entries.dense()) for q, entries in topology.law())
    assert activation_contraction(n, p) == pytest.approx(spectrum.distance(moment), abs=1e-12)


def test_three_readings_of_encounters():
    for reading, expected in (("metropolis", 0.634), ("sequential", 0.592), ("matching", 0.727)):
        found = spectrum.contraction_estimate(topologies.build("encounters", 10, p=0.1, reading=reading), rounds=1500)
        assert found.value == pytest.approx(expected, abs=4 * found.standard_error + 0.001)


def test_epidemic_contractions():
    for name, s in (("el_local", 1), ("el_local", 3), ("el_oracle", 2), ("el_oracle", 3)):
        topology = topologies.build(name, 10, s=s, seed=4)
        sampled = np.mean([(topology.matrix(t) ** 2).sum() for t in range(1500)])
        assert (sampled - 1) / 9 == pytest.approx(spectrum.contraction(topology), abs=0.01)


def test_random_walk_visits():
    star = topologies.build("random_walk", 6, base="star", moves="uniform")
    fair = topologies.build("random_walk", 6, base="star", moves="metropolis")
    for topology, hub in ((star, 0.5), (fair, 1 / 6)):
        visits = np.bincount([topology.holder(t) for t in range(3000)], minlength=6) / 3000
        assert visits[0] == pytest.approx(hub, abs=0.05)
    assert {fair.holder(t + 1) for t in range(50) if fair.holder(t) == 1} <= {0, 1}
