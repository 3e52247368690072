"""FLoRA-NA against alternating least squares on dense products, its invariants and its variants."""

import numpy as np
import pytest
import torch
from one_round import build, gossip
from test_rules import LAYOUT, NUM, complete, mix_once, pairing, product, random_rows, ring, turned
from test_rules_aggregation import drifted, errors

from dfl.adapters.layout import a_view, b_view
from dfl.rules.coefficients import problems, solve

WEIGHTS = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)


def pairs(seed=0, num=4, layers=2, common=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)
    a, b = draw(num, layers, 3, 9), draw(num, layers, 11, 3)
    return (draw(layers, 3, 9) + 0.4 * a, draw(layers, 11, 3) + 0.4 * b) if common else (a, b)


def solved(a, b, weights=WEIGHTS, *, delta=False, shared=False, solver="als", steps=20, gauge="norms"):
    (fit,) = problems([(a, b)], weights, delta, shared)
    return solve(fit, solver, steps, None if delta else gauge)


def dense_error(a, b, p, q, target):
    return float(np.square(np.einsum("u,uor->or", p, b) @ np.einsum("u,uri->ri", q, a) - target).sum())


def dense_als(a, b, w, sweeps=200, start=None):
    """One layer in plain numpy: vectorised products, the normal equations solved by lstsq. `start`: the pair of the delta form."""
    target = np.einsum("u,uor,uri->oi", w, b, a)
    base_a, base_b = (0, 0) if start is None else start
    a, b = (a, b) if start is None else (a - start[0], b - start[1])
    p = q = w
    for _ in range(sweeps):
        right = base_a + np.einsum("u,uri->ri", q, a)
        p = np.linalg.lstsq((b @ right).reshape(len(w), -1).T, (target - base_b @ right if start else target).ravel(), rcond=None)[0]
        left = base_b + np.einsum("u,uor->or", p, b)
        q = np.linalg.lstsq((left @ a).reshape(len(w), -1).T, (target - left @ base_a if start else target).ravel(), rcond=None)[0]
    return (base_b + np.einsum("u,uor->or", p, b)) @ (base_a + np.einsum("u,uri->ri", q, a))


@pytest.mark.parametrize("seed", range(3))
def test_is_alternating_least_squares_on_dense_products(seed):
    a, b = pairs(seed)
    p, q = solved(a, b, steps=200)
    for layer in range(2):
        one_a, one_b = a[:, layer].numpy(), b[:, layer].numpy()
        ours = np.einsum("u,uor->or", p[layer], one_b) @ np.einsum("u,uri->ri", q[layer], one_a)
        np.testing.assert_allclose(ours, dense_als(one_a, one_b, WEIGHTS.numpy()), atol=2e-3 * np.abs(ours).max())
        target = np.einsum("u,uor,uri->oi", WEIGHTS, one_b, one_a)
        assert (dense_error(one_a, one_b, p[layer].numpy(), q[layer].numpy(), target)
                <= 1.0001 * np.square(dense_als(one_a, one_b, WEIGHTS.numpy()) - target).sum())


@pytest.mark.long
def test_reaches_the_best_of_many_starts_on_independent_factors():
    """There is more than one minimum: averaging and every peer alone are tried, against twenty random starts on dense products."""
    stopped_short = 0
    for seed, (num, rank, out, inp) in enumerate([(3, 2, 7, 5), (4, 3, 11, 9)] * 4):
        generator, weights = np.random.default_rng(seed), np.full(num, 1 / num)
        a, b = generator.standard_normal((num, rank, inp)), generator.standard_normal((num, out, rank))
        target = np.einsum("u,uor,uri->oi", weights, b, a)
        p, q = solved(torch.from_numpy(a)[:, None], torch.from_numpy(b)[:, None], torch.from_numpy(weights), steps=200)
        best = min(dense_sweeps(a, b, target, q) for q in (weights, *generator.standard_normal((20, num))))
        assert dense_error(a, b, p[0].numpy(), q[0].numpy(), target) <= 1.001 * best
        stopped_short += dense_sweeps(a, b, target, weights, 20) > 1.01 * best
    assert stopped_short  # twenty sweeps from plain averaging do not get there everywhere


