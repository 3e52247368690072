"""Residual rules: nothing is lost, and the dense formulas say the same."""

import numpy as np
import pytest
import torch
from one_round import build, gossip

import topologies
from dfl import methods
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout

NUM = 8
LAYOUT = make_layout([("q", 4, 14, 12, 1.0), ("v", 4, 14, 12, 1.0), ("o", 4, 9, 16, 2.0)])
FULL = 12  # enough for everything: the smaller side of the largest layer


def rows(seed=0, ranks=None, layout=LAYOUT) -> torch.Tensor:
    x = empty_rows(NUM, layout.size, dtype=torch.float64)
    x.copy_(torch.randn(NUM, layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return x if ranks is None else trimmed(x, ranks)


def trimmed(x, ranks):
    for pair in LAYOUT.pairs:
        for i, rank in enumerate(ranks):
            a_view(x, pair)[i, rank:] = 0
            b_view(x, pair)[i, :, rank:] = 0
    return x


def ring(num=NUM) -> np.ndarray:
    return topologies.build("ring", num).matrix(0)


def products(x, layout) -> dict[str, np.ndarray]:
    return {p.name: (b_view(x, p) @ a_view(x, p)).numpy() for p in layout.pairs}


def models(x, states, rule) -> dict[str, np.ndarray]:
    """E_i + B_i A_i, dense: (N, O, I) by layer."""
    found = products(x, LAYOUT)
    if rule.residual is not None:
        beside = products(torch.stack([s["residual"] for s in states]), rule.residual)
        found = {name: value + beside[name] for name, value in found.items()}
    return found


def run(name, x, w, rounds, ranks=None, **params):
    """Idle rounds; the models after each of them."""
    rule = build(name, LAYOUT, ranks=ranks, **params)
    states = [rule.init(row) for row in x]
    history = [models(x, states, rule)]
    for t in range(rounds):
        gossip(rule, x, states, w, t)
        history.append(models(x, states, rule))
    return history, states, rule


def best(matrix, rank):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


RANKS = (1, 1, 2, 2, 4, 4, 4, 4)


class TestFedHL:
    @pytest.mark.parametrize("ranks", [None, RANKS])
    def test_is_the_dense_recursion(self, ranks):
        x, w, rule = rows(0, ranks), ring(), build("fedhl", LAYOUT, ranks=ranks, residual_rank=FULL)
        states = [rule.init(row) for row in x]
        dense = {p.name: np.zeros((NUM, p.d_out, p.d_in)) for p in LAYOUT.pairs}
        for t in range(4):
            x += 0.1 * rows(9 + t, ranks)  # what the peers learn
            before = products(x, LAYOUT)
            gossip(rule, x, states, w, t)
            after, residuals = products(x, LAYOUT), products(torch.stack([s["residual"] for s in states]), rule.residual)
            for p in LAYOUT.pairs:
                whole = np.einsum("ij,jok->iok", w, dense[p.name] + before[p.name])
                for i in range(NUM):
                    np.testing.assert_allclose(after[p.name][i], best(whole[i], 4 if ranks is None else ranks[i]), atol=1e-9)
                dense[p.name] = whole - after[p.name]
                np.testing.assert_allclose(residuals[p.name], dense[p.name], atol=1e-9)

    @pytest.mark.long
    @pytest.mark.parametrize("ranks", [None, RANKS])
    def test_the_mean_is_kept_for_a_hundred_rounds(self, ranks):
        history, _, _ = run("fedhl", rows(0, ranks), ring(), 100, ranks, residual_rank=FULL)
        for name in history[0]:
            np.testing.assert_allclose(history[-1][name].mean(0), history[0][name].mean(0), rtol=0, atol=1e-12)

    def test_the_first_round_is_decaf(self):
        one, _, _ = run("decaf", rows(), ring(), 1)
        x = rows()
        run("fedhl", x, ring(), 1)
        for name, value in products(x, LAYOUT).items():
            np.testing.assert_allclose(value, one[-1][name], atol=1e-10)

    def test_the_servers_form(self):
        """Complete graph: X + mean_j (B_j A_j - T(X)), the same at every peer, when all start from X with its T(X)."""
        x = rows()
        x[:] = x[0]
        rule = build("fedhl", LAYOUT, residual_rank=FULL)
        states = [rule.init(row) for row in x]
        rest = torch.randn(rule.residual.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        states = [s | {"residual": rest.clone()} for s in states]
        start = models(x, states, rule)
        shared = products(x, LAYOUT)
        x += 0.1 * rows(3)  # what the clients learn
        trained = products(x, LAYOUT)
        gossip(rule, x, states, np.full((NUM, NUM), 1 / NUM), 0)
        for name, value in models(x, states, rule).items():
            expected = start[name][0] + (trained[name] - shared[name]).mean(0)
            np.testing.assert_allclose(value, np.broadcast_to(expected, value.shape), atol=1e-10)

    def test_a_capped_residual_reports_what_it_cut(self):
        x, w = rows(), ring()
        before = products(x, LAYOUT)
        history, states, rule = run("fedhl", x, w, 1, residual_rank=2)
        for i in range(NUM):
            squared = sum(p.scaling ** 2 * np.square(np.einsum("j,jok->ok", w[i], before[p.name]) - history[-1][p.name][i]).sum()
                          for p in LAYOUT.pairs)
            assert float(states[i]["truncation_error"]) == pytest.approx(squared ** 0.5, rel=1e-9)
            assert float(states[i]["truncation_error"]) > 0.1

    @pytest.mark.parametrize("ranks", [None, RANKS])
    @pytest.mark.parametrize("power", [0, 1, 2])
    def test_a_complete_graph_is_the_server(self, ranks, power):
        """FedHL in plain numpy: one full-rank X, clients that start from its best rank-R_i parts, progress added to X."""
        x, own = rows(0, ranks), [4] * NUM if ranks is None else ranks
        for pair in LAYOUT.pairs:
            b_view(x, pair)[:] = 0
        rule = build("fedhl", LAYOUT, ranks=ranks, residual_rank=FULL, drift_power=power)
        states = [rule.init(row) for row in x]
        server = {p.name: np.zeros((p.d_out, p.d_in)) for p in LAYOUT.pairs}
        for t in range(6):
            cut = {name: np.stack([best(value, rank) for rank in own]) for name, value in server.items()}
            for name, value in products(x, LAYOUT).items():
                np.testing.assert_allclose(value, cut[name], atol=1e-8)
            x += 0.2 * rows(20 + t, ranks)
            trained = products(x, LAYOUT)
            left_out = sum(p.scaling ** 2 * np.square(server[p.name] - cut[p.name]).sum((1, 2)) for p in LAYOUT.pairs)
            whole = sum(p.scaling ** 2 * np.square(server[p.name]).sum() for p in LAYOUT.pairs)
            weights = 1 / ((left_out / whole if t else left_out) ** power + 1e-6)
            weights /= weights.sum()
            gossip(rule, x, states, np.full((NUM, NUM), 1 / NUM), t)
            for name, value in models(x, states, rule).items():
                server[name] = server[name] + np.einsum("j,jok->ok", weights, trained[name] - cut[name])
                np.testing.assert_allclose(value, np.broadcast_to(server[name], value.shape), atol=1e-8)

    def test_off_the_complete_graph_models_are_averaged_and_progress_is_weighed(self):
        x, w = rows(0, RANKS), ring()
        rule = build("fedhl", LAYOUT, ranks=RANKS, residual_rank=FULL, drift_power=1)
        states = [rule.init(row) for row in x]
        for t in range(3):
            start, before = models(x, states, rule), products(x, LAYOUT)
            tails = np.array([float(s["tail_energy"]) for s in states])
            weights = w / (tails + 1e-6)
            weights /= weights.sum(1, keepdims=True)
            x += 0.2 * rows(30 + t, RANKS)
            learnt = {name: value - before[name] for name, value in products(x, LAYOUT).items()}
            gossip(rule, x, states, w, t)
            for name, value in models(x, states, rule).items():
                expected = np.einsum("ij,jok->iok", w, start[name]) + np.einsum("ij,jok->iok", weights, learnt[name])
                np.testing.assert_allclose(value, expected, atol=1e-8)
        assert tails[0] > 2 * tails[4:].max()

    def test_who_heard_nobody_keeps_all_of_its_progress(self):
        """Its next round starts where it stands, not where it was mixed last."""
        x = rows(0, RANKS)
        rule = build("fedhl", LAYOUT, ranks=RANKS, residual_rank=FULL, drift_power=2)
        states = [rule.init(row) for row in x]
        gossip(rule, x, states, np.eye(NUM), 0)
        x += rows(5, RANKS)
        gossip(rule, x, states, np.eye(NUM), 1)
        alone = models(x, states, rule)
        gossip(rule, x, states, ring(), 2)
        for name, value in models(x, states, rule).items():
            np.testing.assert_allclose(value, np.einsum("ij,jok->iok", ring(), alone[name]), atol=1e-9)

    @pytest.mark.parametrize("power", [0, 2])
    def test_idle_peers_of_unequal_ranks_agree_as_fast_as_w_mixes(self, power):
        history, _, _ = run("fedhl", rows(0, RANKS), ring(), 40, RANKS, residual_rank=FULL, drift_power=power)
        slem = topologies.spectrum.slem(ring())
        for name in history[0]:
            spread = [np.linalg.norm(models[name] - models[name].mean(0)) for models in history]
            assert spread[40] < 1.01 * slem ** 40 * spread[0]

    @pytest.mark.parametrize("power, pairs_sent", [(0, 1), (2, 2)])
    def test_a_message_holds_the_pair_and_as_much_of_the_residual_as_there_is(self, power, pairs_sent):
        x, w = rows(0, RANKS), ring()
        rule = build("fedhl", LAYOUT, ranks=RANKS, residual_rank=3, drift_power=power)
        states = [rule.init(row) for row in x]
        for t in range(3):
            kept = [[int((a_view(s["residual"], p) != 0).any(-1).sum()) for p in rule.residual.pairs] for s in states]
            traffic = gossip(rule, x, states, w, t)
            numbers = sum(len(LAYOUT.pairs) + (power > 0) + sum((pairs_sent * rank + more) * (p.d_in + p.d_out)
                                                                for p, more in zip(LAYOUT.pairs, mine, strict=True))
                          for rank, mine in zip(RANKS, kept, strict=True))
            assert traffic.message_bytes == 2 * 8 * numbers
            assert kept == [[0 if t == 0 else 3] * 3] * NUM


class TestCollapse:
    """Idle gossip of peers of unequal ranks: the energy collapses into the smallest rank, but not where a residual is kept."""

    RANKS = (2, 2, 4, 4, 8, 8, 8, 8)
    WIDE = make_layout([("q", 8, 36, 48, 1.0)])

    def start(self):
        rng = np.random.default_rng(0)
        u, v = np.linalg.qr(rng.standard_normal((48, 8)))[0], np.linalg.qr(rng.standard_normal((36, 8)))[0]
        base = (u * 0.8 ** np.arange(8)) @ v.T
        x = empty_rows(8, self.WIDE.size, dtype=torch.float64)
        (pair,) = self.WIDE.pairs
        for i, rank in enumerate(self.RANKS):
            noise = rng.standard_normal((48, 36))
            u, s, vh = np.linalg.svd(base + 0.02 * np.linalg.norm(base) * noise / np.linalg.norm(noise), full_matrices=False)
            b_view(x, pair)[i, :, :rank] = torch.from_numpy(u[:, :rank] * np.sqrt(s[:rank]))
            a_view(x, pair)[i, :rank] = torch.from_numpy(np.sqrt(s[:rank])[:, None] * vh[:rank])
        return x, pair

    def share(self, name, **params):
        """Energy of the network mean in its two leading directions, and its distance from the mean before."""
        x, pair = self.start()
        mean = (b_view(x, pair) @ a_view(x, pair)).mean(0).numpy()
        rule = build(name, self.WIDE, ranks=self.RANKS, **params)
        states = [rule.init(row) for row in x]
        for t in range(60):
            gossip(rule, x, states, ring(), t)
        after = b_view(x, pair) @ a_view(x, pair)
        if rule.residual is not None:
            (other,) = rule.residual.pairs
            rest = torch.stack([s["residual"] for s in states])
            after = after + b_view(rest, other) @ a_view(rest, other)
        after = after.mean(0).numpy()
        s = np.linalg.svd(after, compute_uv=False) ** 2
        return s[:2].sum() / s.sum(), np.linalg.norm(after - mean) / np.linalg.norm(mean)

    def test_truncated_products_collapse(self):
        share, moved = self.share("decaf")
        assert share > 0.9999 and 0.35 < moved < 0.6  # published: 0.43 to 0.49 after 60 idle rounds

    @pytest.mark.parametrize("name, params, moved", [("fedhl", {"residual_rank": 36}, 1e-12), ("carry", {}, 0.02)])
    def test_residuals_keep_the_energy_where_it_was(self, name, params, moved):
        share, distance = self.share(name, **params)
        assert 0.7 < share < 0.85 and distance < moved


class TestFedEx:
    def test_every_round_is_exact_at_every_peer(self):
        x, w, rule = rows(), ring(), build("fedex", LAYOUT, residual_rank=FULL)
        states = [rule.init(row) for row in x]
        kept = {p.name: np.zeros((NUM, p.d_out, p.d_in)) for p in LAYOUT.pairs}
        for t in range(5):
            before, factors = products(x, LAYOUT), x.clone()
            gossip(rule, x, states, w, t)
            torch.testing.assert_close(x, torch.from_numpy(w) @ factors, rtol=0, atol=1e-12)
            for name, value in models(x, states, rule).items():
                expected = kept[name] + np.einsum("ij,jok->iok", w, before[name])
                np.testing.assert_allclose(value, expected, atol=1e-10)
                kept[name] = value - products(x, LAYOUT)[name]

    def test_the_servers_form(self):
        x = rows()
        before = products(x, LAYOUT)
        history, _, _ = run("fedex", x, np.full((NUM, NUM), 1 / NUM), 1, residual_rank=FULL)
        for name, value in history[-1].items():
            np.testing.assert_allclose(value, np.broadcast_to(before[name].mean(0), value.shape), atol=1e-10)


class TestFlora:
    @pytest.mark.parametrize("ranks", [None, RANKS])
    def test_merges_the_weighted_stack_and_starts_anew(self, ranks):
        x = rows(0, ranks)
        before, weights = products(x, LAYOUT), np.random.default_rng(0).dirichlet(np.ones(NUM))
        history, states, rule = run("flora", x, np.tile(weights, (NUM, 1)), 1, ranks, residual_rank=FULL)
        for pair in LAYOUT.pairs:
            expected = np.einsum("j,jok->ok", weights, before[pair.name])
            np.testing.assert_allclose(history[-1][pair.name], np.broadcast_to(expected, history[-1][pair.name].shape), atol=1e-10)
            assert (b_view(x, pair) == 0).all()
            for i in range(NUM):
                rank = 4 if ranks is None else ranks[i]
                assert (a_view(x, pair)[i, rank:] == 0).all()
                assert torch.equal(a_view(x, pair)[i, :rank], a_view(x, pair)[-1, :rank])
        assert all(torch.equal(s["residual"], states[0]["residual"]) for s in states)

    def test_is_refused_where_not_everybody_hears_everybody(self):
        rule = build("flora", LAYOUT)
        methods.check_topology(rule.method, topologies.build("complete", NUM))
        for graph in (topologies.build("ring", NUM), topologies.build("edge_activation", NUM, base="complete", p=0.5)):
            with pytest.raises(ValueError, match="method.name = 'flora' needs"):
                methods.check_topology(rule.method, graph)


class TestChoco:
    """Eight peers on a ring, rank 4 in 48 x 36, from one A with drift."""

    THIN = make_layout([("q", 4, 36, 48, 1.0)])

    def errors(self, gamma, rounds):
        rng = np.random.default_rng(0)
        (pair,), x = self.THIN.pairs, empty_rows(NUM, self.THIN.size, dtype=torch.float64)
        shared_a, shared_b = rng.standard_normal((4, 36)) / 6, rng.standard_normal((48, 4))
        for i in range(NUM):
            b_view(x, pair)[i] = torch.from_numpy(0.3 * shared_b + 0.3 * rng.standard_normal((48, 4)))
            a_view(x, pair)[i] = torch.from_numpy(shared_a + 0.2 * rng.standard_normal((4, 36)) / 6)
        mean = (b_view(x, pair) @ a_view(x, pair)).mean(0)
        rule = build("fedex_choco", self.THIN, gamma=gamma, residual_rank=36)
        states, (other,), errors = [rule.init(row) for row in x], rule.residual.pairs, []
        for t in range(rounds):
            gossip(rule, x, states, ring(), t)
            rest = torch.stack([s["residual"] for s in states])
            whole = b_view(x, pair) @ a_view(x, pair) + b_view(rest, other) @ a_view(rest, other)
            torch.testing.assert_close(whole.mean(0), mean, rtol=0, atol=1e-10 * float(whole.norm()))
            errors.append(float((whole - mean).square().sum((1, 2)).mean().sqrt() / mean.norm()))
        return errors

    @pytest.mark.long
    def test_the_mean_is_kept_and_consensus_reached(self):
        errors = self.errors(0.3, 120)  # published: 1.2e-2 after 60 rounds, 4.5e-4 after 120
        assert errors[59] == pytest.approx(1.2e-2, rel=0.2) and errors[119] == pytest.approx(4.5e-4, rel=0.2)

    @pytest.mark.long
    @pytest.mark.parametrize("gamma, rounds", [(0.5, 120), (1.0, 60)])
    def test_a_step_that_is_too_long_diverges(self, gamma, rounds):
        errors = self.errors(gamma, rounds)
        assert errors[-1] > 3 * min(errors)

    @pytest.mark.parametrize("graph", ["ring", "star"])
    def test_copies_are_the_same_bits_at_all_holders(self, graph):
        """Also where a holder of three has them in places whose memory is aligned in other ways than a holder of eight."""
        layout = make_layout([(name, 3, 37, 51, 1.0) for name in "qkv"])
        x = empty_rows(NUM, layout.size)
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        rule, w = build("fedex_choco", layout), topologies.build(graph, NUM).matrix(0)
        states = [rule.init(row) for row in x]
        for t in range(8):  # the copies are full after five
            gossip(rule, x, states, w, t)
        holders = {}
        for state in states:
            for j, copy in zip(state["holders"].tolist(), state["copies"], strict=True):
                holders.setdefault(j, []).append(copy)
        for j, copies in holders.items():
            assert len(copies) == (w[:, j] > 0).sum()
            assert all(torch.equal(copy, states[j]["copy"]) for copy in copies)

    def test_needs_a_static_graph_and_every_message(self):
        rule = build("fedex_choco", LAYOUT)
        with pytest.raises(ValueError, match="same in every round"):
            methods.check_topology(rule.method, topologies.build("edge_activation", NUM, base="complete", p=0.5))
        x = rows()
        states = [rule.init(row) for row in x]
        gossip(rule, x, states, ring(), 0)
        with pytest.raises(ConnectionError, match="copies are out of step"):
            gossip(rule, x, states, topologies.build("complete", NUM).matrix(0), 1)
