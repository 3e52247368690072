"""Spectral quantities against independent computations, simulation against prediction, acceleration against its bound."""

import math

import numpy as np
import pytest

import topologies
from topologies import acceleration, spectrum
from topologies.lanczos import sparse_slem
from topologies.predict import Network, predict, rate, seconds_per_round, simulate
from topologies.rounds import b_connectivity, traffic

CLOSED = ["ring", "torus", "hypercube", "complete", "exponential", "directed_ring", "u_equistatic"]


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("weights", ["metropolis", "lazy"])
def test_closed_eigenvalues_are_those_of_the_matrix(name, weights):
    topology = topologies.build(name, 16, weights=weights)
    closed, dense = topology.eigenvalues(0), np.linalg.eigvals(topology.matrix(0))
    np.testing.assert_allclose(np.sort_complex(closed.round(9)), np.sort_complex(dense.astype(complex).round(9)), atol=1e-7)
    assert closed[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name, weights", [("path", "metropolis"), ("grid", "best_constant"), ("barabasi_albert", "metropolis"),
                                           ("circular_ladder", "metropolis_tight"), ("d_equistatic", "metropolis")])  # fmt: skip
def test_lanczos_agrees_with_dense(name, weights):
    topology = topologies.build(name, 400, weights=weights, seed=1)
    expected = spectrum.slem(topology.matrix(0))
    assert sparse_slem(topology.entries(0), topology.symmetric) == pytest.approx(expected, abs=1e-8)


def test_large_spectra():
    n = 3000
    assert spectrum.slem(topologies.build("path", n)) == pytest.approx((1 + 2 * math.cos(math.pi / n)) / 3, abs=1e-9)
    grid = topologies.build("grid", 54 * 54, weights="max_degree")
    assert spectrum.slem(grid) == pytest.approx((3 + 2 * math.cos(math.pi / 54)) / 5, abs=1e-9)


def test_slem_of_small_things():
    assert spectrum.slem(np.ones((1, 1))) == 0
    assert spectrum.slem(np.eye(3)) == pytest.approx(1)
    assert spectrum.spectral_gap(topologies.build("complete", 5)) == pytest.approx(1)


def test_contraction_of_static_and_periodic_is_exact():
    ring = topologies.build("ring", 9)
    assert spectrum.contraction(ring) == pytest.approx(spectrum.slem(ring) ** 2, abs=1e-12)
    topology = topologies.build("base_graph", 9)
    moment = np.mean([topology.matrix(t) @ topology.matrix(t) for t in range(topology.period)], axis=0)
    assert spectrum.contraction(topology) == pytest.approx(np.linalg.norm(moment - 1 / 9, 2), abs=1e-12)


def test_sampled_contraction_covers_the_truth():
    """The jackknife takes the upward bias off; the trace identity has none."""
    ring = topologies.build("edge_activation", 12, p=0.4, base="ring")
    truth = spectrum.contraction_estimate(ring)
    assert truth.how == "all outcomes"
    sampled = spectrum._by_jackknife(ring, 600)
    assert abs(sampled.value - truth.value) < 4 * sampled.standard_error and 0 < sampled.standard_error < 0.02
    whole = topologies.build("edge_activation", 10, p=0.1)
    traced, truth = spectrum._by_trace(whole, 600), spectrum.contraction(whole)
    assert abs(traced.value - truth) < 4 * traced.standard_error and 0 < traced.standard_error < 0.02


@pytest.mark.long
@pytest.mark.parametrize("name", ["edge_activation", "random_matching", "od_equidyn", "el_oracle"])
def test_contraction_bounds_the_mean_of_many_runs(name):
    """E|x(t) - mean|^2 <= rho^t |x(0) - mean|^2; with equality where peers are exchangeable (200 runs)."""
    params = {"p": 0.2} if name == "edge_activation" else {}
    result = simulate(lambda seed: topologies.build(name, 10, seed=seed, **params), rounds=6, runs=200, columns=4)
    rho = spectrum.contraction(topologies.build(name, 10, **params))
    for t in range(1, 7):
        assert result.distance[t] ** 2 == pytest.approx(rho**t, rel=0.35)


