"""Updates in place of models: plain averaging on a complete graph, in rounding and over the air; refused elsewhere."""

import numpy as np
import pytest
import torch
from quadratics import NUM, descend, gradient
from test_air import PEERS
from test_channels import heads

import topologies
from dfl import methods
from dfl.methods import Choice

COMPLETE = topologies.build("complete", NUM)


@pytest.mark.parametrize("local_steps", [1, 3])
def test_from_one_row_it_is_plain_averaging(local_steps):
    given = {"rounds": 30, "lr": 0.05, "d": 3, "local_steps": local_steps}
    found = descend("updates", COMPLETE, **given)
    np.testing.assert_allclose(found.x, descend("none", COMPLETE, **given).x, rtol=0, atol=1e-12)
    x = np.zeros((NUM, 3))
    for _ in range(30):
        y = x.copy()
        for _ in range(local_steps):
            y = y - 0.05 * gradient(y)
        x = x + (y - x).mean(0)
    np.testing.assert_allclose(found.x, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("codec", ["bfloat16", "int8", Choice("qsgd", {"memory": "none"})])
def test_rows_stay_one_under_a_codec_whose_errors_are_in_proportion_to_the_step(codec):
    given = {"rounds": 60, "lr": 0.05, "d": 8, "codec": codec}
    found = descend("updates", COMPLETE, **given).x
    assert (found == found[:1]).all()
    exact = descend("updates", COMPLETE, rounds=60, lr=0.05, d=8).x
    assert 0 < np.abs(found - exact).max() < 0.1


def test_rounds_in_which_nobody_speaks_add_up():
    """Local steps of three rounds are one update."""
    found = descend("updates", COMPLETE, rounds=9, lr=0.05, d=3, trigger=Choice("periodic", {"every": 3}))
    longer = descend("updates", COMPLETE, rounds=3, lr=0.05, d=3, local_steps=3)
    np.testing.assert_allclose(found.x, longer.x, rtol=0, atol=1e-12)


def left_over_the_air(payload: str, rounds: int) -> float:
    """The mean square distance of the mean model from the optimum at -10 dB, where the rate falls as 1 / (t + 1)."""
    wrapper = {"wrapper": ("updates",)} if payload == "gradient" else {}
    heart, x = heads(("over_the_air", {"payload": payload, "snr": -10.0, "fading": "none"}), spread=False,
                     topology=topologies.build("complete", PEERS), **wrapper)
    centres = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype) + 3
    for t in range(rounds):
        lr = 1 / (t + 2)
        x -= lr * (x - centres)
        heart.round(t, x, lr=lr, local_steps=1)
    return float((x.mean(0) - centres.mean(0)).square().mean())


@pytest.mark.long
def test_gradients_over_the_air_converge_as_the_rate_falls_and_models_do_not():
    """Noise of the size of models walks on, and nothing pulls it back any more; that of differences and steps vanishes."""
    early, late = ({payload: left_over_the_air(payload, rounds) for payload in ("gradient", "difference", "model")}
                   for rounds in (20, 200))
    assert late["gradient"] < 0.3 * early["gradient"] and late["difference"] < 0.3 * early["difference"]
    assert late["model"] > early["model"] and late["model"] > 20 * late["gradient"]


@pytest.mark.parametrize("given, words", [
    ({"channel": ("over_the_air", {"payload": "gradient"})}, "channel.payload = 'gradient' .* wrapper: updates"),
    ({"channel": ("over_the_air", {"payload": "gradient", "decay": 0.5}), "wrapper": ("updates",)}, "gamma 1 and decay 0"),
    ({"trigger": ("event",), "wrapper": ("updates",)}, "mean something in their own round alone")])
def test_what_does_not_go_together(given, words):
    with pytest.raises(ValueError, match=words):
        heads(**given)


def test_other_graphs_are_refused():
    for graph in (topologies.build("ring", PEERS), topologies.build("edge_activation", PEERS, p=0.5)):
        heart, _ = heads(wrapper=("updates",), topology=graph)
        with pytest.raises(ValueError, match="needs every peer to receive from every other|the same in every round"):
            methods.check_topology(heart.method, graph)
