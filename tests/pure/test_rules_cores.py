"""Adapters that train cores between frozen bases: their factors, their gradients, and exact mixing."""

import numpy as np
import pytest
import torch
from one_round import build, gossip

import topologies
from dfl.adapters.cores import blocks, expand, make_cores, pull_back, start
from dfl.adapters.cores import fold_scales as fold
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout

NUM = 5
LORA = make_layout([("q", 6, 11, 9, 0.5), ("o", 6, 8, 12, 2.0)], [("head", (3, 2))])
HEADS = {"fed_sb": 1, "ravan": 3}
kinds = pytest.mark.parametrize("kind", HEADS)


def made(kind):
    cores = make_cores(LORA, [("head", (3, 2))], blocks(HEADS[kind], scaled=kind == "ravan"), seed=0)
    return cores._replace(bases=cores.bases.double())


def rows(cores):
    x = empty_rows(NUM, cores.layout.size, dtype=torch.float64)
    return x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def factors(cores, x):
    out = empty_rows(len(x), LORA.size, dtype=torch.float64)
    expand(cores, x, out)
    return out


def dense(cores, x):
    """sum_h s_h B_h H_h A_h by layer, from the definition (N, O, I)."""
    found = {}
    for index, pair in enumerate(LORA.pairs):
        h = cores.values(x, index)["core"].numpy()
        s = cores.values(x, index)["scales"].numpy() if "scales" in cores.values(x, index) else np.ones(h.shape[:2])
        a, b = a_view(cores.bases, pair).numpy(), b_view(cores.bases, pair).numpy()
        heads, size = h.shape[1], h.shape[2]
        found[pair.name] = sum(s[:, k, None, None] * (b[:, k * size:(k + 1) * size] @ h[:, k] @ a[k * size:(k + 1) * size])
                               for k in range(heads))
    return found


def products(x):
    return {p.name: (b_view(x, p) @ a_view(x, p)).numpy() for p in LORA.pairs}


@kinds
def test_factors_are_the_definition(kind):
    cores = made(kind)
    x = rows(cores)
    for name, value in products(factors(cores, x)).items():
        np.testing.assert_allclose(value, dense(cores, x)[name], atol=1e-12)
    np.testing.assert_array_equal(factors(cores, x)[:, LORA.groups["head"]], x[:, cores.layout.groups["head"]])
    zero = factors(cores, start(cores).double()[None])
    assert all((value == 0).all() for value in products(zero).values())


@kinds
def test_bases_are_orthonormal_and_the_seeds(kind):
    cores, again = made(kind), made(kind)
    assert torch.equal(cores.bases, again.bases)
    for pair in LORA.pairs:
        eye = torch.eye(pair.rank, dtype=torch.float64)
        a, b = a_view(cores.bases, pair), b_view(cores.bases, pair)
        torch.testing.assert_close(a @ a.mT, eye, rtol=0, atol=1e-6)
        torch.testing.assert_close(b.mT @ b, eye, rtol=0, atol=1e-6)


@kinds
def test_the_gradient_of_the_cores_is_autograds(kind):
    cores = made(kind)
    x = rows(cores)
    weight = torch.randn(NUM, LORA.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaf = x.clone().requires_grad_()
    total = 0.0
    for index, pair in enumerate(LORA.pairs):  # a loss that is linear in B and in the head, so that its gradient is `weight`
        values = cores.values(leaf, index)
        h, s = values["core"], values["scales"][..., None, None] if "scales" in values else 1.0
        b = (b_view(cores.bases, pair).unflatten(-1, (HEADS[kind], -1)).movedim(-2, 0) @ (s * h)).movedim(-3, -2).flatten(-2)
        total = total + (b * b_view(weight, pair)).sum()
    total = total + (leaf[:, cores.layout.groups["head"]] * weight[:, LORA.groups["head"]]).sum()
    total.backward()
    found = torch.zeros_like(x)
    pull_back(cores, x, weight, found)
    torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-12)


@kinds
@pytest.mark.parametrize("graph", ["ring", "complete"])
def test_mixing_is_exact_for_any_graph(kind, graph):
    cores, w = made(kind), topologies.build(graph, NUM).matrix(0)
    x = rows(cores)
    before, rule = dense(cores, x), build(kind, cores.layout, head="mixed")
    out = x.clone()
    traffic = gossip(rule, out, [{}] * NUM, w, 0)
    for name, value in dense(cores, out).items():
        np.testing.assert_allclose(value, np.einsum("ij,jok->iok", w, before[name]), atol=1e-12)
    # R² numbers a layer (heads r² of them for RAVAN, with a scale each), and the head
    heads = HEADS[kind]
    per_layer = heads * (6 // heads) ** 2 + (heads if kind == "ravan" else 0)
    assert traffic.message_bytes == 8 * traffic.messages * (2 * per_layer + 6)
    if kind == "ravan":
        assert all(torch.allclose(cores.values(out, k)["scales"], torch.ones((), dtype=torch.float64)) for k in range(2))


@kinds
def test_alone_nothing_changes(kind):
    cores = made(kind)
    x = rows(cores)
    out = x.clone()
    gossip(build(kind, cores.layout), out, [{}] * NUM, np.eye(NUM), 0)
    assert torch.equal(out, x)


def test_folded_scales_change_no_product():
    cores = made("ravan")
    x = rows(cores)
    for name, value in dense(cores, fold(cores.layout, x)).items():
        np.testing.assert_allclose(value, dense(cores, x)[name], atol=1e-12)
