"""Gradient and momentum tracking against dense recursions, in their rows of the table, and what they refuse."""

import numpy as np
import pytest
import torch
from quadratics import NUM, RING, Given, descend, gradient
from toy import Toy

import topologies
from dfl import simulate
from dfl.methods import Choice


def matchings(t: int) -> np.ndarray:
    """A pairing drawn afresh in every round."""
    order, w = np.random.default_rng([5, t]).permutation(NUM), np.eye(NUM)
    for i, j in order.reshape(-1, 2):
        w[i, i] = w[j, j] = w[i, j] = w[j, i] = 0.5
    return w


def tracked(w, lr: float, rounds: int, d: int, momentum: float = 0.0) -> np.ndarray:
    """y <- W y + u_new - u_old, x <- W (x - lr y), dense."""
    x, y, u = np.zeros((NUM, d)), np.zeros((NUM, d)), np.zeros((NUM, d))
    for t in range(rounds):
        new = momentum * u + gradient(x)
        y = (w(t - 1) if t else np.eye(NUM)) @ y + new - u
        x, u = w(t) @ (x - lr * y), new
    return x


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_one_local_step_is_the_dense_recursion(momentum):
    """Under W(t) that changes as well."""
    wrapper = Choice("momentum_tracking", {"momentum": momentum}) if momentum else "gradient_tracking"
    lr = 0.05 * (1 - momentum)
    found = descend(wrapper, Given(matchings, period=None), rounds=60, lr=lr, d=3)
    np.testing.assert_allclose(found.x, tracked(matchings, lr, 60, 3, momentum), rtol=0, atol=1e-12)
    without = descend(Choice("momentum_tracking", {"momentum": 0}), Given(matchings, period=None), rounds=60, lr=lr, d=3)
    np.testing.assert_allclose(without.x, tracked(matchings, lr, 60, 3), rtol=0, atol=1e-12)