def test_contraction_is_a_bound_where_peers_differ():
    build = lambda seed: topologies.build("edge_activation", 8, p=0.5, base="star", seed=seed)  # noqa: E731
    result, rho = simulate(build, rounds=8, runs=200, columns=4), spectrum.contraction(build(0))
    assert all(result.distance[t] ** 2 <= rho**t * 1.05 for t in range(9))


def test_product_rate():
    ring = topologies.build("ring", 8)
    assert spectrum.product_rate(ring, 400) == pytest.approx(spectrum.slem(ring), abs=1e-9)
    assert spectrum.product_rate(topologies.build("ring", 4), 5000) == pytest.approx(1 / 3, abs=1e-3)  # far below 1e-308
    assert spectrum.product_rate(topologies.build("hypercube_matching", 8), 30) == 0


def test_finite_time_tells_when_it_depends_on_the_start():
    found = spectrum.finite_time(topologies.build("base_graph", 5))
    assert found.rounds == found.period == 5
    assert not found.from_any_start
    assert spectrum.finite_time(topologies.build("ring", 5)) is None
    assert spectrum.finite_time(topologies.build("ring", 3)).rounds == 1


NEIGHBOURS = {
    "ring": (3.000, 6.632, 17.076, 28.895),
    "star": (1.098, 1.674, 6.438, 22.058),
    "hypercube": (6, 19.636, 30.009, 31.788),
    "torus": (5, 15.739, 28.540, 31.609),
    "complete": (32, 32, 32, 32),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_effective_neighbours(name):
    W = topologies.build(name, 32)
    found = [spectrum.effective_neighbors(W, decay) for decay in (0, 0.9, 0.99, 0.999)]
    assert found == pytest.approx(NEIGHBOURS[name], abs=6e-4)
    with pytest.raises(ValueError, match="decay must be in"):
        spectrum.effective_neighbors(W, 1.0)


def test_mixing_time_is_a_bound():
    for name in ("ring", "star", "torus"):
        W = topologies.build(name, 16, weights="lazy").matrix(0)
        rounds = math.ceil(spectrum.mixing_time(W, 1e-3))
        assert np.abs(np.linalg.matrix_power(W, rounds) - 1 / 16).sum(1).max() <= 1e-3


def test_b_connectivity():
    assert b_connectivity(topologies.build("ring", 7)) == 1
    assert b_connectivity(topologies.build("alternating_ring", 8)) == 2
    assert b_connectivity(topologies.build("edge_cycle", 8)) == 7  # any seven edges of a ring of eight
    assert b_connectivity(topologies.build("edge_cycle", 8, base="path")) == 7
    assert b_connectivity(topologies.build("hypercube_matching", 16)) == 4
    assert b_connectivity(topologies.build("directed_ring", 5)) == 1
    assert b_connectivity(topologies.build("hierarchical", 16, node_size=4)) == 4
    assert b_connectivity(topologies.build("edge_activation", 6, p=0.0)) is None
    assert b_connectivity(topologies.build("ring", 1)) == 1


def test_traffic_counts_what_is_sent():
    assert traffic(topologies.build("ring", 10), 100) == (20, 2, 2000, 200)
    assert traffic(topologies.build("star", 10), 1) == (18, 9, 18, 9)
    assert traffic(topologies.build("edge_activation", 10, p=0.3), 1, 2000).messages == pytest.approx(0.3 * 90, rel=0.05)
    assert traffic(topologies.build("complete", 1), 8) == (0, 0, 0, 0)


ACCELERATED = [  # n, K, plain, from x_-1 = x_0, from W x_0, Muffliato
    (16, 5, 0.7707, 0.4692, 0.5052, 0.4131),
    (16, 10, 0.5940, 0.1457, 0.1598, 0.1019),
    (16, 20, 0.3529, 9.751e-3, 1.084e-2, 1.148e-2),
    (16, 40, 0.1245, 2.679e-5, 3.003e-5, 1.104e-4),
    (32, 20, 0.7727, 0.1590, 0.1677, 0.1029),
    (32, 40, 0.5971, 1.112e-2, 1.182e-2, 1.222e-2),
]


@pytest.mark.parametrize("n, K, plain, fast, first, muffliato", ACCELERATED)
def test_acceleration_table(n, K, plain, fast, first, muffliato):
    W = topologies.build("ring", n).matrix(0)
    lam = spectrum.slem(W)

    def left(method, **options):
        P = method(lambda x: W @ x, np.eye(n), K, lam, **options)
        np.testing.assert_allclose(P.sum(0), 1, atol=1e-9)  # the mean is kept
        return np.linalg.norm(P - 1 / n, 2)

    assert lam**K == pytest.approx(plain, abs=6e-5)
    assert left(acceleration.fast_mix) == pytest.approx(fast, rel=6e-4)
    assert left(acceleration.fast_mix, first_step=True) == pytest.approx(first, rel=6e-4)
    assert left(acceleration.muffliato) == pytest.approx(muffliato, rel=6e-4)
    best = left(acceleration.chebyshev)
    assert best == pytest.approx(1 / math.cosh(K * math.acosh(1 / lam)), rel=1e-6)
    assert best < min(fast, first, muffliato)


def test_a_wrong_guess_only_costs_speed():
    W = topologies.build("ring", 16).matrix(0)
    for guess, expected in ((0.92, 1.8e-3), (0.97, 7.3e-5), (0.99, 5.3e-3), (0.999, 0.27)):
        P = acceleration.fast_mix(lambda x: W @ x, np.eye(16), 40, guess)
        assert np.linalg.norm(P - 1 / 16, 2) == pytest.approx(expected, rel=0.05)
    with pytest.raises(ValueError, match="lam in"):
        acceleration.accelerate(lambda x: x, np.eye(2), 3, 1.0)
    with pytest.raises(ValueError, match="known: chebyshev"):
        acceleration.accelerate(lambda x: x, np.eye(2), 3, 0.5, "magic")


@pytest.mark.parametrize("name, params", [("ring", {}), ("tree", {}), ("one_peer_exponential", {}), ("alternating_ring", {}),
                                          ("edge_cycle", {}), ("d_equistatic", {})])  # fmt: skip
def test_prediction_is_what_simulation_measures(name, params):
    topology = topologies.build(name, 12, **params)
    period = topology.period
    result = simulate(lambda _: topology, rounds=60 * period if period < 12 else 240)
    assert result.measured == pytest.approx(rate(topology)[0], abs=0.02)


def test_seconds():
    network = Network(message_bytes=1e6, bandwidth=1e8, latency=0.001)
    assert seconds_per_round(topologies.build("ring", 8), network) == pytest.approx(0.021)
    assert seconds_per_round(topologies.build("star", 8), network) == pytest.approx(0.071)
    assert seconds_per_round(topologies.build("edge_activation", 8, p=0.0), network) == 0
    nodes = network._replace(node_size=4, node_bandwidth=1e9)
    hierarchical = topologies.build("hierarchical", 16, node_size=4)
    assert seconds_per_round(hierarchical, nodes) == pytest.approx(0.001 + (0.003 + 0.01) / 2)
    found = predict(topologies.build("one_peer_exponential", 16), network, 1e-3)
    assert (found.rounds, found.rate) == (4, 0) and found.seconds == pytest.approx(4 * 0.011)
    assert predict(topologies.build("edge_activation", 4, p=0.0), network).rounds == math.inf
    with pytest.raises(ValueError, match="tolerance"):
        predict(hierarchical, network, 2.0)
