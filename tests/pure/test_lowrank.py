"""The low-rank kernel against dense numpy."""

import numpy as np
import pytest
import torch

from dfl.adapters.layout import a_view, b_view, make_layout, pack
from dfl.adapters.lowrank import (
    align,
    combined,
    cut,
    energy_rank,
    factor_error,
    gram_tables,
    inner,
    inner_products,
    procrustes,
    product_gram,
    product_norm,
    products,
    refactor,
    singular_values,
    squared_norms,
    truncate,
    weighted_sum,
)
from dfl.metrics.consensus import consensus
from dfl.metrics.measures import measure, mixing_errors, seen
from dfl.transport import InProcess

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
    np.testing.assert_allclose(products(gram_tables(a, b)).sum(0), dense @ dense.T, atol=1e-10)


@pytest.mark.parametrize(("num", "rank"), [(1, 3), (5, 3), (7, 20)])  # the last in pieces
def test_inner_products_without_the_tables_are_the_dense_ones(num, rank):
    a, b = (torch.randn(num, 2, *size, dtype=torch.float64) for size in ((rank, 9), (8, rank)))
    other_a, other_b = (torch.randn(4, 2, *size, dtype=torch.float64) for size in ((5, 9), (8, 5)))
    dense, others = b @ a, other_b @ other_a
    torch.testing.assert_close(product_gram(a, b), torch.einsum("jloi,mloi->ljm", dense, dense))
    torch.testing.assert_close(inner_products(a, b, other_a, other_b), torch.einsum("jloi,mloi->ljm", dense, others))
    torch.testing.assert_close(squared_norms(a, b), dense.square().sum((-2, -1)))
    torch.testing.assert_close(singular_values(b, a), torch.linalg.svdvals(dense)[..., :min(rank, 8)])


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
    look = seen(x, torch.from_numpy(w) @ x, w, range(len(x)), layout)
    absolute, relative, error = (float(values.mean()) for values in mixing_errors(look))
    assert absolute == pytest.approx(np.sqrt(direct).mean(), abs=1e-10)
    assert relative == pytest.approx((np.sqrt(direct) / np.sqrt(size)).mean(), abs=1e-10)
    assert error == pytest.approx(absolute, abs=1e-7)


def test_peers_that_receive_from_nobody_have_no_errors_of_mixing():
    layout, x, _ = rows()
    found = mixing_errors(seen(x, x, torch.eye(len(x)), range(len(x)), layout))
    assert all(float(value.max()) < 1e-7 for value in found)


@pytest.mark.parametrize("equal", ["A", "B"])
def test_cross_term_vanishes_when_one_factor_is_shared(equal):
    layout, x, _ = rows()
    x[:, layout.groups[equal]] = x[0, layout.groups[equal]]
    assert mixing_errors(seen(x, x, mixing(), range(len(x)), layout)).cross_term.max() < 1e-12


def test_distances_and_scaling():
    layout, x, factors = rows()
    dense = np.concatenate([(b @ a).reshape(5, -1) for a, b in factors.values()], 1)
    expected = np.sqrt(((dense - dense.mean(0)) ** 2).sum(1).mean())
    assert distances(x, layout)["product_distance"] == pytest.approx(expected, abs=1e-10)
    of_rows = float((x - x.mean(0)).norm(dim=1).square().mean().sqrt())
    assert distances(x, layout)["consensus_distance"] == pytest.approx(of_rows, abs=1e-12)
    twice = make_layout([(p.name, p.rank, p.d_in, p.d_out, 2.0) for p in layout.pairs])
    assert distances(x, twice)["product_distance"] == pytest.approx(2 * expected, abs=1e-10)
    assert distances(x[:1].expand(len(x), -1), layout)["consensus_distance"] < 1e-15


