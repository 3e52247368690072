"""FedSVD: the same orthonormal A at every peer, products untouched, and why the published step needs a complete graph."""

import numpy as np
import pytest
import torch
from one_round import build, gossip
from test_rules import LAYOUT, NUM, activation, complete, mix_once, pairing, product, random_rows, ring

import topologies
from dfl import methods, simulate
from dfl.adapters.layout import a_view, b_view

A = LAYOUT.groups["A"]


def common_a(dtype=torch.float64) -> torch.Tensor:
    x = random_rows().to(dtype)
    x[:, A] = x[0, A]
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_peer_turns_alike_even_one_that_is_alone(dtype):
    x = common_a(dtype)
    w = np.eye(NUM)
    w[:2, :2] = 0.5
    mixed = mix_once("fed_svd", x, w)
    assert all(torch.equal(row, mixed[0, A]) for row in mixed[:, A])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(product(mixed), product(mix_once("ffa", x, w)), rtol=0, atol=tolerance)
    for pair in LAYOUT.pairs:
        a = a_view(mixed, pair)
        torch.testing.assert_close(a @ a.mT, torch.eye(2, dtype=dtype).expand(NUM, 2, 2), rtol=0, atol=tolerance)


def test_it_happens_once_and_an_orthonormal_a_stays():
    x = mix_once("fed_svd", common_a(), ring())
    torch.testing.assert_close(mix_once("fed_svd", x, np.eye(NUM)), x, rtol=0, atol=1e-14)
    y = common_a()
    assert torch.equal(mix_once("fed_svd", y, ring(), t=1), mix_once("ffa", y, ring(), t=1))


def train_b(factors, t, trains):
    assert trains == {"B"}
    for a, b in factors.values():
        target = torch.randn(len(a), b.shape[1], a.shape[2], dtype=a.dtype, generator=torch.Generator().manual_seed(1))
        b -= 0.3 * (b @ a - target) @ a.mT


@pytest.mark.parametrize("form, topology", [("orthonormal", activation(0.1)), ("spectral", topologies.build("complete", 10))])
def test_no_cross_term_and_one_a_over_many_rounds(form, topology):
    a = torch.randn(1, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(10, 4, 12).clone()
    start = {"x": (a, torch.zeros(10, 9, 4, dtype=torch.float64))}
    result = simulate("fed_svd", topology, start, train_b, 15, form=form)
    assert max(m["cross_term"] for m in result.measures) < 1e-12
    new_a, new_b = result.factors["x"]
    assert (new_a == new_a[0]).all() and (new_b @ new_a).norm() > 1
    # the space of the rows of A is the one it began with, in both forms
    rows = torch.linalg.qr(a[0].mT).Q
    torch.testing.assert_close(new_a @ rows @ rows.mT, new_a, rtol=0, atol=1e-10)


def test_the_published_step_is_the_svd_of_the_mean():
    x = common_a()
    mixed = mix_once("fed_svd", x, complete(), form="spectral")
    for pair in LAYOUT.pairs:
        mean = b_view(x, pair).numpy().mean(0) @ a_view(x, pair)[0].numpy()
        u, s, vh = np.linalg.svd(mean, full_matrices=False)
        np.testing.assert_allclose(b_view(mixed, pair)[4] @ a_view(mixed, pair)[4], mean, atol=1e-12)
        np.testing.assert_allclose(a_view(mixed, pair)[4].abs(), np.abs(vh[:2]), atol=1e-10)
        np.testing.assert_allclose(b_view(mixed, pair)[4].abs(), np.abs(u[:, :2] * s[:2]), atol=1e-10)


def test_the_published_step_is_refused_where_a_would_differ():
    rule = build("fed_svd", LAYOUT, form="spectral")
    with pytest.raises(ValueError, match="needs every peer to receive from every other"):
        methods.check_topology(rule.method, topologies.build("ring", NUM))
    # what would happen: other B, another eigenbasis, another A, and a cross term in the next mix
    x = common_a()
    states = [rule.init(row) for row in x]
    gossip(rule, x, states, pairing(), 0)
    assert (x[0, A] - x[2, A]).abs().max() > 0.1
    with pytest.raises(ValueError, match="method.form = 'svd'"):
        build("fed_svd", LAYOUT, form="svd")


def test_nothing_to_factor_keeps_a():
    x = common_a()
    x[:, LAYOUT.groups["B"]] = 0
    assert torch.equal(mix_once("fed_svd", x, complete(), form="spectral"), x)