def test_local_steps_are_k_gt():
    """Y <- X; K times Y <- Y - lr (g(Y) + C); Z = (X - Y) / (K lr); C <- C - Z + W Z; X <- W Y."""
    x, c, lr, steps = np.zeros((NUM, 3)), np.zeros((NUM, 3)), 0.02, 4
    for _ in range(30):
        y = x.copy()
        for _ in range(steps):
            y -= lr * (gradient(y) + c)
        z = (x - y) / (steps * lr)
        c, x = c - z + RING @ z, RING @ y
    found = descend("gradient_tracking", "ring", rounds=30, lr=lr, d=3, local_steps=steps)
    np.testing.assert_allclose(found.x, x, rtol=0, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("wrapper, topology, given", [
    ("gradient_tracking", "ring", {"lr": 0.02, "local_steps": 4, "rounds": 400}),
    ("gradient_tracking", Given(matchings, period=None), {"lr": 0.05, "rounds": 600}),
    (Choice("momentum_tracking", {"momentum": 0.8}), "ring", {"lr": 0.01, "rounds": 350}),
])
def test_all_reach_the_optimum_of_all_however_unequal(wrapper, topology, given):
    assert descend(wrapper, topology, d=20, **given).rms < 1e-13


EXACT = ["gradient_tracking", "exact_diffusion", "d2", "led", "push_diging", *(Choice("flexatc", {"member": member}) for member in (
    "aug_dgm", "next", "extra", "diging", "dgd"))]


@pytest.mark.parametrize("wrapper", [*EXACT, Choice("proxskip", {"p": 0.4})], ids=str)
def test_equal_data_from_one_start_are_plain_descent(wrapper):
    """Everybody's gradient is the mean gradient: nothing to correct."""
    def local_step(factors, t, trains, after_step=lambda: None):
        for _ in range(3):
            factors["x"][0].sub_(0.1 * (factors["x"][0] - 2))
            after_step()

    a = torch.ones(NUM, 1, 2, dtype=torch.float64)
    found = simulate("lora", topologies.build("ring", NUM), {"x": (a, torch.zeros(NUM, 1, 1, dtype=torch.float64))}, local_step, 20,
                     wrapper=wrapper, lr=0.1, local_steps=3).factors["x"][0]
    torch.testing.assert_close(found, torch.full_like(found, 2 - 0.9 ** 60), rtol=0, atol=1e-13)


@pytest.mark.long
@pytest.mark.parametrize("wrapper, lr", [("gradient_tracking", 0.05), ("momentum_tracking", 0.005)])
def test_through_a_codec_of_differences_tracking_is_beer_and_motef_and_stays_exact(wrapper, lr):
    """A fifth of the numbers at a step of 0.2, d = 20: plain gossip ends at 1.256 there."""
    top = Choice("top_k", {"share": 0.2, "gamma": 0.2})
    assert descend(wrapper, "ring", rounds=300, lr=lr, d=20, codec=top).rms < 0.05


@pytest.mark.nightly
@pytest.mark.parametrize("wrapper, lr", [("gradient_tracking", 0.05), ("momentum_tracking", 0.005)])
def test_what_is_left_of_the_error_under_a_coarse_codec_is_rounding_to_float32(wrapper, lr):
    """3e-8 and 9e-8 after 1,500 rounds."""
    top = Choice("top_k", {"share": 0.2, "gamma": 0.2})
    assert descend(wrapper, "ring", rounds=1500, lr=lr, d=20, codec=top).rms < 1e-6


class TestRefusals:
    def test_weights_whose_columns_do_not_sum_to_one(self):
        star = topologies.build("star", NUM, weights="uniform")
        for graph in (star, Given(star.matrix(0), sums=None)):
            with pytest.raises(ValueError, match="wrapper.name = 'gradient_tracking' needs W.t. whose rows and columns sum to one"):
                descend("gradient_tracking", graph, rounds=1, lr=0.1)

    def test_a_local_step_that_cannot_be_corrected(self):
        toy = Toy(0)
        with pytest.raises(ValueError, match="wrapper = 'gradient_tracking' changes the rows after every local step"):
            simulate("lora", topologies.build("ring", 10), toy.factors(), lambda factors, t, trains: None, 1,
                     wrapper="gradient_tracking", lr=0.1, local_steps=1)

    def test_steps_and_rates_that_nobody_told(self):
        step = lambda factors, t, trains, after_step: factors["x"][0].add_(1)  # noqa: E731
        start = {"x": (torch.zeros(NUM, 1, 2), torch.zeros(NUM, 1, 1))}
        for given, said in (({"lr": 0.1}, "needs the number of local steps, got local_steps = 0"),
                            ({"local_steps": 1}, "needs the learning rate of what it corrects, got 0.0 for A")):
            with pytest.raises(ValueError, match=said):
                simulate("lora", topologies.build("ring", NUM), start, step, 1, wrapper="gradient_tracking", **given)

    def test_a_momentum_that_never_ends(self):
        with pytest.raises(ValueError, match="wrapper.momentum = 1.0 is not allowed; allowed: a number from 0 up to"):
            descend(Choice("momentum_tracking", {"momentum": 1.0}), "ring", rounds=1, lr=0.1)

    @pytest.mark.long
    @pytest.mark.parametrize("wrapper", ["exact_diffusion", "led"])
    def test_what_mixing_did_makes_grow_what_a_codec_leaves_for_later(self, wrapper):
        """Measured: 5e6 after 900 rounds at a share of a fifth."""
        for codec in (Choice("top_k", {"share": 0.2}), Choice("top_k", {"share": 0.2, "memory": "feedback"})):
            with pytest.raises(ValueError, match="what is left out for later makes that grow|sends a part of the numbers a round"):
                descend(wrapper, "ring", rounds=1, lr=0.1, codec=codec)
        assert descend(wrapper, "ring", rounds=250, lr=0.1, d=3, codec="int8").rms < 0.02

    def test_links_that_lose_messages(self):
        with pytest.raises(ValueError, match="loses messages, which 'lora' cannot have: what its peers keep has to cancel"):
            descend("gradient_tracking", "ring", rounds=1, lr=0.1, channel="lossy")