def dense_sweeps(a, b, target, q, sweeps=100):
    """The squared error after alternating least squares from coefficients q of A, in plain numpy."""
    products = np.einsum("uor,vri->uvoi", b, a).reshape(len(b), len(a), -1)
    for _ in range(sweeps):
        p = np.linalg.lstsq((products * q[None, :, None]).sum(1).T, target.ravel(), rcond=None)[0]
        q = np.linalg.lstsq((products * p[:, None, None]).sum(0).T, target.ravel(), rcond=None)[0]
    return np.square(np.einsum("u,v,uvk->k", p, q, products) - target.ravel()).sum()


def test_the_delta_form_scales_what_changed():
    a, b = pairs(3)
    start_a, start_b = pairs(7, num=1)
    p, q = solved(torch.cat([a, start_a]), torch.cat([b, start_b]), delta=True, steps=200)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, dtype=torch.float64))
    for layer in range(2):
        one_a, one_b, start = a[:, layer].numpy(), b[:, layer].numpy(), (start_a[0, layer].numpy(), start_b[0, layer].numpy())
        ours = (np.einsum("u,uor->or", p[layer], np.concatenate([one_b, start[1][None]]))
                @ np.einsum("u,uri->ri", q[layer], np.concatenate([one_a, start[0][None]])))
        np.testing.assert_allclose(ours, dense_als(one_a, one_b, WEIGHTS.numpy(), start=start), atol=5e-3 * np.abs(ours).max())


def test_a_common_factor_leaves_no_error_and_fixes_the_other_coefficients():
    a, b = pairs()
    a[:] = a[0].clone()
    for gauge in ("norms", "sums"):
        p, q = solved(a, b, gauge=gauge)
        torch.testing.assert_close(p * q.sum(-1, keepdim=True), WEIGHTS.expand(2, -1), rtol=1e-6, atol=1e-6)
    a, b = pairs()
    b[:] = b[0].clone()
    p, q = solved(a, b)
    torch.testing.assert_close(q * p.sum(-1, keepdim=True), WEIGHTS.expand(2, -1), rtol=1e-6, atol=1e-6)


def test_gauges():
    a, b = pairs()
    p, q = solved(a, b, gauge="sums")
    torch.testing.assert_close(p.sum(-1), q.sum(-1))
    scaled = solved(a, 1000 * b, gauge="sums")
    torch.testing.assert_close(scaled[0], p, rtol=1e-6, atol=1e-6)  # scaling every B changes no coefficient
    p, q = solved(a, b)
    left, right = torch.einsum("lu,ulor->lor", p, b), torch.einsum("lu,ulri->lri", q, a)
    torch.testing.assert_close(left.norm(dim=(1, 2)), right.norm(dim=(1, 2)))


def test_singular_systems():
    a, b = pairs()
    for num in (4, 2):  # all equal; two equal peers
        same_a, same_b = a.clone(), b.clone()
        same_a[:num], same_b[:num] = a[0], b[0]
        p, q = solved(same_a, same_b)
        assert p.isfinite().all() and q.isfinite().all() and p.abs().max() < 10
    p, q = solved(a[:1], b[:1], torch.ones(1, dtype=torch.float64), gauge="sums")
    torch.testing.assert_close((p, q), (torch.ones(2, 1).double(),) * 2)
    p, q = solved(a, torch.zeros_like(b))
    assert torch.equal(p, WEIGHTS.expand(2, -1)) and torch.equal(q, p)


