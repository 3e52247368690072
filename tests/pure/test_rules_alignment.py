"""FedRot: frames at the receiver and at the sender, against dense numpy and its limits."""

import numpy as np
import pytest
import torch
from one_round import build, gossip
from test_rules import (
    LAYOUT,
    NUM,
    activation,
    assert_same,
    complete,
    mix_once,
    pairing,
    product,
    random_rows,
    ring,
    simulated,
    turned,
)

from dfl.adapters.layout import a_view, b_view


def dense_rotation(a, b, ref_a, ref_b, criterion, strength):
    """The published rotation in plain numpy, one pair."""
    if criterion == "joint":
        m = a @ ref_a.T / (ref_a ** 2).sum() + b.T @ ref_b / (ref_b ** 2).sum()
    else:
        m = a @ ref_a.T if criterion == "A" else b.T @ ref_b
    u, _, vh = np.linalg.svd(m)
    if strength < 1:
        if np.linalg.det(u @ vh) < 0:
            u[:, -1] *= -1
        u, _, vh = np.linalg.svd((1 - strength) * np.eye(len(m)) + strength * u @ vh)
    return u @ vh


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("criterion", ["A", "B", "joint", "alternate"])
@pytest.mark.parametrize("t", [0, 1])
def test_receivers_are_the_dense_ones(criterion, strength, t):
    x, w = random_rows(), ring()
    mixed = mix_once("fedrot", x, w, t, criterion=criterion, strength=strength)
    by = {"alternate": "BA"[t]}.get(criterion, criterion)
    for pair in LAYOUT.pairs:
        a, b = a_view(x, pair).numpy(), b_view(x, pair).numpy()
        for i in range(NUM):
            turn = [np.eye(2) if i == j else dense_rotation(a[j], b[j], a[i], b[i], by, strength) for j in range(NUM)]
            np.testing.assert_allclose(a_view(mixed, pair)[i], sum(w[i, j] * turn[j].T @ a[j] for j in range(NUM)), atol=1e-10)
            np.testing.assert_allclose(b_view(mixed, pair)[i], sum(w[i, j] * b[j] @ turn[j] for j in range(NUM)), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("params", [{}, {"side": "sender"}, {"reference": "start"}])
def test_without_turning_it_is_lora_to_the_bit(dtype, params):
    x = random_rows().to(dtype)
    assert torch.equal(mix_once("fedrot", x, ring(), 1, strength=0, head="mixed", **params), mix_once("lora", x, ring(), head="mixed"))
    assert build("fedrot", LAYOUT, strength=0).linear and not build("fedrot", LAYOUT).linear


@pytest.mark.parametrize("criterion", ["A", "B", "joint"])
def test_rotated_copies_of_one_pair_are_averaged_exactly(criterion):
    one = random_rows(num=1).expand(NUM, -1)
    turn = torch.linalg.qr(torch.randn(NUM, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    x = turned(one, turn)
    torch.testing.assert_close(mix_once("fedrot", x, ring(), criterion=criterion), x, rtol=0, atol=1e-10)  # each in its own frame
    assert (product(mix_once("lora", x, ring())) - product(one)).norm() > 1


def test_the_sender_turns_to_where_it_began_the_round():
    """Two rounds of the server method on a complete graph in plain numpy: round 0 as it is, then A's frame."""
    rule, x = build("fedrot", LAYOUT, side="sender"), random_rows()
    states = [rule.init(row) for row in x]
    gossip(rule, x, states, complete(), 0)
    start, step = x.clone(), 0.5 * random_rows(9)
    x = x + step
    trained = x.clone()
    gossip(rule, x, states, complete(), 1)
    for pair in LAYOUT.pairs:
        refs = a_view(start, pair).numpy(), b_view(start, pair).numpy()
        a, b = a_view(trained, pair).numpy(), b_view(trained, pair).numpy()
        turn = [dense_rotation(a[j], b[j], refs[0][j], refs[1][j], "A", 1.0) for j in range(NUM)]
        np.testing.assert_allclose(a_view(x, pair)[3], np.mean([turn[j].T @ a[j] for j in range(NUM)], 0), atol=1e-10)
        np.testing.assert_allclose(b_view(x, pair)[3], np.mean([b[j] @ turn[j] for j in range(NUM)], 0), atol=1e-10)
    assert build("fedrot", LAYOUT, side="sender").facts["criterion"] == "alternate"


@pytest.mark.parametrize("params", [{"side": "sender"}, {"reference": "start"}])
def test_a_peer_that_was_alone_began_where_it_was(params):
    rule, x = build("fedrot", LAYOUT, **params), random_rows()
    states = [rule.init(row) for row in x]
    for t, w in enumerate((np.eye(NUM), pairing(), np.eye(NUM))):
        gossip(rule, x, states, w, t)
        for row, state in zip(x, states, strict=True):
            assert torch.equal(state["start"], row[:LAYOUT.groups["B"].stop])
        x = x + 0.1


def test_all_sides_learn_and_turning_matters():
    variants = ({}, {"strength": 0.5}, {"side": "sender"}, {"criterion": "joint"})
    runs = [simulated("fedrot", activation(), **params) for params in variants]
    plain = simulated("lora", activation())
    for run in runs:
        assert (run.factors["toy"][0] - plain.factors["toy"][0]).abs().max() > 1e-6
    assert_same(simulated("fedrot", activation(), strength=0), plain, atol=0)


@pytest.mark.parametrize("params, message", [
    ({"side": "server"}, "method.side = 'server' is not allowed; allowed: receiver, sender"),
    ({"criterion": "C"}, "method.criterion = 'C'"),
    ({"strength": 1.5}, "method.strength = 1.5 is not allowed; allowed: a number from 0 to 1"),
    ({"strength": True}, "method.strength"),
    ({"reference": "mean"}, "method.reference = 'mean'"), ({"side": "sender", "reference": "trained"}, "does not fit")])
def test_bad_values_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build("fedrot", LAYOUT, **params)
