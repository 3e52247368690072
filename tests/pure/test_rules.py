"""One table that every rule passes, and what each rule promises on its own."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from one_round import build, gossip
from toy import Toy

import topologies
from dfl import methods, simulate
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.metrics.consensus import consensus
from dfl.schedules.alternating import phase
from dfl.transport import InProcess

NUM = 6
LAYOUT = make_layout([("q", 2, 7, 5, 1.0), ("v", 2, 7, 5, 1.0), ("o", 2, 4, 9, 2.0)], [("head", (3, 4))])


class Promise(NamedTuple):
    """A row of the table: what the network mean under a doubly stochastic W keeps, and parameters to build the rule with.

    factors: of A and B, linearly; model: of E + B A; product: of B A while the rank suffices; nothing. turns: in round 0 every peer
    changes the basis of its factors, received from or not, with the same product B A. draws: what a peer does is drawn by its number.
    """

    keeps: str
    params: dict = {}
    turns: bool = False
    draws: bool = False


TABLE = {
    "lora": Promise("factors"),
    "ffa": Promise("factors"),
    "share_a": Promise("factors"),
    "rolora": Promise("factors"),
    "adf": Promise("factors", {"T": 2}),
    "tad": Promise("factors", {"T": 3}),
    "lora_a2": Promise("nothing"),
    "plora": Promise("nothing", draws=True),
    "salf": Promise("nothing", draws=True),
    "fedrot": Promise("nothing"),
    "flora_na": Promise("nothing"),
    "lora_fair": Promise("nothing"),
    "fed_svd": Promise("nothing", turns=True),
    "decaf": Promise("product"),
    "florist": Promise("product", {"tau": 1.0}),
    "fedask": Promise("product"),
    "hetlora": Promise("nothing"),
    "replicate": Promise("factors"),
    "fedhl": Promise("model", {"residual_rank": 9}),
    "carry": Promise("product"),
    "fedex": Promise("model", {"residual_rank": 9}),
    "fedex_choco": Promise("model", {"residual_rank": 9}),
    "flora": Promise("model"),
    "local": Promise("factors"),
}
PARAMS = {name: promise.params for name, promise in TABLE.items()}


def random_rows(seed=0, num=NUM) -> torch.Tensor:
    x = empty_rows(num, LAYOUT.size, dtype=torch.float64)
    return x.copy_(torch.randn(num, LAYOUT.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def mix(name: str, x: torch.Tensor, w: np.ndarray, t: int = 0, **params) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows after one round from a fresh state, and the models that they and the residuals make."""
    rule = build(name, LAYOUT, **{**PARAMS[name], **params})
    out, states = x.clone(), [rule.init(row) for row in x]
    gossip(rule, out, states, w, t)
    models = product(out)
    if rule.residual is not None:
        models = models + product(torch.stack([state["residual"] for state in states]), rule.residual)
    return out, models


def mix_once(name: str, x: torch.Tensor, w: np.ndarray, t: int = 0, **params) -> torch.Tensor:
    return mix(name, x, w, t, **params)[0]


def product(x: torch.Tensor, layout=LAYOUT) -> torch.Tensor:
    """All products of a row, one after the other: (N, sum O I)."""
    return torch.cat([p.scaling * (b_view(x, p) @ a_view(x, p)).flatten(-2) for p in layout.pairs], -1)


def ring() -> np.ndarray:
    return topologies.build("ring", NUM).matrix(0)


def complete() -> np.ndarray:
    return topologies.build("complete", NUM).matrix(0)


everywhere = pytest.mark.parametrize("name", PARAMS)


def test_the_table_is_complete():
    # some want an adapter of their own: test_rules_cores, test_rules_weighted
    others = {"fed_sb", "ravan", "dora", "hira", "task_bank"}
    assert TABLE.keys() | others == methods.METHODS.keys() == methods.describe().keys()


