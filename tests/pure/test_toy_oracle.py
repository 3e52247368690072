"""The toy oracle: published orderings and means of plain, alternating and product gossip, and a dense numpy twin."""

from functools import cache

import numpy as np
import pytest
import torch
from toy import LR, PEERS, STEPS, SideBySide, Toy, Toys

import topologies
from dfl import simulate
from dfl.adapters.layout import pack
from dfl.metrics.measures import mixing_errors, seen

ROUNDS = 150
SEEDS = range(5)
METHODS = {"lora": ("lora", {}), "rolora": ("rolora", {}), "decaf": ("decaf", {}), "decaf_left": ("decaf", {"split": "left"}),
           **{f"tad_{T}": ("tad", {"T": T}) for T in (1, 3, 5, 10, 15)}}
COLUMNS = ("lora", "rolora", "tad_1", "tad_3", "tad_5", "tad_15")
LOSS = {1.0: (1.289, 1.228, 1.228, 1.228, 1.228, 1.228),
        0.5: (1.696, 1.519, 1.344, 1.301, 1.287, 1.272),
        0.1: (4.985, 4.036, 3.144, 2.358, 1.990, 1.691),
        0.02: (9.937, 9.512, 7.769, 6.482, 5.138, 3.000)}
DECAF = {1.0: (1.253, 1.311), 0.5: (1.639, 1.647), 0.1: (5.62, 4.16), 0.02: (10.16, 7.97)}
DEVIATION = {0.5: (0.151, 0.410, 0.031, 0.014, 0.008, 0.002),
             0.1: (0.252, 0.656, 0.103, 0.064, 0.042, 0.014),
             0.02: (0.168, 0.418, 0.116, 0.086, 0.062, 0.025)}

toy = cache(Toy)
toys = cache(lambda: Toys(SEEDS))


@cache
def graph(p: float, seed: int):
    return topologies.build("edge_activation", PEERS, p=p, base="complete", seed=100 + seed)


@cache
def graphs(p: float):
    """Those of all seeds; with p = 1 they are one graph."""
    return graph(p, 0) if p == 1 else SideBySide(graph(p, seed) for seed in SEEDS)


@cache
def run(method: str, p: float, rounds: int = ROUNDS) -> tuple[float, float]:
    """Mean over seeds of the peer loss at the end, and of the deviation from product consensus in the last 50 rounds."""
    rule, params = METHODS[method]
    trained, deviations = None, []

    def step(factors, t, trains):
        nonlocal trained
        if trained is not None:  # what they hold is what the round before left them
            deviations.append(deviation(trained, factors, p, t - 1))
        toys().local_step(factors, t, trains)
        trained = copies(factors) if t >= rounds - 50 else None

    result = simulate(rule, graphs(p), toys().factors(layers=p == 1), step, rounds, measure_every=0, **params)
    deviations.append(deviation(trained, result.factors, p, rounds - 1))
    losses = [one.peer_loss(own) for one, own in zip(toys().toys, toys().apart(result.factors), strict=True)]
    return float(np.mean(losses)), float(np.mean(deviations))


def copies(factors: dict) -> dict:
    return {name: (a.clone(), b.clone()) for name, (a, b) in factors.items()}


def deviation(before: dict, after: dict, p: float, t: int) -> float:
    """Mean over seeds of what round t, mixing `before` into `after`, leaves each peer apart from product consensus."""
    looks = [seen(pack(old)[1], pack(new)[1], graph(p, seed).matrix(t), range(len(pack(old)[1])), pack(old)[0])
             for seed, old, new in zip(SEEDS, toys().apart(before), toys().apart(after), strict=True)]
    return np.mean([float(mixing_errors(look).aggregation_error.mean()) for look in looks])


