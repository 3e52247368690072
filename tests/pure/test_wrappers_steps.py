"""Exact diffusion, D2, quasi-global momentum, outer steps and adaptive consensus: dense recursions, limit cases, refusals."""

import numpy as np
import pytest
import torch
from quadratics import NUM, RING, Given, descend, gradient

import topologies
from dfl.adapters.layout import make_layout
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, Context, build
from dfl.simulation import Rows
from dfl.transport import InProcess
from dfl.wrappers.stability import growth, mean_square, moments

START = np.random.default_rng(1).standard_normal((NUM, 3))
HYPERCUBE = topologies.build("hypercube", NUM)
MATCHINGS = topologies.build("hypercube_matching", NUM)


def close(found, expected) -> None:
    np.testing.assert_allclose(found.x, expected, rtol=0, atol=1e-12)


def test_d2_is_its_recursion():
    """x_1 = W (x_0 - lr g_0);  x_{t+1} = W (2 x_t - x_{t-1} - lr (g_t - g_{t-1}))."""
    lr, before = 0.1, START
    x = RING @ (before - lr * gradient(before))
    for _ in range(39):
        x, before = RING @ (2 * x - before - lr * (gradient(x) - gradient(before))), x
    close(descend("d2", "ring", rounds=40, lr=lr, d=3, start=START), x)


def test_exact_diffusion_is_d2_with_the_lazy_matrix():
    lazy = Given((np.eye(NUM) + RING) / 2)
    given = {"rounds": 40, "lr": 0.1, "d": 3, "start": START}
    close(descend("exact_diffusion", "ring", **given), descend("d2", lazy, **given).x)


def test_exact_diffusion_in_its_primal_and_dual_form():
    """z = x - lr g - y;  x <- (I + W) / 2 z;  y <- y + z - x."""
    x, y = START, np.zeros((NUM, 3))
    for _ in range(40):
        z = x - 0.1 * gradient(x) - y
        x = (z + RING @ z) / 2
        y = y + z - x
    close(descend("exact_diffusion", "ring", rounds=40, lr=0.1, d=3, start=START), x)


@pytest.mark.parametrize("wrapper", ["exact_diffusion", "d2"])
def test_graphs_that_change_reach_the_optimum_or_are_refused(wrapper):
    """W(t) that change: the same fixed point, where disagreement does not grow by itself."""
    for graph in (MATCHINGS, topologies.build("edge_activation", NUM, p=0.05)):
        if wrapper == "exact_diffusion" and graph is MATCHINGS:
            assert descend(wrapper, graph, rounds=400, lr=0.1, d=3).rms < 1e-12
        else:
            with pytest.raises(ValueError, match=f"wrapper.name = '{wrapper}' diverges on topology.name = .* grows by"):
                descend(wrapper, graph, rounds=1, lr=0.1)


def test_d2_is_refused_where_it_diverges():
    """lambda_min of the hypercube is -1/2; of a ring of eight exactly -1/3, where it still converges."""
    with pytest.raises(ValueError, match="lambda_min.W. < -1/3, and that of topology.name = 'hypercube' is -0.5000"):
        descend("d2", HYPERCUBE, rounds=1, lr=0.1)
    w, before = HYPERCUBE.matrix(0), START
    x = w @ (before - 0.05 * gradient(before))
    for _ in range(60):  # what the refusal is for
        x, before = w @ (2 * x - before - 0.05 * (gradient(x) - gradient(before))), x
    assert np.abs(x).max() > 1e5
    assert descend("exact_diffusion", HYPERCUBE, rounds=300, lr=0.1).largest < 1e-10


class TestQuasiGlobal:
    def test_is_its_recursion(self):
        x, m, lr = START, np.zeros((NUM, 3)), 0.05
        for _ in range(30):
            new = RING @ (x - lr * (0.8 * m + gradient(x)))
            m, x = 0.6 * m + 0.4 * (x - new) / lr, new
        close(descend(Choice("quasi_global", {"momentum": 0.8, "keep": 0.6}), "ring", rounds=30, lr=lr, d=3, start=START), x)

    def test_without_momentum_it_is_the_rule(self):
        given = {"rounds": 20, "lr": 0.05, "d": 3, "local_steps": 3, "start": START}
        close(descend(Choice("quasi_global", {"momentum": 0.0}), "ring", **given), descend("none", "ring", **given).x)