@everywhere
def test_messages_hold_numbers_and_integers_apart(name):
    rule = build(name, LAYOUT, head="mixed", **PARAMS[name])
    x = random_rows()
    for t in range(6):
        if rule.sends(t):
            message = rule.message(x[0], t)
            assert all(part.dim() == 1 and part.is_floating_point() for part in message.parts.values())
            assert all(value.dtype == torch.int64 for value in message.meta.values())
            assert torch.equal(message.parts["head"], x[0, LAYOUT.groups["head"]])
        assert rule.trains(t) <= {"A", "B", "head"} and "head" in rule.trains(t)


@everywhere
def test_nobody_to_hear_changes_no_bit(name):
    x = random_rows()
    assert_unmixed(name, x, mix_once(name, x, np.eye(NUM)))


@everywhere
def test_one_peer_is_local_training(name):
    x = random_rows(num=1)
    assert_unmixed(name, x, mix_once(name, x, np.ones((1, 1))))


def assert_unmixed(name, before, after):
    if TABLE[name].turns:
        torch.testing.assert_close(product(after), product(before), rtol=0, atol=1e-12)
    else:
        assert torch.equal(after, before)


@everywhere
def test_consensus_is_a_fixed_point(name):
    x = random_rows(num=1).expand(NUM, -1).clone()
    mixed, models = mix(name, x, ring())
    torch.testing.assert_close(models, product(x), rtol=0, atol=1e-12)
    if TABLE[name].keeps == "factors":  # those of the other rules may turn
        torch.testing.assert_close(mixed, x, rtol=0, atol=1e-15)


@everywhere
def test_the_mean_is_kept(name):
    x, keeps = random_rows(), TABLE[name].keeps
    if keeps == "nothing":
        pytest.skip("the rule does not promise it")
    w = ring()
    if keeps == "product":  # exact as long as the rank suffices: one nonzero direction a peer, at most two are received
        for pair in LAYOUT.pairs:
            b_view(x, pair)[..., 1:] = 0
        w = pairing()
    mixed, models = mix(name, x, w, head="mixed")
    before, after = (x, mixed) if keeps == "factors" else (product(x), models)
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=0, atol=1e-12)
    head = LAYOUT.groups["head"]
    torch.testing.assert_close(mixed[:, head].mean(0), x[:, head].mean(0), rtol=0, atol=1e-12)


