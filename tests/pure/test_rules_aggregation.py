"""What the rules that aggregate pairs promise together: server methods on a complete graph, orderings of their errors, frames, and
runs that begin at B = 0 with peers that are often alone."""

import numpy as np
import pytest
import torch
from test_rules import LAYOUT, NUM, activation, complete, mix_once, pairing, product, random_rows, ring, simulated, turned

import topologies
from dfl import methods, simulate
from dfl.adapters.layout import a_view, b_view

RULES = {"lora": {}, "decaf": {}, "decaf_own": {"gauge": "own"}, "florist": {"tau": 0.9}, "flora_na": {},
         "flora_na_aligned": {"align": "own"}, "flora_na_global": {"scope": "global"}, "flora_na_delta": {"form": "delta"},
         "lora_fair": {"ridge": 0.0}, "fed_svd": {}, "fedask": {}, "fedask_memory": {"memory": True}, "hetlora": {},
         "hetlora_ordered": {"order": True},
         "hetlora_pruned": {"gamma": 0.5}, "replicate": {}, "plora": {}, "fedrot": {}, "fedrot_soft": {"strength": 0.5},
         "fedrot_joint": {"criterion": "joint"}, "fedrot_start": {"reference": "start", "criterion": "alternate"},
         "fedrot_sender": {"side": "sender"}}
# a rule and one of its parameters
NAMES = {key: key.rsplit("_", 1)[0] if key not in methods.METHODS else key for key in RULES}


def mixed(key: str, x: torch.Tensor, w: np.ndarray, **params) -> torch.Tensor:
    return mix_once(NAMES[key], x, w, **{**RULES[key], **params})


def errors(key: str, x: torch.Tensor, w: np.ndarray, **params) -> torch.Tensor:
    """||sum_j w_ij ΔW_j - ΔW_i'|| (N,)."""
    return (torch.from_numpy(w) @ product(x) - product(mixed(key, x, w, **params))).norm(dim=1)


def drifted(seed=0, common="nothing") -> torch.Tensor:
    """Peers that began alike: common A, or common B, or neither, plus noise."""
    x = random_rows(seed)
    one = random_rows(seed + 100, 1)[0]
    out = one + 0.3 * x
    if common != "nothing":
        cut = LAYOUT.groups[common]
        out[:, cut] = one[cut]
    return out


SERVED = [key for key in RULES if not key.startswith("fedrot") and key not in ("flora_na_aligned", "flora_na_delta")]


@pytest.mark.parametrize("key", SERVED)
def test_all_peers_hold_the_servers_model_on_a_complete_graph(key):
    x = drifted(common="A" if key == "fed_svd" else "nothing")
    models = product(mixed(key, x, complete()))
    torch.testing.assert_close(models, models[:1].expand_as(models), rtol=0, atol=1e-10)


@pytest.mark.parametrize("key", ["fedrot", "fedrot_joint"])
def test_receivers_in_frames_of_their_own_come_close_to_the_server(key):
    x = drifted()
    models, best = product(mixed(key, x, complete())), product(mixed("decaf", x, complete()))
    assert (models - best).norm() < 0.25 * best.norm()
    assert (models - models.mean(0)).norm() < 0.1 * models.norm()


@pytest.mark.parametrize("key", ["lora", "flora_na", "flora_na_global", "flora_na_delta", "lora_fair", "fedrot", "fed_svd",
                                 "decaf"])
def test_a_common_a_leaves_no_error(key):
    assert errors(key, drifted(common="A"), ring()).max() < 1e-10


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("key", [key for key in RULES if key not in ("fed_svd", "florist") and not key.startswith("hetlora")])
def test_no_rank_r_rule_beats_the_svd(key, seed):
    for x in (drifted(seed), random_rows(seed)):
        best = errors("decaf", x, ring())
        assert (errors(key, x, ring()) >= best - 1e-9).all()
        if key in ("flora_na", "flora_na_delta", "lora_fair"):
            assert (errors(key, x, ring()) <= errors("lora", x, ring()) + 1e-9).all()