@pytest.mark.long
def test_seeds_at_once_are_the_seeds_one_by_one():
    for p, rule in ((0.3, "lora"), (1.0, "decaf")):
        together = simulate(rule, graphs(p), toys().factors(p == 1), toys().local_step, 7, measure_every=0)
        for seed, own in zip(SEEDS, toys().apart(together.factors), strict=True):
            alone = simulate(rule, graph(p, seed), toy(seed).factors(), toy(seed).local_step, 7, measure_every=0)
            for one, other in zip(own["toy"], alone.factors["toy"], strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.long
@pytest.mark.parametrize("p", LOSS)
def test_peer_loss_is_the_published_one(p):
    for method, expected in zip(COLUMNS, LOSS[p], strict=True):
        assert run(method, p)[0] == pytest.approx(expected, rel=0.20), method


@pytest.mark.long
@pytest.mark.parametrize("p", DECAF)
def test_product_mixing_is_the_published_one(p):
    # the published means are of three seeds, each with a standard deviation of about 20 % in the sparse cells; the left split at
    # p = 0.02 is the one cell that lies beyond a fifth
    for method, expected in zip(("decaf", "decaf_left"), DECAF[p], strict=True):
        tolerance = 0.25 if (method, p) == ("decaf_left", 0.02) else 0.20
        assert run(method, p)[0] == pytest.approx(expected, rel=tolerance), method


@pytest.mark.long
@pytest.mark.parametrize("p", DEVIATION)
def test_deviation_from_product_consensus_is_the_published_one(p):
    for method, expected in zip(COLUMNS, DEVIATION[p], strict=True):
        # the table is rounded to three decimals
        assert abs(run(method, p)[1] - expected) <= 0.20 * expected + 5e-4, method


@pytest.mark.long
def test_orderings():
    for p in (0.5, 0.1, 0.02):
        losses = [run(m, p)[0] for m in COLUMNS]
        assert losses == sorted(losses, reverse=True), p
        lora, rolora, *tad = (run(m, p)[1] for m in COLUMNS)
        assert rolora > lora > tad[0]
        assert tad == sorted(tad, reverse=True), p
    gains = [run("lora", p)[0] / run("tad_15", p)[0] for p in (0.5, 0.1, 0.02)]
    assert gains == sorted(gains)


@pytest.mark.long
def test_alternation_has_no_deviation_at_full_connectivity():
    assert run("lora", 1.0)[1] == pytest.approx(0.084, rel=0.20)
    for method in COLUMNS[1:]:
        assert run(method, 1.0)[1] < 1e-7


@pytest.mark.long
def test_an_interval_that_ends_in_b_looks_worse_than_it_is():
    assert run("tad_10", 0.1, 150)[0] == pytest.approx(2.298, rel=0.20)
    assert run("tad_10", 0.1, 160)[0] == pytest.approx(1.764, rel=0.20)


def dense_twin(problem: Toy, method: str, interval: int, ws: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The same run in plain numpy: dense matrices, einsum over W, an SVD of each full product."""
    a = np.broadcast_to(problem.a0, (PEERS, *problem.a0.shape)).copy()
    b = np.zeros((PEERS, a.shape[2], a.shape[1]))
    for t, w in enumerate(ws):
        noise = problem.noise(t)
        active = {"lora": "AB", "decaf": "AB", "ffa": "B"}.get(method, "BA"[(t // interval) % 2])
        for k in range(STEPS):
            residual = b @ a - problem.targets
            grad_a = b.transpose(0, 2, 1) @ residual + noise[k, 0]
            grad_b = residual @ a.transpose(0, 2, 1) + noise[k, 1].transpose(0, 2, 1)
            a = a - LR * grad_a if "A" in active else a
            b = b - LR * grad_b if "B" in active else b
        if method == "decaf":
            a, b = dense_decaf(a, b, w)
        else:
            mixed = active if method in ("rolora", "ffa") else "AB"
            a = np.einsum("ij,jrk->irk", w, a) if "A" in mixed else a
            b = np.einsum("ij,jor->ior", w, b) if "B" in mixed else b
    return a, b


def dense_decaf(a, b, w):
    rank, new_a, new_b = a.shape[1], a.copy(), b.copy()
    for i in range(len(w)):
        if np.count_nonzero(w[i]) > 1:
            u, s, vh = np.linalg.svd(np.einsum("j,jor,jrk->ok", w[i], b, a))
            u, s, vh = u[:, :rank], s[:rank], vh[:rank]
            sign = np.sign(vh[np.arange(rank), np.abs(vh).argmax(1)])
            new_a[i] = np.sqrt(s)[:, None] * vh * sign[:, None]
            new_b[i] = np.sqrt(s) * u * sign
    return new_a, new_b


@pytest.mark.parametrize("method, params, interval", [("lora", {}, 1), ("ffa", {}, 1), ("rolora", {}, 1), ("adf", {"T": 3}, 3),
                                                      ("tad", {"T": 2}, 2), ("decaf", {}, 1)])
def test_a_plain_numpy_loop_agrees(method, params, interval):
    problem, topology = toy(0), graph(0.2, 0)
    result = simulate(method, topology, problem.factors(), problem.local_step, 12, measure_every=0, **params)
    a, b = dense_twin(problem, method, interval, [topology.matrix(t) for t in range(12)])
    np.testing.assert_allclose(result.factors["toy"][0], a, atol=1e-10, rtol=0)
    np.testing.assert_allclose(result.factors["toy"][1], b, atol=1e-10, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "rolora", "tad_15", "decaf"])
def test_the_guard_rejects_nobody_who_is_honest(method):
    """Peers that hardly ever meet drift far apart; B begins at zero."""
    rule, params = METHODS[method]
    result = simulate(rule, graph(0.02, 0), toy(0).factors(), toy(0).local_step, ROUNDS, guard="norm", **params)
    assert sum(m["edges"] for m in result.measures) > 100 and sum(m["rejected"] for m in result.measures) == 0
