"""Slots of unequal ranks: HetLoRA's padding, ordering and pruning, and replication, against dense numpy."""

import numpy as np
import pytest
import torch
from one_round import build, gossip
from test_rules import LAYOUT, NUM, activation, complete, mix_once, product, random_rows, ring, simulated
from test_rules_aggregation import drifted

from dfl.adapters.layout import a_view, b_view
from dfl.rules.padding import in_order, tail_gradient, tail_score

RANKS = (1, 2, 2, 1, 2, 1)


def uneven() -> torch.Tensor:
    x = random_rows()
    for pair in LAYOUT.pairs:
        for peer, rank in enumerate(RANKS):
            a_view(x, pair)[peer, rank:], b_view(x, pair)[peer, :, rank:] = 0, 0
    return x


def run(name, x, w, rounds=1, **params):
    rule, x = build(name, LAYOUT, **params), x.clone()
    states = [rule.init(row) for row in x]
    for t in range(rounds):
        traffic = gossip(rule, x, states, w, t)
    return x, states, traffic, rule


def norms(x):
    return product(x).norm(dim=1).numpy()


class TestHetlora:
    def test_is_the_padded_mean_weighted_by_norms(self):
        x, w = uneven(), ring()
        mixed = run("hetlora", x, w, ranks=RANKS)[0]
        shares = w * norms(x)
        shares /= shares.sum(1, keepdims=True)
        for pair in LAYOUT.pairs:
            for i, rank in enumerate(RANKS):
                expected_a = np.einsum("j,jri->ri", shares[i], a_view(x, pair))
                expected_b = np.einsum("j,jor->or", shares[i], b_view(x, pair))
                expected_a[rank:], expected_b[:, rank:] = 0, 0
                np.testing.assert_allclose(a_view(mixed, pair)[i], expected_a, atol=1e-12)
                np.testing.assert_allclose(b_view(mixed, pair)[i], expected_b, atol=1e-12)

    def test_without_products_the_weights_are_those_of_w(self):
        x = random_rows()
        x[:, LAYOUT.groups["B"]] = 0
        torch.testing.assert_close(mix_once("hetlora", x, ring()), mix_once("lora", x, ring()), rtol=0, atol=1e-15)

    def test_ordering_puts_the_strongest_slot_first(self):
        x = drifted()
        for pair in LAYOUT.pairs:
            a, b = in_order(a_view(x, pair), b_view(x, pair))
            torch.testing.assert_close(b @ a, b_view(x, pair) @ a_view(x, pair), rtol=0, atol=1e-12)
            strength = b.norm(dim=-2) * a.norm(dim=-1)
            assert (strength[:, 0] >= strength[:, 1]).all()
        # peer 0 has rank 1, and what the others send has its strong direction in the last slot
        one = x[:1].expand(NUM, -1).clone()
        for pair in LAYOUT.pairs:
            a_view(one, pair)[:, 0] *= 1e-3
            a_view(one, pair)[0], b_view(one, pair)[0] = 0, 0
        cut, ordered = (product(run("hetlora", one, complete(), ranks=(1, *[2] * 5), order=order)[0])[0] for order in (False, True))
        assert (ordered - product(one)[1]).norm() < 0.1 * (cut - product(one)[1]).norm()

    def test_the_penalty_has_the_gradient_of_the_score(self):
        x = random_rows()[0].requires_grad_()
        score = sum((b_view(x, pair)[:, 1:].norm() * a_view(x, pair)[1:].norm() for pair in LAYOUT.pairs), 0)
        assert float(tail_score(LAYOUT, x.detach(), 1, 2)) == pytest.approx(float(score.detach()), rel=1e-12)
        score.backward()
        torch.testing.assert_close(tail_gradient(LAYOUT, x.detach(), 1, 2), x.grad, rtol=0, atol=1e-12)
        dead = x.detach().clone()
        for pair in LAYOUT.pairs:
            b_view(dead, pair)[:, 1] = 0
        assert (tail_gradient(LAYOUT, dead, 1, 2) == 0).all()

    def test_a_tail_that_shrinks_is_pruned_and_one_that_grows_is_not(self):
        rule, x = build("hetlora", LAYOUT, gamma=0.5, penalty=0.1), random_rows()
        states = [rule.init(row) for row in x]
        gossip(rule, x, states, ring(), 0)
        assert all(state["rank"] == 2 for state in states)
        for state, row in zip(states, x, strict=True):
            torch.testing.assert_close(rule.correct(state), 0.1 * tail_gradient(LAYOUT, row, 1, 2), rtol=0, atol=0)
        for pair in LAYOUT.pairs:  # as if trained: peers 0 and 1 shrink, peer 1 alone from now on; the others grow
            b_view(x, pair)[:2, :, 1] *= 0.9
            b_view(x, pair)[2:, :, 1] *= 1.1
        w = np.eye(NUM)
        w[np.ix_([0, 5], [0, 5])] = 0.5
        gossip(rule, x, states, w, 1)
        assert [int(state["rank"]) for state in states] == [1, 1, 2, 2, 2, 2]
        for pair in LAYOUT.pairs:
            assert not a_view(x, pair)[:2, 1].any() and not b_view(x, pair)[:2, :, 1].any()
            assert a_view(x, pair)[2:, 1].any(-1).all()
        # what is pruned neither travels nor comes back
        traffic = gossip(rule, x, states, w, 2)
        full = sum(pair.rank * (pair.d_in + pair.d_out) for pair in LAYOUT.pairs)
        assert traffic.message_bytes == 8 * (3 + full // 2 + 3 + full) and states[0]["rank"] == 1

    def test_no_penalty_is_no_correction(self):
        x = random_rows()[0]
        rule = build("hetlora", LAYOUT, gamma=0.5, penalty=0)
        assert rule.correct(rule.init(x)) is None and build("hetlora", LAYOUT).correct({}) is None

    def test_ranks_shrink_in_a_run_down_to_the_least(self):
        result = simulated("hetlora", activation(0.5), rounds=20, gamma=0.6, min_rank=2)
        a, _ = result.factors["toy"]
        left = (a.norm(dim=-1) > 0).sum(1)
        assert left.min() >= 2 and left.min() < 4 and a.isfinite().all()

    @pytest.mark.parametrize("params, message", [
        ({"gamma": 1}, "method.gamma = 1 is not allowed"), ({"gamma": True}, "method.gamma"), ({"penalty": -1}, "method.penalty = -1"),
        ({"min_rank": 0}, "method.min_rank = 0"), ({"order": 1}, "method.order = 1 is not allowed; allowed: true, false")])
    def test_bad_values_are_refused(self, params, message):
        with pytest.raises(ValueError, match=message):
            build("hetlora", LAYOUT, **params)


class TestReplicate:
    def test_averages_each_slot_over_those_who_have_it(self):
        x, w = uneven(), ring()
        mixed = run("replicate", x, w, ranks=RANKS)[0]
        for pair in LAYOUT.pairs:
            for i, rank in enumerate(RANKS):
                for slot in range(2):
                    have = np.array([w[i, j] * (RANKS[j] > slot) for j in range(NUM)])
                    if slot < rank:
                        slots = a_view(x, pair)[:, slot], b_view(x, pair)[..., slot]
                        mean_a, mean_b = (have @ f.numpy() / have.sum() for f in slots)
                        np.testing.assert_allclose(a_view(mixed, pair)[i, slot], mean_a, atol=1e-12)
                        np.testing.assert_allclose(b_view(mixed, pair)[i, :, slot], mean_b, atol=1e-12)
                    else:
                        assert not a_view(mixed, pair)[i, slot].any() and not b_view(mixed, pair)[i, :, slot].any()

    def test_equal_ranks_are_lora(self):
        x = random_rows()
        for params in ({}, {"ranks": (2,) * NUM}):
            torch.testing.assert_close(run("replicate", x, ring(), **params)[0], mix_once("lora", x, ring()), rtol=0, atol=1e-15)

    def test_copies_stay_where_zeros_would_dilute(self):
        x = uneven()[1:2].expand(NUM, -1).clone()
        for pair in LAYOUT.pairs:
            for peer, rank in enumerate(RANKS):
                a_view(x, pair)[peer, rank:], b_view(x, pair)[peer, :, rank:] = 0, 0
        torch.testing.assert_close(run("replicate", x, ring(), 20, ranks=RANKS)[0], x, rtol=0, atol=1e-12)
        assert norms(run("hetlora", x, ring(), 20, ranks=RANKS)[0]).sum() < 0.9 * norms(x).sum()
