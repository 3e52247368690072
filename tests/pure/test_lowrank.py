"""The low-rank kernel against dense numpy."""

import numpy as np
import pytest
import torch

from dfl.factors import make_layout, pack
from dfl.lowrank import product_gram, truncate, weighted_sum
from dfl.measures import aggregation_error, consensus_distance, cross_term, product_distance

SHAPES = [(6, 5, 2, 3), (5, 9, 3, 1), (4, 4, 4, 5), (12, 3, 1, 4)]  # O, I, R, J; also J R > min(O, I)


def pairs(out, inp, rank, num, seed=0, layers=2):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(num, layers, rank, inp, dtype=torch.float64, generator=generator)
    return a, torch.randn(num, layers, out, rank, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("out, inp, rank, num", SHAPES)
def test_truncation_is_the_dense_one(out, inp, rank, num):
    a, b = pairs(out, inp, rank, num)
    weights = torch.arange(1, num + 1, dtype=torch.float64) / 7
    dense = torch.einsum("j,jlor,jlri->loi", weights, b, a).numpy()
    u, s, vh = np.linalg.svd(dense, full_matrices=False)
    svd = truncate(*weighted_sum(weights, a, b), rank)
    best = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
    np.testing.assert_allclose((svd.u * svd.s[:, None]) @ svd.vh, best, atol=1e-10)
    np.testing.assert_allclose(svd.error, np.sqrt((s[:, rank:] ** 2).sum(1)), atol=1e-10)
    np.testing.assert_allclose(svd.error, np.linalg.norm(dense - best, axis=(1, 2)), atol=1e-10)


def test_rank_deficient_input():
    a, b = pairs(6, 5, 3, 2)
    a[1], b[1] = a[0], -b[0]  # the sum is zero
    svd = truncate(*weighted_sum(torch.ones(2), a, b), 3)
    assert svd.s.abs().max() < 1e-12 and torch.isfinite(svd.u).all()


def test_rank_beyond_the_core_is_padded():
    a, b = pairs(2, 3, 1, 1)
    svd = truncate(*weighted_sum(torch.ones(1), a, b), 3)
    assert svd.u.shape == (2, 2, 3) and (svd.s[:, 1:] == 0).all()
    np.testing.assert_allclose((svd.u * svd.s[:, None]) @ svd.vh, b[0] @ a[0], atol=1e-12)


def test_signs_are_fixed():
    a, b = pairs(6, 5, 2, 3)
    one = truncate(*weighted_sum(torch.ones(3), a, b), 2)
    other = truncate(*weighted_sum(torch.ones(3), -a, -b), 2)
    torch.testing.assert_close(one.u, other.u)
    torch.testing.assert_close(one.vh, other.vh)
    assert (one.vh.gather(-1, one.vh.abs().argmax(-1, keepdim=True)) > 0).all()


def test_gram_is_the_dense_one():
    a, b = pairs(6, 5, 2, 4)
    dense = (b @ a).flatten(1).numpy()
    np.testing.assert_allclose(product_gram(a, b), dense @ dense.T, atol=1e-10)


def rows(num=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = {name: (torch.randn(num, 2, i, dtype=torch.float64, generator=generator),
                      torch.randn(num, o, 2, dtype=torch.float64, generator=generator)) 
               for name, i, o in (("q", 6, 5), ("v", 4, 7))}
    return *pack(factors), {name: (a.numpy(), b.numpy()) for name, (a, b) in factors.items()}


def mixing(num=5):
    w = np.random.default_rng(0).random((num, num))
    return w / w.sum(1, keepdims=True)


def test_cross_term_has_its_three_forms():
    layout, x, factors = rows()
    w = mixing()
    direct, centred, pairwise, bound, size = (np.zeros(5) for _ in range(5))
    for i in range(5):
        for a, b in factors.values():
            mean_a, mean_b = np.einsum("j,jrk->rk", w[i], a), np.einsum("j,jor->or", w[i], b)
            mean_product = np.einsum("j,jor,jrk->ok", w[i], b, a)
            one = mean_product - mean_b @ mean_a
            two = np.einsum("j,jor,jrk->ok", w[i], b - mean_b, a - mean_a)
            three = 0.5 * np.einsum("j,l,jlor,jlrk->ok", w[i], w[i], b[:, None] - b[None], a[:, None] - a[None])
            np.testing.assert_allclose(two, one, atol=1e-12)
            np.testing.assert_allclose(three, one, atol=1e-12)
            direct[i] += (one ** 2).sum()
            size[i] += (mean_product ** 2).sum()
            spread = [np.sqrt(np.einsum("j,jor->", w[i], (f - m) ** 2)) for f, m in ((b, mean_b), (a, mean_a))]
            assert np.linalg.norm(one) <= spread[0] * spread[1]
    absolute, relative = cross_term(x, w, layout)
    assert absolute == pytest.approx(np.sqrt(direct).mean(), abs=1e-10)
    assert relative == pytest.approx((np.sqrt(direct) / np.sqrt(size)).mean(), abs=1e-10)
    assert aggregation_error(x, torch.from_numpy(w) @ x, w, layout) == pytest.approx(absolute, abs=1e-7)


@pytest.mark.parametrize("equal", ["A", "B"])
def test_cross_term_vanishes_when_one_factor_is_shared(equal):
    layout, x, _ = rows()
    x[:, layout.groups[equal]] = x[0, layout.groups[equal]]
    assert cross_term(x, mixing(), layout)[0] < 1e-12


def test_distances_and_scaling():
    layout, x, factors = rows()
    dense = np.concatenate([(b @ a).reshape(5, -1) for a, b in factors.values()], 1)
    expected = np.sqrt(((dense - dense.mean(0)) ** 2).sum(1).mean())
    assert product_distance(x, layout) == pytest.approx(expected, abs=1e-10)
    assert consensus_distance(x) == pytest.approx(float((x - x.mean(0)).norm(dim=1).square().mean().sqrt()), abs=1e-12)
    twice = make_layout([(p.name, p.rank, p.d_in, p.d_out, 2.0) for p in layout.pairs])
    assert product_distance(x, twice) == pytest.approx(2 * expected, abs=1e-10)
    assert consensus_distance(x[:1].expand(5, -1)) < 1e-15