def test_one_set_of_coefficients_for_all_layers():
    a, b = pairs(layers=3)
    b[:, 2] *= 100  # a large layer must not decide alone
    (fit,) = problems([(a[:, :1], b[:, :1]), (a[:, 1:], b[:, 1:])], WEIGHTS, False, True)
    p, q = solve(fit, "als", 50, "norms")
    assert p.shape == (1, 4) and fit.error(p, q) < fit.error(fit.start[None], fit.start[None])
    separate = sum(float(f.error(*solve(f, "als", 50, "norms")).sum()) for f in problems([(a, b)], WEIGHTS, False, False))
    assert fit.error(p, q) >= separate
    unscaled = solve(problems([(a[:, :1], b[:, :1]), (a[:, 1:], b[:, 1:] * torch.tensor([1, 0.01])[:, None, None])],
                              WEIGHTS, False, True)[0], "als", 50, "sums")
    torch.testing.assert_close(solve(fit, "als", 50, "sums"), unscaled, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("delta", [False, True])
def test_adamw_goes_the_same_way_less_far(delta):
    a, b = pairs(5, num=5)
    weights = WEIGHTS.new_full((5 - delta,), 1 / (5 - delta))
    (fit,) = problems([(a, b)], weights, delta, True)
    plain = fit.coefficients(fit.start[None])
    of_als, of_adamw = (fit.error(*solve(fit, solver, steps, None)) for solver, steps in (("als", 100), ("adamw", 200)))
    assert of_als <= 1.0001 * of_adamw and of_adamw < fit.error(plain, plain)
    assert of_adamw < 0.5 * (of_als + fit.error(plain, plain))


@pytest.mark.long
def test_rotated_copies_need_alignment_and_say_so():
    x = drifted()[:1].expand(NUM, -1) + 0.02 * random_rows(1)
    turn = torch.linalg.qr(torch.randn(NUM, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    x = turned(x, turn)
    assert errors("flora_na_aligned", x, complete()).max() < 0.1 * errors("flora_na", x, complete()).min()
    rule = build("flora_na", LAYOUT)
    states = [rule.init(row) for row in x]
    gossip(rule, x.clone(), states, complete(), 0)
    assert max(float(state["largest_coefficient"]) for state in states) > 3


def test_the_state_tells_the_error():
    x, rule = drifted(), build("flora_na", LAYOUT)
    states, out = [rule.init(row) for row in x], x.clone()
    gossip(rule, out, states, ring(), 0)
    w = torch.from_numpy(ring())
    squares = 0
    for pair in LAYOUT.pairs:
        target = torch.einsum("ij,jok->iok", w, b_view(x, pair) @ a_view(x, pair))
        squares = squares + ((target - b_view(out, pair) @ a_view(out, pair)).norm(dim=(1, 2)) / target.norm(dim=(1, 2))) ** 2
    torch.testing.assert_close(torch.stack([s["relative_error"] for s in states]), (squares / 3).sqrt(), rtol=1e-6, atol=1e-9)


def test_the_start_of_the_delta_form_is_the_last_mix():
    rule, x = build("flora_na", LAYOUT, form="delta"), drifted()
    states = [rule.init(row) for row in x]
    for w in (pairing(), np.eye(NUM)):
        gossip(rule, x, states, w, 0)
        for row, state in zip(x, states, strict=True):
            assert torch.equal(state["start"], row[:LAYOUT.groups["B"].stop])
        x = x + 0.1
    # nothing changed anywhere: there is nothing to scale
    same = random_rows(num=1).expand(NUM, -1).clone()
    torch.testing.assert_close(mix_once("flora_na", same, ring(), form="delta"), same, rtol=0, atol=1e-12)
    assert product(same).norm() > 1


@pytest.mark.parametrize("params, message", [
    ({"form": "x"}, "method.form = 'x' is not allowed; allowed: factor, delta"), ({"scope": "x"}, "method.scope"),
    ({"gauge": "own"}, "method.gauge"), ({"solver": "sgd"}, "method.solver"), ({"align": "A"}, "method.align"),
    ({"steps": 0}, "method.steps = 0"), ({"steps": 1.5}, "method.steps")])
def test_bad_values_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build("flora_na", LAYOUT, **params)