def rotated(x: torch.Tensor, only: list[int], proper: bool | None = None, seed=3) -> torch.Tensor:
    g = torch.linalg.qr(torch.randn(NUM, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    if proper is not None:
        g[..., 0] *= torch.where((torch.linalg.det(g) > 0) == proper, 1.0, -1.0)[:, None]
    keep = [peer for peer in range(NUM) if peer not in only]
    g[keep] = torch.eye(2, dtype=torch.float64)
    return turned(x, g)


@pytest.mark.parametrize("key", ["decaf", "decaf_own", "florist", "fedask", "hetlora_ordered"])
def test_rules_about_products_do_not_see_frames(key):
    x = drifted()
    torch.testing.assert_close(product(mixed(key, x, ring())), product(mixed(key, rotated(x, range(NUM)), ring())), rtol=0, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("proper", [True, False])
@pytest.mark.parametrize("criterion", ["A", "B", "joint"])
def test_turning_a_neighbour_changes_nothing_where_frames_are_aligned(criterion, proper):
    x = drifted()
    other = rotated(x, [1, 5], proper)  # the neighbours of peer 0
    for key in ("fedrot", "flora_na_aligned"):
        params = {"criterion": criterion} if key == "fedrot" else {}
        torch.testing.assert_close(product(mixed(key, x, ring(), **params))[0], product(mixed(key, other, ring(), **params))[0],
                                   rtol=0, atol=1e-9)


@pytest.mark.parametrize("key", ["lora", "flora_na", "lora_fair", "hetlora", "replicate", "plora", "fedrot_soft"])
def test_rules_about_factors_see_frames(key):
    x = drifted()
    assert (product(mixed(key, x, ring()))[0] - product(mixed(key, rotated(x, [1, 5]), ring()))[0]).norm() > 0.1


@pytest.mark.long
@pytest.mark.parametrize("key", RULES)
def test_from_zero_with_peers_that_are_often_alone(key):
    """B = 0 at the start, one neighbour or none in most rounds: finite, and every peer has learned."""
    result = simulated(NAMES[key], activation(0.1), rounds=8, **RULES[key])
    a, b = result.factors["toy"]
    assert a.isfinite().all() and ((b @ a).norm(dim=(1, 2)) > 0.5).all()


@pytest.mark.parametrize("key", RULES)
def test_two_peers_without_any_training_stay_at_zero(key):
    x = random_rows()
    x[:, LAYOUT.groups["A"]] = x[0, LAYOUT.groups["A"]]
    x[:, LAYOUT.groups["B"]] = 0
    out = mixed(key, x, pairing())
    assert (out[:, LAYOUT.groups["B"]] == 0).all()
    for pair in LAYOUT.pairs:
        assert (torch.linalg.matrix_rank(a_view(out, pair)) == 2).all()


@pytest.mark.long
@pytest.mark.parametrize("key", RULES)
def test_float32_rows_of_deficient_rank(key):
    x = drifted().float()
    for pair in LAYOUT.pairs:
        b_view(x, pair)[..., 1] = 0
        a_view(x, pair)[:3, 1] = 0  # a whole slot is dead at half of the peers
    out = mixed(key, x, ring())
    assert out.dtype == torch.float32 and out.isfinite().all()
    dense = mixed(key, x.double(), ring())
    torch.testing.assert_close(product(out), product(dense).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_energy_collapses_into_the_smallest_rank_without_a_residual():
    """A documented hazard of product mixing with unequal ranks: idle rounds lose what the smallest peer cannot hold."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64, generator=generator)).Q for _ in range(2))
    s = 0.8 ** torch.arange(8, dtype=torch.float64)
    ranks = (2, 2, 4, 4, 8, 8, 8, 8)
    a, b = torch.zeros(8, 8, 20, dtype=torch.float64), torch.zeros(8, 20, 8, dtype=torch.float64)
    for peer, rank in enumerate(ranks):
        a[peer, :rank], b[peer, :, :rank] = (s.sqrt()[:, None] * v.T)[:rank], (u * s.sqrt())[:, :rank]

    def share(factors) -> float:
        mean = torch.bmm(factors["x"][1], factors["x"][0]).mean(0)
        energy = torch.linalg.svdvals(mean).square()
        return float(energy[:2].sum() / energy.sum())

    ring_of_8 = topologies.build("ring", 8)
    idle = lambda factors, t, trains: None  # noqa: E731
    for name, params, collapses in (("decaf", {}, True), ("florist", {"tau": 1.0}, True), ("replicate", {}, False)):
        result = simulate(name, ring_of_8, {"x": (a, b)}, idle, 60, measure_every=0, ranks=ranks, **params)
        assert (share(result.factors) > 0.999) == collapses, name
    assert share({"x": (a, b)}) < 0.85