def distances(x, layout) -> dict:
    return measure(InProcess(), seen(x, x, np.eye(len(x)), range(len(x)), layout), len(x))


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("width, error", [(60, 1e-9), (90, 0.01)])
def test_the_distance_from_the_mean_product(width, error, apart):
    """Exact where the layers are small; where they are not, what is estimated matters less the nearer peers are."""
    layout = make_layout([("q", 4, width, 64, 1.0), ("v", 4, 50, width, 2.0)])
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(layout.size, dtype=torch.float64, generator=generator)
    x = common + apart * torch.randn(10, layout.size, dtype=torch.float64, generator=generator)
    dense = torch.cat([(pair.scaling * b_view(x, pair) @ a_view(x, pair)).flatten(1) for pair in layout.pairs], 1)
    expected = float((dense - dense.mean(0)).square().sum(1).mean().sqrt())
    found = distances(x, layout)["product_distance"]
    assert found == pytest.approx(expected, rel=min(error * apart ** 2, error) + 1e-9)


@pytest.mark.parametrize("num, error", [(4, 1e-10), (12, 0.02)])
def test_the_consensus_of_products_is_near_the_best(num, error):
    """Exact where what peers add to the mean's product fits into what is kept, else within `error` of the best."""
    layout = make_layout([("q", 5, 70, 90, 1.0)])
    x = torch.randn(num, layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pair = layout.pairs[0]
    dense = (b_view(x, pair) @ a_view(x, pair)).mean(0)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    row = consensus(InProcess(), x, layout, num, product=True)
    missed = (dense - b_view(row, pair) @ a_view(row, pair)).norm()
    best = s[5:].norm()
    assert best * (1 - 1e-9) <= missed <= best * (1 + error)


def orthogonal(size, seed=0, batch=(), proper=None):
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, size, size, dtype=torch.float64, generator=generator)).Q
    if proper is not None:
        wrong = (torch.linalg.det(q) > 0) != proper
        q[..., 0] *= torch.where(wrong, -1.0, 1.0)[..., None]
    return q


def test_unequal_ranks_and_negative_weights():
    a, b = pairs(8, 7, 3, 3)
    a[0, :, 1:], b[0, :, :, 1:] = 0, 0  # a peer of rank 1
    a[1, :, 2:], b[1, :, :, 2:] = 0, 0
    weights = torch.tensor([1.5, -0.7, 0.2], dtype=torch.float64)
    dense = torch.einsum("j,jlor,jlri->loi", weights, b, a).numpy()
    u, s, vh = np.linalg.svd(dense, full_matrices=False)
    svd = truncate(*weighted_sum(weights, a, b), 2)
    np.testing.assert_allclose((svd.u * svd.s[:, None]) @ svd.vh, (u[..., :2] * s[:, None, :2]) @ vh[:, :2], rtol=1e-10, atol=1e-12)
    assert truncate(*weighted_sum(weights, a, b), 6).error.max() < 1e-12  # the ranks sum to 1 + 2 + 3


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.99, 1.0])
def test_the_energy_threshold_keeps_the_fewest_directions(tau):
    a, b = pairs(8, 7, 2, 3, layers=5)
    svd = truncate(*weighted_sum(torch.tensor([1.0, 0.3, 0.1]), a, b), 6)
    ranks = energy_rank(svd.spectrum, tau)
    energy = np.linalg.svd((b * torch.tensor([1.0, 0.3, 0.1]).double().view(3, 1, 1, 1) @ a).sum(0).numpy(), compute_uv=False) ** 2
    for layer, rank in enumerate(ranks.tolist()):
        share = energy[layer, :6].cumsum() / energy[layer, :6].sum()
        assert share[rank - 1] >= tau - 1e-12 and (rank == 1 or share[rank - 2] < tau)
    short = cut(svd, ranks)
    np.testing.assert_allclose(short.error.square(), [energy[k, r:].sum() for k, r in enumerate(ranks.tolist())], atol=1e-10)
    assert [(s > 0).sum() for s in short.s] == ranks.tolist()


def test_nothing_has_no_energy():
    assert energy_rank(torch.zeros(2, 4), 0.9).tolist() == [0, 0]


