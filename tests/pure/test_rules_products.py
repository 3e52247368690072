"""Product mixing in a peer's own frame, and with ranks chosen by energy."""

import numpy as np
import pytest
import torch
from one_round import build, gossip
from test_rules import LAYOUT, NUM, activation, mix_once, pairing, product, random_rows, ring, simulated

from dfl.adapters.layout import a_view, b_view


def run(x, w, rounds=1, **params):
    """Rows, states and bytes after some rounds of florist."""
    rule, x = build("florist", LAYOUT, **params), x.clone()
    states = [rule.init(row) for row in x]
    for t in range(rounds):
        traffic = gossip(rule, x, states, w, t)
    return x, states, traffic


class TestGauge:
    @pytest.mark.parametrize("split", ["balanced", "left"])
    def test_the_product_is_decafs_and_the_frame_is_the_peers(self, split):
        x = random_rows()
        plain, own = (mix_once("decaf", x, ring(), gauge=gauge, split=split) for gauge in ("none", "own"))
        torch.testing.assert_close(product(own), product(plain), rtol=0, atol=1e-12)
        factors = slice(0, LAYOUT.groups["B"].stop)
        assert ((own - x)[:, factors].norm(dim=1) < (plain - x)[:, factors].norm(dim=1)).all()

    def test_consensus_keeps_balanced_factors(self):
        x = mix_once("decaf", random_rows(), ring())[:1].expand(NUM, -1).clone()
        for pair in LAYOUT.pairs:  # another frame, still balanced
            turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
            a_view(x, pair).copy_(turn.mT @ a_view(x, pair))
            b_view(x, pair).copy_(b_view(x, pair) @ turn)
        torch.testing.assert_close(mix_once("decaf", x, ring(), gauge="own"), x, rtol=0, atol=1e-10)
        assert (mix_once("decaf", x, ring()) - x).abs().max() > 0.1

    def test_moments_go_on_to_fit(self):
        assert build("decaf", LAYOUT).changes_basis and not build("decaf", LAYOUT, gauge="own").changes_basis
        with pytest.raises(ValueError, match="method.gauge = 'mine' is not allowed; allowed: none, own"):
            build("decaf", LAYOUT, gauge="mine")


class TestFlorist:
    @pytest.mark.parametrize("tau, expected", [(0.3, {1}), (0.6, {1, 2}), (0.99, {2})])
    def test_is_the_dense_truncation_by_energy(self, tau, expected):
        x, w = random_rows(), ring()
        mixed, states, _ = run(x, w, tau=tau)
        for index, pair in enumerate(LAYOUT.pairs):
            dense = np.einsum("ij,jok->iok", w, (b_view(x, pair) @ a_view(x, pair)).numpy())
            u, s, vh = np.linalg.svd(dense, full_matrices=False)
            share = np.cumsum(s ** 2, 1) / (s ** 2).sum(1, keepdims=True)
            ranks = np.minimum(1 + (share < tau).sum(1), 2)
            assert [int(state["slots"][index]) for state in states] == ranks.tolist()
            for i, rank in enumerate(ranks):
                best = (u[i, :, :rank] * s[i, :rank]) @ vh[i, :rank]
                np.testing.assert_allclose(b_view(mixed, pair)[i] @ a_view(mixed, pair)[i], best, atol=1e-10)
                assert not a_view(mixed, pair)[i, rank:].any() and not b_view(mixed, pair)[i, :, rank:].any()
        assert {int(rank) for state in states for rank in state["slots"]} == expected

    def test_without_a_threshold_it_is_decaf(self):
        torch.testing.assert_close(mix_once("florist", random_rows(), ring(), tau=1.0), mix_once("decaf", random_rows(), ring()),
                                   rtol=0, atol=1e-14)

    def test_only_the_slots_kept_travel(self):
        x = random_rows()
        _, states, first = run(x, ring(), 1, tau=0.3)
        full = sum(pair.rank * (pair.d_in + pair.d_out) for pair in LAYOUT.pairs)
        assert first.message_bytes == 2 * NUM * 8 * (3 + full)
        assert all((state["slots"] == 1).all() and state["rank"] == 1 for state in states)
        assert run(x, ring(), 2, tau=0.3)[2].message_bytes == 2 * NUM * 8 * (3 + full // 2)

    def test_cap_and_ranks_limit(self):
        x = random_rows()
        assert all((state["slots"] == 1).all() for state in run(x, ring(), tau=1.0, cap=1)[1])
        ranks = (1, 2, 2, 1, 2, 2)
        for pair in LAYOUT.pairs:
            for peer in (0, 3):
                a_view(x, pair)[peer, 1:], b_view(x, pair)[peer, :, 1:] = 0, 0
        _, states, traffic = run(x, ring(), tau=1.0, ranks=ranks)
        assert [int(state["slots"].max()) for state in states] == list(ranks)
        full = sum(pair.rank * (pair.d_in + pair.d_out) for pair in LAYOUT.pairs)
        assert traffic.message_bytes == 8 * 2 * (6 * 3 + 4 * full + 2 * full // 2)

    def test_a_rank_comes_back_when_a_neighbour_brings_it(self):
        x = random_rows()
        rule, rows = build("florist", LAYOUT, tau=0.95), x.clone()
        for pair in LAYOUT.pairs:  # peer 0 is down to one slot
            a_view(rows, pair)[0, 1:], b_view(rows, pair)[0, :, 1:] = 0, 0
        states = [rule.init(row) for row in rows]
        states[0]["slots"] = torch.ones_like(states[0]["slots"])
        gossip(rule, rows, states, pairing(), 0)
        assert (states[0]["slots"] == 2).all()

    def test_trains_from_zero(self):
        result = simulated("florist", activation(), rounds=10, tau=0.9)
        a, b = result.factors["toy"]
        assert ((b @ a).norm(dim=(1, 2)) > 0.5).all()

    @pytest.mark.parametrize("params, message", [
        ({"tau": 0}, "method.tau = 0 is not allowed; allowed: a number above 0, up to 1"), ({"tau": 1.1}, "method.tau = 1.1"),
        ({"tau": True}, "method.tau = True"), ({"cap": 0}, "method.cap = 0"), ({"cap": 1.5}, "method.cap = 1.5"),
        ({"split": "x"}, "method.split")])
    def test_bad_values_are_refused(self, params, message):
        with pytest.raises(ValueError, match=message):
            build("florist", LAYOUT, **params)
