"""Rules that need the frozen weights, against dense float64 computations."""

import numpy as np
import pytest
import torch
from one_round import build, gossip

import topologies
from dfl.adapters.layout import a_view, b_view, empty_rows, head_view, make_layout

NUM = 5


def ring():
    return topologies.build("ring", NUM).matrix(0)


def mixed(rule, x, w):
    out = x.clone()
    gossip(rule, out, [rule.init(row) for row in x], w, 0)
    return out


class TestDora:
    PAIRS = [("q", 6, 11, 9, 0.5), ("o", 6, 8, 12, 2.0)]
    LAYOUT = make_layout(PAIRS, [("head", (2, 3))], magnitudes=[("q", (9,)), ("o", (12,))])
    WEIGHTS = {name: torch.randn(d_out, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(d_in))
               for name, _, d_in, d_out, _ in PAIRS}

    def rows(self, rank):
        x = empty_rows(NUM, self.LAYOUT.size, dtype=torch.float64)
        x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
        for pair in self.LAYOUT.pairs:
            b_view(x, pair)[..., rank:] = 0
        x[:, self.LAYOUT.groups["M"]] = x[:, self.LAYOUT.groups["M"]].abs() + 0.5
        return x

    def dense(self, x):
        """The weights that the adapters make, by layer (N, O, I)."""
        found = {}
        for pair, place in zip(self.LAYOUT.pairs, self.LAYOUT.magnitudes, strict=True):
            v = (self.WEIGHTS[pair.name] + pair.scaling * b_view(x, pair) @ a_view(x, pair)).numpy()
            m = head_view(x, place).numpy()
            found[pair.name] = m[..., None] * v / np.linalg.norm(v, axis=2, keepdims=True)
        return found

    def rule(self, **params):
        return build("dora", self.LAYOUT, weights=self.WEIGHTS, **params)

    def test_is_the_exact_average_of_the_weights_while_the_rank_suffices(self):
        x, w = self.rows(2), ring()  # three neighbours of rank 2 in rank 6
        out = mixed(self.rule(), x, w)
        before, after = self.dense(x), self.dense(out)
        for name, value in after.items():
            np.testing.assert_allclose(value, np.einsum("ij,jok->iok", w, before[name]), atol=1e-12)
        assert (out[:, self.LAYOUT.groups["M"]] > 0).all()
        averaged = x.clone()
        for group in ("A", "B", "M"):
            cut = self.LAYOUT.groups[group]
            averaged[:, cut] = torch.from_numpy(w) @ x[:, cut]
        assert max(np.abs(v - np.einsum("ij,jok->iok", w, before[n])).max() for n, v in self.dense(averaged).items()) > 0.1

    def test_truncation_is_all_that_is_lost(self):
        """m follows from the whole sum, so that the rest is what the best rank-R part of D leaves."""
        x, w = self.rows(6), ring()
        rule, out = self.rule(), x.clone()
        states = [rule.init(row) for row in x]
        gossip(rule, out, states, w, 0)
        for i in range(NUM):
            lost = 0.0
            for pair, place in zip(self.LAYOUT.pairs, self.LAYOUT.magnitudes, strict=True):
                v = (self.WEIGHTS[pair.name] + pair.scaling * b_view(x, pair) @ a_view(x, pair)).numpy()
                ratio = head_view(x, place).numpy() / np.linalg.norm(v, axis=2)
                c = w[i] @ ratio
                omega = w[i][:, None] * ratio / c
                np.testing.assert_allclose(omega.sum(0), 1.0, atol=1e-14)
                d = np.einsum("jo,jok->ok", omega, (b_view(x, pair) @ a_view(x, pair)).numpy())
                u, s, vh = np.linalg.svd(d)
                np.testing.assert_allclose((b_view(out, pair) @ a_view(out, pair))[i], (u[:, :6] * s[:6]) @ vh[:6], atol=1e-10)
                expected = c * np.linalg.norm(self.WEIGHTS[pair.name].numpy() + pair.scaling * d, axis=1)
                np.testing.assert_allclose(head_view(out, place)[i], expected, atol=1e-12)
                lost += pair.scaling ** 2 * (s[6:] ** 2).sum()
            assert float(states[i]["truncation_error"]) == pytest.approx(lost ** 0.5)

    def test_alone_and_agreed_nothing_changes(self):
        x = self.rows(6)
        assert torch.equal(mixed(self.rule(), x, np.eye(NUM)), x)
        x[:] = x[0]
        for name, value in self.dense(mixed(self.rule(), x, ring())).items():
            np.testing.assert_allclose(value, self.dense(x)[name], atol=1e-12)

    def test_magnitudes_that_cancel_do_no_harm(self):
        x = self.rows(2)
        head_view(x, self.LAYOUT.magnitudes[0])[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
        x[1:3] = x[0]
        head_view(x, self.LAYOUT.magnitudes[0])[1:3, 0] = torch.tensor([-1.0, 0.0], dtype=torch.float64)
        out = mixed(self.rule(), x, ring())
        assert out.isfinite().all() and out.abs().max() < 100

    def test_float32_factors_on_a_half_precision_base(self):
        """The base is never cast to float64; magnitudes come out with float32's digits all the same."""
        x, w = self.rows(2), ring()
        weights = {name: weight.bfloat16() for name, weight in self.WEIGHTS.items()}
        x = empty_rows(NUM, self.LAYOUT.size).copy_(x)
        out = mixed(build("dora", self.LAYOUT, weights=weights), x, w)
        exact = mixed(build("dora", self.LAYOUT, weights={n: v.double() for n, v in weights.items()}), x.double(), w)
        magnitudes = self.LAYOUT.groups["M"]
        np.testing.assert_allclose(out[:, magnitudes], exact[:, magnitudes], rtol=1e-6)
        for pair in self.LAYOUT.pairs:
            products = [b_view(rows, pair) @ a_view(rows, pair) for rows in (out, exact)]
            np.testing.assert_allclose(*products, rtol=0, atol=1e-5)

    def test_from_b_zero(self):
        x = self.rows(0)
        out = mixed(self.rule(), x, ring())
        for pair in self.LAYOUT.pairs:
            assert (b_view(out, pair) == 0).all() and torch.equal(a_view(out, pair), a_view(x, pair))


class TestHira:
    LAYOUT = make_layout([("q", 3, 14, 10, 1.0)])
    WEIGHTS = {"q": torch.randn(10, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).exp()}

    def rows(self):
        x = empty_rows(NUM, self.LAYOUT.size, dtype=torch.float64)
        return x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def errors(self, out, x, w, weights):
        (pair,) = self.LAYOUT.pairs
        products = lambda rows: (b_view(rows, pair) @ a_view(rows, pair)).numpy()  # noqa: E731
        return np.linalg.norm(weights.numpy() * (products(out) - np.einsum("ij,jok->iok", w, products(x))), axis=(1, 2))

    def test_never_above_the_plain_truncation_and_better_with_more_sweeps(self):
        x, w = self.rows(), ring()
        errors = [self.errors(mixed(build("hira", self.LAYOUT, weights=self.WEIGHTS, sweeps=k), x, w), x, w, self.WEIGHTS["q"])
                  for k in (0, 1, 5, 50)]
        plain = self.errors(mixed(build("decaf", self.LAYOUT), x, w), x, w, self.WEIGHTS["q"])
        np.testing.assert_allclose(errors[0], plain, rtol=1e-9)
        for worse, better in zip(errors, errors[1:], strict=False):
            assert (better <= worse + 1e-12).all()
        assert (errors[-1] < 0.95 * errors[0]).all()

    @pytest.mark.long
    def test_it_stops_when_a_sweep_is_no_longer_worth_it(self):
        """`sweeps` is at most: a peer's last sweep took less than 1e-4 of its squared error, all before it more."""
        x, w, weights = self.rows(), ring(), {"q": self.WEIGHTS["q"] ** 0.3}
        outs = [mixed(build("hira", self.LAYOUT, weights=weights, sweeps=k), x, w) for k in range(60)]
        errors = np.stack([self.errors(out, x, w, weights["q"]) for out in outs]) ** 2
        falls = (errors[:-1] - errors[1:]) / errors[1:]
        for peer in range(NUM):
            last = next(k for k in range(60) if all(torch.equal(outs[k][peer], out[peer]) for out in outs[k:]))
            assert 2 < last < 59
            assert falls[last - 1, peer] < 1e-4 <= falls[1:last - 1, peer].min()

    def test_a_step_solves_the_dense_weighted_least_squares(self):
        """After one sweep A is optimal for its B, column by column, by numpy's own solver."""
        x, w = self.rows(), ring()
        out = mixed(build("hira", self.LAYOUT, weights=self.WEIGHTS, sweeps=1), x, w)
        (pair,) = self.LAYOUT.pairs
        target = np.einsum("ij,jok->iok", w, (b_view(x, pair) @ a_view(x, pair)).numpy())
        for peer in range(NUM):
            b = b_view(out, pair)[peer].numpy()
            for column in range(14):
                weight = self.WEIGHTS["q"][:, column].numpy()
                best = np.linalg.lstsq(weight[:, None] * b, weight * target[peer][:, column], rcond=None)[0]
                np.testing.assert_allclose(a_view(out, pair)[peer, :, column], best, atol=1e-9)

    def test_with_equal_weights_it_is_the_plain_truncation(self):
        x, w = self.rows(), ring()
        out = mixed(build("hira", self.LAYOUT, weights={"q": torch.ones(10, 14, dtype=torch.float64)}), x, w)
        (pair,) = self.LAYOUT.pairs
        plain = mixed(build("decaf", self.LAYOUT), x, w)
        torch.testing.assert_close(b_view(out, pair) @ a_view(out, pair), b_view(plain, pair) @ a_view(plain, pair), rtol=0, atol=1e-9)

    def test_from_b_zero(self):
        x = self.rows()
        x[:, self.LAYOUT.groups["B"]] = 0
        out = mixed(build("hira", self.LAYOUT, weights=self.WEIGHTS), x, ring())
        assert (out[:, self.LAYOUT.groups["B"]] == 0).all() and out[:, self.LAYOUT.groups["A"]].abs().sum() > 0
