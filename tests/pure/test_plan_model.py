"""The numbers of a plan against closed forms and simulated peers: disagreement, curves, the cost of disagreement, ranks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import topologies
from dfl.plan import compare, model
from dfl.plan.model import Moments, Response

RING = topologies.build("ring", 8)


def walk(topology, phi, beta, noise, rounds, columns=3000, seed=0):
    """Xi^2 after each round, and the moments of each, of peers that drift as the model says, in so many dimensions."""
    rng, n = np.random.default_rng(seed), topology.num_peers
    x, u = np.zeros((2, n, columns))
    distances, moments = [], []
    for t in range(rounds):
        new = rng.standard_normal((n, columns)) * math.sqrt(noise / columns * n / (n - 1))
        drift = phi * u - beta * x + new - new.mean(0)
        moments.append(Moments(*((a * b).sum() / n for a, b in ((drift, drift), (drift, u), (drift, x), (u, u), (u, x), (x, x)))))
        u, x = drift, topology.matrix(t) @ (x + drift)
        x, u = x - x.mean(0), drift
        distances.append((x * x).sum() / n)
    return np.array(distances), moments


@pytest.mark.parametrize("phi", [0.0, 0.6, 0.95])
def test_disagreement_on_a_ring_is_the_closed_form(phi):
    eigenvalues = topologies.spectrum.eigenvalues(RING)[1:]
    found = model.disagreement(RING.matrix, 8, Response(phi, 0.0, (0.3,)), 400, period=1)
    drift = 0.3 / (1 - phi**2)  # the variance of what remembers phi of itself
    assert found[-1] == pytest.approx(model.in_the_long_run(eigenvalues, phi, drift), rel=1e-6)
    if not phi:
        rho = model.contraction([RING.matrix(0)])
        assert rho == pytest.approx(np.mean(eigenvalues**2))
        assert found[0] == pytest.approx(rho * 0.3) and len(found) == 400


@pytest.mark.parametrize(("name", "parameters"), [("ring", {}), ("one_peer_exponential", {}), ("edge_activation", {"p": 0.3}),
                                                  ("directed_ring", {}), ("el_local", {"s": 2})])
def test_disagreement_is_that_of_peers_that_drift_so(name, parameters):
    """Static, periodic, random, directed graphs, and one whose columns do not sum to one."""
    topology = topologies.build(name, 8, seed=3, **parameters)
    seen, _ = walk(topology, 0.7, 0.1, 1.0, 40)
    found = model.disagreement(topology.matrix, 8, Response(0.7, 0.1, (1.0,)), 40, topology.period)
    np.testing.assert_allclose(found, seen, rtol=0.06, atol=1e-9)


def test_complete_graph_agrees_after_every_round():
    found = model.disagreement(topologies.build("complete", 6).matrix, 6, Response(0.5, 0.0, (1.0,)), 10, 1)
    assert found == pytest.approx(np.zeros(10), abs=1e-12)


@pytest.mark.parametrize(("phi", "beta"), [(0.0, 0.0), (0.8, 0.0), (0.6, 0.25)])
def test_response_finds_what_peers_do(phi, beta):
    _, moments = walk(RING, phi, beta, 2.0, 30)
    found = model.response(moments)
    assert found.phi == pytest.approx(phi, abs=0.03) and found.beta == pytest.approx(beta, abs=0.03)
    assert np.mean(found.noise) == pytest.approx(2.0, rel=0.05)


def test_response_stays_within_what_is_stable():
    turning = [Moments(1.0, -0.9, 0.0, 1.0, 0.0, 1.0)] * 5
    assert model.response(turning).phi == 0.0
    nothing = model.response([Moments(*[0.0] * 6)] * 5)
    assert (nothing.phi, nothing.beta, set(nothing.noise)) == (0.0, 0.0, {0.0})
    assert model.response([Moments(1.0, 0, 0, 0, 0, 0)]).noise == (1.0,)  # one round alone


@pytest.mark.parametrize("shape", [0.75, 1.0, 2.0])
def test_a_curve_finds_its_parameters(shape):
    """Seen up to a bit more than its time constant, it is known until it is reached."""
    steps = np.arange(0, 130, 10)
    found = model.fit_curve(steps, 0.2 + 0.6 * (1 - np.exp(-((steps / 60) ** shape))), best=1.0)
    later = np.array([200.0, 400.0])
    median = [model._quantile(column, found.weight, 0.5) for column in found.at(later).T]
    np.testing.assert_allclose(median, 0.2 + 0.6 * (1 - np.exp(-((later / 60) ** shape))), atol=0.02)


def test_noise_widens_the_range_and_leaves_the_middle():
    rng, steps = np.random.default_rng(0), np.arange(0, 130, 10)
    truth = 0.2 + 0.6 * (1 - np.exp(-steps / 60))
    distances = np.zeros(400)
    sharp, noisy = (model.reach(model.fit_curve(steps, truth + size * rng.standard_normal(len(steps)) * (steps > 0), 1.0), 0.0,
                                distances, 10, 0.7) for size in (0.0, 0.02))
    exact = math.ceil(-60 * math.log(1 - 0.5 / 0.6) / 10)
    assert sharp.rounds == pytest.approx(exact, abs=1) and sharp.high - sharp.low <= noisy.high - noisy.low
    assert noisy.low <= exact <= noisy.high


def test_a_curve_takes_as_many_steps_as_it_says():
    curve = model.fit_curve([0, 10, 20, 30], [0.2, 0.3, 0.38, 0.43], best=1.0)
    steps = curve.steps_to(0.4)
    there = np.isfinite(steps)
    assert there.any() and not there[curve.end <= 0.4].any()
    np.testing.assert_allclose([curve.at([step])[k, 0] for k, step in enumerate(steps) if there[k]], 0.4, rtol=1e-9)


def test_what_the_probe_itself_did_not_foresee_widens_the_range():
    steps = np.arange(0, 130, 10)
    known = 0.2 + 0.6 * (1 - np.exp(-steps / 60))
    other = 0.2 + 0.05 * np.sqrt(steps)  # rises on as no curve of the family does
    assert model.foresight(steps, known, 1.0) < 0.05 < model.foresight(steps, other, 1.0)
    assert model.foresight(steps[:4], other[:4], 1.0) == 0.0 == model.foresight(steps, 0.5 - other, 1.0)
    curve, error, truth = model.fit_curve(steps, other, 1.0), model.foresight(steps, other, 1.0), 12**2 / 10
    narrow, wide = (model.reach(curve, 0.0, np.zeros(400), 10, 0.8, size) for size in (0.0, error))
    assert wide.rounds == narrow.rounds and wide.low <= narrow.low <= narrow.high <= wide.high
    assert wide.low <= truth <= wide.high and not narrow.low <= truth <= narrow.high
    near = [model.reach(curve, 0.0, np.zeros(400), 10, 0.6, size) for size in (0.0, error)]
    assert near[0] == near[1]  # within what was measured


def test_ranges_hold_what_committed_runs_took():
    found = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "plan.json").read_text())["results"]
    probes = {(one["method"]["name"], one["local_steps"]): one for one in found["probes"]}
    held = 0
    for run in found["runs"]:
        probe, local_steps = probes[run["fields"]["method"], run["fields"]["train.local_steps"]], run["fields"]["train.local_steps"]
        assert probe["better"] == "lower"
        error, middle = model.foresight(probe["steps"], [-loss for loss in probe["consensus"]], 0.0), run["planned"]["rounds"]
        low, high = model.widened(middle, *run["range"], error, middle * local_steps / probe["steps"][-1])
        held += low <= run["took"]["rounds"] <= high
    assert 0.8 * len(found["runs"]) <= held


def test_a_target_beyond_the_end_is_not_reached():
    steps = np.arange(0, 500, 10)
    curve = model.fit_curve(steps, 0.2 + 0.4 * (1 - np.exp(-steps / 60)), best=1.0)
    found = model.reach(curve, 0.0, np.zeros(1000), 10, 0.75)
    assert math.isinf(found.rounds) and math.isinf(found.high) and found.best == pytest.approx(0.6, abs=0.02)
    assert curve.reaches(0.75) < 0.1 < 0.9 < curve.reaches(0.5)
    flat = model.fit_curve([0, 10, 20], [0.5, 0.5, 0.5], best=1.0)
    assert math.isinf(model.reach(flat, 0.0, np.zeros(50), 10, 0.6).rounds)


def test_a_loss_falls_to_no_less_than_the_best():
    curve = model.fit_curve([0, 10, 20, 30], [-3.0, -2.5, -2.0, -1.5], best=0.0)
    assert curve.end.max() <= 0.0 and math.isinf(model.reach(curve, 0.0, np.zeros(10**4), 10, 0.1).rounds)


def test_a_curve_needs_three_points():
    with pytest.raises(ValueError, match=r"its start and two more points, got steps \[0, 10\]"):
        model.fit_curve([0, 10], [0.1, 0.2])
    with pytest.raises(ValueError, match="longer probe"):
        model.fit_curve([5, 10, 20], [0.1, 0.2, 0.3])


def test_the_cost_of_disagreement_is_found_and_never_negative():
    xi, consensus = np.linspace(0, 2, 9), np.linspace(0.2, 0.8, 9)
    assert model.fit_cost(0.2, consensus, 0.2 + (consensus - 0.2) * np.exp(-0.4 * xi), xi) == pytest.approx(0.4, rel=0.03)
    assert model.fit_cost(0.2, consensus, consensus + 0.05, xi) == 0.0
    assert model.fit_cost(0.2, consensus, consensus, np.zeros(9)) == 0.0


def test_disagreement_delays_the_target():
    curve = model.fit_curve(np.arange(0, 300, 10), 0.2 + 0.6 * (1 - np.exp(-np.arange(0, 300, 10) / 60)), 1.0)
    rounds = [model.reach(curve, 0.5, np.full(200, xi), 10, 0.6).rounds for xi in (0.0, 0.3, 5.0)]
    assert rounds[0] < rounds[1] < rounds[2] == math.inf


def test_ranks_correlate_as_spearman_has_it():
    assert compare.rank_correlation([1, 2, 3], [10, 20, 400]) == pytest.approx(1)
    assert compare.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert compare.rank_correlation([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(0.948683, abs=1e-6)  # scipy.stats.spearmanr
    assert compare.rank_correlation([1, 2], [1, 2]) is None and compare.rank_correlation([1, 1, 1], [1, 2, 3]) is None