def test_splits_balance_or_make_rows_orthonormal():
    a, b = pairs(6, 5, 3, 4)
    svd = truncate(*weighted_sum(torch.ones(4) / 4, a, b), 3)
    for split in ("balanced", "left"):
        new_a, new_b = refactor(svd, a[0], split)
        torch.testing.assert_close(new_b @ new_a, (svd.u * svd.s[:, None]) @ svd.vh, rtol=0, atol=1e-12)
        right = new_b.mT @ new_b if split == "balanced" else torch.eye(3, dtype=a.dtype).expand(2, 3, 3)
        torch.testing.assert_close(new_a @ new_a.mT, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("out, inp, rank, num", SHAPES)
def test_tables_give_every_frobenius_quantity(out, inp, rank, num):
    a, b = pairs(out, inp, rank, num)
    grams = gram_tables(a, b)
    rng = np.random.default_rng(1)
    p, q, w = rng.standard_normal((3, num))
    dense = (b @ a).numpy()
    np.testing.assert_allclose(products(grams), np.einsum("jloi,kloi->ljk", dense, dense), atol=1e-10)
    np.testing.assert_allclose(inner(grams.b), np.einsum("jlor,klor->ljk", b, b), atol=1e-10)
    sum_b, sum_a = np.einsum("j,jlor->lor", p, b), np.einsum("j,jlri->lri", q, a)
    np.testing.assert_allclose(combined(grams.a, torch.from_numpy(q)), sum_a @ sum_a.transpose(0, 2, 1), atol=1e-10)
    error = ((sum_b @ sum_a - np.einsum("j,jloi->loi", w, dense)) ** 2).sum((1, 2))
    np.testing.assert_allclose(factor_error(grams, *map(torch.from_numpy, (p, q, w))), error, rtol=1e-9, atol=1e-9)


def test_the_error_of_averaging_is_a_covariance_of_low_rank():
    num, rank = 3, 2
    a, b = (f[:, 0] for f in pairs(20, 18, rank, num, layers=1))
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    da, db = a - torch.tensordot(w, a, 1), b - torch.tensordot(w, b, 1)
    error = torch.einsum("j,jor,jri->oi", w, db, da)
    assert torch.linalg.matrix_rank(error) == (num - 1) * rank
    assert factor_error(gram_tables(a, b), w, w, w) == pytest.approx(float(error.square().sum()), rel=1e-9)
    assert error.norm() <= ((w * db.square().sum((1, 2))).sum() * (w * da.square().sum((1, 2))).sum()).sqrt()


def pair_distance(a, b, other_a, other_b):
    """||B A - B' A'||_F as the norm of one product of rank 2R."""
    return product_norm(torch.cat([b, -other_b], -1), torch.cat([a, other_a], -2))


def test_distances_of_products_lose_no_digits():
    a, b = pairs(9, 8, 2, 2)
    dense = (b[0] @ a[0] - b[1] @ a[1]).square().sum((-2, -1)).sqrt()
    torch.testing.assert_close(pair_distance(a[0], b[0], a[1], b[1]), dense)
    turn = orthogonal(2)
    assert pair_distance(a[0], b[0], turn.mT @ a[0], b[0] @ turn).max() < 1e-13  # a Gram table would say 1e-7
    assert pair_distance(a[0], b[0], a[1, :, :1], b[1, :, :, :1]).shape == (2,)
    torch.testing.assert_close(product_norm(b[0], a[0]), (b[0] @ a[0]).square().sum((-2, -1)).sqrt())


class TestProcrustes:
    def test_beats_random_rotations(self):
        a, b = pairs(9, 8, 3, 2, layers=1)
        tries = orthogonal(3, batch=(1000,))
        for criterion in ("A", "B", "joint"):
            turned_a, turned_b, rotation = align(a[0], b[0], a[1], b[1], criterion)
            torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=a.dtype)[None], rtol=0, atol=1e-12)
            assert pair_distance(turned_a, turned_b, a[0], b[0]) < 1e-12
            weight_a, weight_b = criterion != "B", criterion != "A"
            if criterion == "joint":
                weight_a, weight_b = 1 / a[1].square().sum(), 1 / b[1].square().sum()

            def miss(x, y, weight_a=weight_a, weight_b=weight_b):
                return weight_a * (x - a[1]).square().sum((-2, -1)) + weight_b * (y - b[1]).square().sum((-2, -1))
            assert miss(turned_a, turned_b) < miss(tries.mT @ a[0], b[0] @ tries).min()

    def test_finds_the_rotation_back(self):
        a, b = pairs(9, 8, 3, 1)
        turn = orthogonal(3, batch=(2,))
        for criterion in ("A", "B", "joint"):
            back = align(turn.mT @ a[0], b[0] @ turn, a[0], b[0], criterion)
            torch.testing.assert_close(back[0], a[0])
            torch.testing.assert_close(back[2], turn.mT)

    def test_a_pair_is_in_its_own_frame(self):
        a, b = pairs(9, 8, 3, 1)
        rotation = align(a[0], b[0], a[0], b[0], "A")[2]
        torch.testing.assert_close(rotation, torch.eye(3, dtype=a.dtype).expand(2, 3, 3), rtol=0, atol=1e-12)

    def test_no_reference_turns_nothing(self):
        a, b = pairs(9, 8, 3, 2)
        same = align(a[0], b[0], torch.zeros_like(a[1]), torch.zeros_like(b[1]), "joint")
        assert torch.equal(same[2], torch.eye(3, dtype=a.dtype).expand(2, 3, 3))

    def test_a_deficient_reference_turns_the_rest_as_little_as_possible(self):
        a, b = pairs(9, 8, 3, 2)
        reference = a[0].clone()
        reference[:, 1:] = 0  # one direction is known, and it is in place
        reference[:, 0] = torch.linalg.pinv(a[0])[:, :, 0]  # orthogonal to the other rows of A
        rotation = align(a[0], b[0], reference, b[0], "A")[2]
        torch.testing.assert_close(rotation, torch.eye(3, dtype=a.dtype).expand(2, 3, 3), rtol=0, atol=1e-10)
        frame = orthogonal(3, 11, batch=(20,))
        known = frame[..., :1] @ frame[..., :1].mT + 0.5 * frame[..., 1:2] @ frame[..., 1:2].mT
        torch.testing.assert_close(procrustes(known), torch.eye(3, dtype=a.dtype).expand(20, 3, 3), rtol=0, atol=1e-10)
        one = frame[..., :1] @ frame[..., :1].mT
        torch.testing.assert_close(procrustes(one), torch.eye(3, dtype=a.dtype).expand(20, 3, 3), rtol=0, atol=1e-10)
        wild = procrustes(torch.diag(torch.tensor([1.0, 0.0, 0.0]).double()) @ orthogonal(3, 3))
        torch.testing.assert_close(wild @ wild.mT, torch.eye(3, dtype=a.dtype), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
    def test_soft_angles(self, strength):
        angle = torch.tensor([0.3, 1.2, 2.5, -1.9], dtype=torch.float64)
        plane = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], -2)
        frame = orthogonal(3, 7)
        hard = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
        hard[:, :2, :2] = plane
        hard = frame @ hard @ frame.mT
        soft = procrustes(hard, strength)
        expected = torch.atan2(strength * angle.sin(), 1 - strength + strength * angle.cos())
        # trace = 1 + 2 cos of the angle
        torch.testing.assert_close(torch.acos((soft.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2), expected.abs())
        identity = torch.eye(3, dtype=torch.float64)
        assert ((soft - identity).norm(dim=(1, 2)) <= 2 * strength * (hard - identity).norm(dim=(1, 2))).all()
        torch.testing.assert_close(soft @ soft.mT, identity.expand(4, 3, 3), rtol=0, atol=1e-12)

    def test_soft_limits(self):
        proper = orthogonal(4, 5, proper=True)
        torch.testing.assert_close(procrustes(proper, 0.0), torch.eye(4, dtype=proper.dtype), rtol=0, atol=1e-12)
        torch.testing.assert_close(procrustes(proper, 1.0), proper)

    def test_a_reflection_is_turned_properly_when_soft(self):
        reflection = torch.diag(torch.tensor([1.0, 1.0, -0.1], dtype=torch.float64))
        assert torch.linalg.det(procrustes(reflection)) < 0
        soft = procrustes(reflection, 0.9)
        torch.testing.assert_close(soft, torch.eye(3, dtype=soft.dtype), rtol=0, atol=1e-12)  # the weakest direction gives way

    def test_half_a_turn_is_taken_whole(self):
        half = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
        torch.testing.assert_close(procrustes(half, 0.5), half, rtol=0, atol=1e-12)