def pairing() -> np.ndarray:
    return np.kron(np.eye(NUM // 2), np.full((2, 2), 0.5))


@pytest.mark.long
@everywhere
def test_renaming_peers_renames_the_result(name):
    if TABLE[name].draws:
        pytest.skip("the peer's number decides what it does")
    x, w, order = random_rows(), ring(), [3, 0, 5, 1, 4, 2]
    _, renamed = mix(name, x[order], w[np.ix_(order, order)])
    torch.testing.assert_close(renamed, mix(name, x, w)[1][order], rtol=0, atol=1e-10)


@everywhere
def test_what_does_not_travel_keeps_its_bits(name):
    x, rule = random_rows(), build(name, LAYOUT, head="local", **PARAMS[name])
    for t in range(2):
        mixed = mix_once(name, x, ring(), t, head="local")
        turned = {"A", "B"} if TABLE[name].turns and t == 0 else set()
        for group in {"A", "B", "head"} - rule.sends(t) - turned:
            cut = LAYOUT.groups[group]
            assert torch.equal(mixed[:, cut], x[:, cut])
        for group in rule.sends(t):
            assert not torch.equal(mixed[:, LAYOUT.groups[group]], x[:, LAYOUT.groups[group]])


@pytest.mark.parametrize("name", ["lora", "adf", "tad"])
def test_full_averaging_makes_peers_equal(name):
    mixed = mix_once(name, random_rows(), complete(), head="mixed")
    torch.testing.assert_close(mixed, mixed.mean(0).expand_as(mixed), rtol=0, atol=1e-14)
    merged = consensus(InProcess(), random_rows(), LAYOUT, len(mixed), product=False)
    torch.testing.assert_close(mixed[0], merged, rtol=0, atol=1e-14)


def test_disagreement_contracts_by_rho_on_average():
    topology = topologies.build("edge_activation", NUM, p=0.3, base="complete", seed=0)
    rho = topologies.spectrum.contraction(topology)
    x = random_rows()
    ratios = []
    for t in range(300):
        mixed = mix_once("lora", x, topology.matrix(t))
        ratios.append(float((mixed - mixed.mean(0)).square().sum() / (x - x.mean(0)).square().sum()))
    # the factors only; the frozen head does not mix
    share = float((x - x.mean(0))[:, LAYOUT.groups["head"]].square().sum() / (x - x.mean(0)).square().sum())
    assert np.mean(ratios) <= rho * (1 - share) + share + 0.02


def test_phases_are_a_function_of_the_global_round():
    assert "".join(phase(t, 1) for t in range(6)) == "BABABA"
    assert "".join(phase(t, 2) for t in range(8)) == "BBAABBAA"
    assert "".join(phase(t, 5) for t in range(12)) == "BBBBBAAAAABB"


@pytest.mark.parametrize("params, message", [
    ({"T": 0}, "method.T = 0"), ({"T": 2.5}, "method.T = 2.5"), ({"T": True}, "method.T = True")])
def test_bad_intervals_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build("tad", LAYOUT, **params)


def simulated(name, topology, rounds=6, **params):
    toy = Toy(0)
    return simulate(name, topology, toy.factors(), toy.local_step, rounds, **params)


def activation(p=0.2):
    return topologies.build("edge_activation", 10, p=p, base="complete", seed=1)


def assert_same(one, other, atol=1e-12):
    for a, b in zip(one.factors["toy"], other.factors["toy"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_tad_with_an_endless_phase_is_ffa():
    assert_same(simulated("tad", activation(), T=100), simulated("ffa", activation()))


def test_tad_and_rolora_agree_at_full_connectivity():
    full = topologies.build("complete", 10)
    assert_same(simulated("tad", full, T=1), simulated("rolora", full))


def test_adf_and_tad_are_one_algorithm():
    assert_same(simulated("adf", activation(), T=3), simulated("tad", activation(), T=3), atol=0)


@pytest.mark.parametrize("name, params", [("lora", {}), ("decaf", {})])
def test_without_edges_everything_is_local(name, params):
    assert_same(simulated(name, activation(0.0), **params), simulated("local", activation(0.0)), atol=0)


def test_ffa_has_no_cross_term_and_rolora_keeps_the_frozen_disagreement():
    assert max(m["cross_term"] for m in simulated("ffa", activation()).measures) < 1e-10
    history = simulated("rolora", activation(), rounds=8).measures
    for before, after in zip(history, history[1:], strict=False):
        frozen = "A" if after["round"] % 2 == 0 else "B"
        assert after[f"consensus_distance_{frozen}"] == before[f"consensus_distance_{frozen}"]


def test_the_frozen_factor_contracts_inside_a_phase():
    history = simulated("tad", activation(0.5), rounds=20, T=10).measures
    inside_a_phase = [m["consensus_distance_B"] for m in history[10:20]]
    assert inside_a_phase == sorted(inside_a_phase, reverse=True)


def test_ffa_with_different_frozen_a_is_refused():
    """Mixed B factors would belong to none of them: not an average, a type error."""
    toy = Toy(0)
    factors = toy.factors()
    factors["toy"][0].copy_(torch.randn(factors["toy"][0].shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(TypeError, match="10 different A, which this rule never mixes"):
        simulate("ffa", activation(), factors, toy.local_step, 5)


def test_a_first_phase_on_a_would_be_wasted():
    toy, factors = Toy(0), Toy(0).factors()
    toy.noise = lambda t: np.zeros((20, 2, 10, 4, 32))
    before = factors["toy"][0].clone()
    toy.local_step(factors, 0, {"A"})
    assert torch.equal(factors["toy"][0], before)


def turned(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The same products in other bases: B G, G^-1 A, another G for each peer."""
    out = x.clone()
    for pair in LAYOUT.pairs:
        a_view(out, pair).copy_(torch.linalg.solve(g, a_view(x, pair)))
        b_view(out, pair).copy_(b_view(x, pair) @ g)
    return out


def test_products_do_not_see_the_basis_and_factors_do():
    x = random_rows()
    g = torch.randn(NUM, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    other = turned(x, g)
    torch.testing.assert_close(product(other), product(x), rtol=0, atol=1e-9)
    mixed, mixed_other = mix_once("decaf", x, ring()), mix_once("decaf", other, ring())
    torch.testing.assert_close(product(mixed), product(mixed_other), rtol=0, atol=1e-9)
    assert (product(mix_once("lora", x, ring())) - product(mix_once("lora", other, ring()))).abs().max() > 0.1


class TestDecaf:
    def test_is_the_dense_truncation(self):
        x, w = random_rows(), ring()
        mixed = mix_once("decaf", x, w)
        for pair in LAYOUT.pairs:
            dense = np.einsum("ij,jok->iok", w, (b_view(x, pair) @ a_view(x, pair)).numpy())
            u, s, vh = np.linalg.svd(dense, full_matrices=False)
            best = (u[..., :2] * s[:, None, :2]) @ vh[:, :2]
            np.testing.assert_allclose(b_view(mixed, pair) @ a_view(mixed, pair), best, atol=1e-10)

    def test_reports_its_truncation_error(self):
        x, w, rule = random_rows(), ring(), build("decaf", LAYOUT)
        states, mixed = [rule.init(row) for row in x], x.clone()
        gossip(rule, mixed, states, w, 0)
        expected = (torch.from_numpy(w) @ product(x) - product(mixed)).norm(dim=1)
        torch.testing.assert_close(torch.stack([s["truncation_error"] for s in states]), expected, rtol=0, atol=1e-10)

    def test_splits(self):
        x = random_rows()
        balanced, left = mix_once("decaf", x, ring()), mix_once("decaf", x, ring(), split="left")
        torch.testing.assert_close(product(balanced), product(left), rtol=0, atol=1e-10)
        for pair in LAYOUT.pairs:
            a, b = a_view(balanced, pair), b_view(balanced, pair)
            torch.testing.assert_close(b.mT @ b, a @ a.mT, rtol=0, atol=1e-10)
            a = a_view(left, pair)
            torch.testing.assert_close(a @ a.mT, torch.eye(2, dtype=a.dtype).expand(NUM, 2, 2), rtol=0, atol=1e-10)
        with pytest.raises(ValueError, match="method.split = 'right'"):
            build("decaf", LAYOUT, split="right")

    @pytest.mark.parametrize("split", ["balanced", "left"])
    def test_a_zero_product_does_not_kill_the_adapter(self, split):
        x = random_rows()
        x[:, LAYOUT.groups["B"]] = 0
        mixed = mix_once("decaf", x, ring(), split=split)
        assert (mixed[:, LAYOUT.groups["B"]] == 0).all()
        for pair in LAYOUT.pairs:
            assert (torch.linalg.matrix_rank(a_view(mixed, pair)) == 2).all()

    @pytest.mark.parametrize("split", ["balanced", "left"])
    def test_a_null_direction_stays_trainable(self, split):
        x = random_rows()
        for pair in LAYOUT.pairs:
            b_view(x, pair)[..., 1] = 0
        x[:] = x[0]  # rank 1 everywhere
        mixed = mix_once("decaf", x, ring(), split=split)
        torch.testing.assert_close(product(mixed), product(x), rtol=0, atol=1e-10)
        for pair in LAYOUT.pairs:
            assert (a_view(mixed, pair).norm(dim=-1) > 0.1).all()

    def test_sufficient_rank_is_exact(self):
        x = random_rows()
        for pair in LAYOUT.pairs:
            b_view(x, pair)[..., 1] = 0
        torch.testing.assert_close(product(mix_once("decaf", x, pairing())), torch.from_numpy(pairing()) @ product(x),
                                   rtol=0, atol=1e-10)

    def test_shared_a_loses_nothing(self):
        x = random_rows()
        x[:, LAYOUT.groups["A"]] = x[0, LAYOUT.groups["A"]]
        torch.testing.assert_close(product(mix_once("decaf", x, ring())), product(mix_once("ffa", x, ring())), rtol=0, atol=1e-10)

    def test_training_from_zero_goes_on(self):
        result = simulated("decaf", activation(), rounds=10)
        a, b = result.factors["toy"]
        assert ((b @ a).norm(dim=(1, 2)) > 0.5).all()


def test_consensus_of_products():
    x = random_rows()
    row = consensus(InProcess(), x, LAYOUT, len(x), product=True)
    for pair in LAYOUT.pairs:
        dense = (b_view(x, pair) @ a_view(x, pair)).mean(0).numpy()
        u, s, vh = np.linalg.svd(dense, full_matrices=False)
        np.testing.assert_allclose(b_view(row, pair) @ a_view(row, pair), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-10)


class TestSimulate:
    def test_undoes_what_a_step_does_to_a_frozen_factor(self):
        def vandal(factors, t, trains):
            for a, b in factors.values():
                a.add_(1.0)
                b.add_(1.0)
        toy = Toy(0)
        result = simulate("ffa", activation(), toy.factors(), vandal, 1)
        assert torch.equal(result.factors["toy"][0], toy.factors()["toy"][0])

    def test_leaves_the_callers_factors_alone(self):
        toy = Toy(0)
        factors = toy.factors()
        simulate("lora", activation(), factors, toy.local_step, 2)
        assert (factors["toy"][1] == 0).all()

    def test_refuses_what_does_not_fit(self):
        toy = Toy(0)
        with pytest.raises(ValueError, match="10 peers, the topology 5"):
            simulate("lora", topologies.build("ring", 5), toy.factors(), toy.local_step, 1)
        with pytest.raises(ValueError, match="did you mean 'lora'"):
            simulate("lore", activation(), toy.factors(), toy.local_step, 1)
        with pytest.raises(ValueError, match="method.Tee = 3"):
            simulate("tad", activation(), toy.factors(), toy.local_step, 1, Tee=3)
        with pytest.raises(ValueError, match="shapes A"):
            simulate("lora", activation(), {"q": (torch.zeros(10, 2, 3), torch.zeros(10, 3, 4))}, toy.local_step, 1)

    def test_tad_finds_its_phases_in_the_topology_itself(self):
        assert len(simulated("tad", activation()).measures) == 6

    def test_refuses_weights_that_do_not_average(self):
        """As recipes do, and in the same words; and sequences from outside, which may say nothing of themselves."""
        toy, graph = Toy(0), topologies.build("star", 10, weights="push_sum")
        with pytest.raises(ValueError, match="has columns that sum to one, but not rows: receivers would not average; allowed"):
            simulate("lora", graph, toy.factors(), toy.local_step, 1)

        class Outside:
            num_peers = 10

            def matrix(self, t):
                return np.eye(10) if t == 0 else np.eye(10) + 0.1 * np.eye(10, k=1)
        assert len(simulate("lora", Outside(), toy.factors(), toy.local_step, 1).measures) == 1
        with pytest.raises(ValueError, match="row 0 of W in round 1 sums to 1.1: receivers would not average"):
            simulate("lora", Outside(), toy.factors(), toy.local_step, 2)

    def test_no_edges_no_bytes(self):
        assert all(m["edges"] == m["message_bytes"] == 0 for m in simulated("lora", activation(0.0)).measures)
        full = simulated("lora", topologies.build("complete", 10)).measures[0]
        assert full["edges"] == 90 and full["message_bytes"] == 90 * 8 * (4 * 32 + 32 * 4)