class TestOuter:
    def test_is_the_momentum_of_noloco(self):
        """m <- mu m + gamma mean(Delta) + gamma (mean(phi) - phi);  phi <- phi + m, in pairs."""
        phi, m, lr = START, np.zeros((NUM, 3)), 0.05
        for t in range(20):
            p, w = phi, MATCHINGS.matrix(t)
            for _ in range(4):
                p = p - lr * gradient(p)
            m = 0.5 * m + 0.7 * (w @ (p - phi)) + 0.7 * (w @ phi - phi)
            phi = phi + m
        close(descend("outer", MATCHINGS, rounds=20, lr=lr, d=3, local_steps=4, start=START), phi)

    def test_a_full_step_without_momentum_is_the_rule_to_the_bit(self):
        given = {"rounds": 20, "lr": 0.05, "d": 3, "local_steps": 3, "start": START}
        full = descend(Choice("outer", {"lr": 1.0, "momentum": 0.0}), "ring", **given)
        assert (full.x == descend("none", "ring", **given).x).all()

    @pytest.mark.parametrize("momentum, limit", [(0.0, 2.0), (0.3, 1.82), (0.5, 1.5), (0.7, 1.02), (0.8, 0.72), (0.9, 0.38),
                                                 (0.95, 0.195)])
    def test_random_pairs_stay_together_up_to_the_limit(self, momentum, limit):
        """Many peers: W of a random pairing is a projection with E[W] = 1/2 beside the mean."""
        assert mean_square(momentum, limit - 0.006, 0.5, 0.5) < 1 < mean_square(momentum, limit + 0.006, 0.5, 0.5)

    def test_diloco_diverges_in_pairs_and_noloco_does_not(self):
        assert mean_square(0.9, 0.7, 0.5, 0.5) == pytest.approx(1.098, abs=1e-3)
        assert mean_square(0.5, 0.7, 0.5, 0.5) == pytest.approx(0.700, abs=1e-3)
        assert mean_square(0.9, 0.69, 0.25, 0.25) < 1  # groups of four
        pairs = topologies.build("random_matching", NUM)
        assert moments(pairs) == pytest.approx((3 / 7, 3 / 7))
        with pytest.raises(ValueError, match="wrapper.lr = 0.7 with wrapper.momentum = 0.9 is unstable on topology.name"):
            descend(Choice("outer", {"momentum": 0.9}), pairs, rounds=1, lr=0.1)
        assert descend("outer", pairs, rounds=3, lr=0.1).measures
        assert descend(Choice("outer", {"momentum": 0.9}), "complete", rounds=3, lr=0.1).measures

    def test_growth_is_the_root_of_the_recursion(self):
        """One W for ever: of z^2 - (1 + mu - gamma (1 - lambda)) z + mu for the smallest eigenvalue."""
        def recursion(mix, t, state):
            m = 0.9 * state[1] + 2.9 * (mix(state[0]) - state[0])
            return np.stack([state[0] + m, m])
        largest = np.abs(np.roots([1, -(1.9 - 2.9 * 4 / 3), 0.9])).max()
        assert growth(topologies.build("ring", NUM), recursion, 2) == pytest.approx(largest, rel=2e-3)
        with pytest.raises(ValueError, match="is unstable on topology.name = 'ring': disagreement grows by"):
            descend(Choice("outer", {"lr": 2.9, "momentum": 0.9}), "ring", rounds=1, lr=0.1)


class TestAdaptiveConsensus:
    def test_a_constant_rate_is_the_rule_to_the_bit(self):
        given = {"rounds": 20, "lr": 0.05, "d": 3, "start": START}
        assert (descend("adaptive_consensus", "ring", **given).x == descend("none", "ring", **given).x).all()

    def test_gamma_is_how_far_it_goes(self):
        x = START
        for _ in range(10):
            x = x - 0.05 * gradient(x)
            x = x + 0.3 * (RING @ x - x)
        close(descend(Choice("adaptive_consensus", {"gamma": 0.3}), "ring", rounds=10, lr=0.05, d=3, start=START), x)

    def test_a_disagreement_stays_where_plain_gossip_loses_it(self):
        """The rate falls a hundredfold: what is left of the disagreement falls with it, or not."""
        left, layout = {}, make_layout([("x", 1, 1, 1, 1.0)])
        for wrapper in ("none", "adaptive_consensus"):
            method = build("lora", Context(layout), {}, {"wrapper": Choice(wrapper)})
            x = torch.zeros(NUM, 2, dtype=torch.float64)
            heart, spread = Gossip(method, layout, Rows(Given(RING)), InProcess(), range(NUM), x), []
            for t in range(200):
                lr = 0.1 if t < 50 else max(0.1 * 0.96 ** (t - 50), 0.001)
                x[:, :1] -= lr * torch.from_numpy(gradient(x[:, :1].numpy()))
                heart.round(t, x, lr=lr, local_steps=1)
                spread.append(float(x[:, 0].std()))
            left[wrapper] = spread[-1] / spread[49]
        assert left["none"] < 0.05 and left["adaptive_consensus"] > 0.5


@pytest.mark.parametrize("wrapper, params, said", [
    ("quasi_global", {"momentum": 1.5}, "wrapper.momentum = 1.5 is not allowed"),
    ("quasi_global", {"keep": -1}, "wrapper.keep = -1"),
    ("outer", {"lr": 0}, "wrapper.lr = 0 is not allowed; allowed: a number above 0"),
    ("outer", {"momentum": 1}, "wrapper.momentum = 1"),
    ("adaptive_consensus", {"gamma": 2}, "wrapper.gamma = 2 is not allowed"),
    ("adaptive_consensus", {"power": "x"}, "wrapper.power = 'x'"),
])
def test_parameters_that_are_none(wrapper, params, said):
    with pytest.raises(ValueError, match=said):
        descend(Choice(wrapper, params), "ring", rounds=1, lr=0.1)
