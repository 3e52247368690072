"""The adapt-then-combine template: against dense recursions with a matrix root, skipped rounds, penalties, refusals."""

import numpy as np
import pytest
import torch
from quadratics import CURVATURE, NUM, RING, Given, centres, descend, gradient

import topologies
from dfl.adapters.layout import a_view, b_view, make_layout
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, Context, build
from dfl.schedules import SCHEDULES
from dfl.simulation import Rows
from dfl.slots import Plan, Round, Schedule
from dfl.transport import InProcess
from dfl.wrappers.flexatc import best_probability, coin, members
from dfl.wrappers.proximal import make_prox

EYE = np.eye(NUM)
# by member: A, B^2 and C as the literature has them
DENSE = {"ed": ((EYE + RING) / 2, (EYE - RING) / 2, 0 * EYE), "aug_dgm": (RING @ RING, (EYE - RING) @ (EYE - RING), 0 * EYE),
         "next": (RING, (EYE - RING) @ (EYE - RING), EYE - RING), "extra": (EYE, (EYE - RING) / 2, (EYE - RING) / 2),
         "diging": (EYE, (EYE - RING) @ (EYE - RING), EYE - RING @ RING), "dgd": (EYE, 0 * EYE, EYE - RING)}


def root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T


def template(member: str, lr: float, rounds: int, d: int) -> np.ndarray:
    """z = (I - C) x - lr g - B y;  y <- y + B z;  x <- A z, dense."""
    a, b, c = DENSE[member]
    b, x, y = root(b), np.zeros((NUM, d)), np.zeros((NUM, d))
    for _ in range(rounds):
        z = (EYE - c) @ x - lr * gradient(x) - b @ y
        y, x = y + b @ z, a @ z
    return x


@pytest.mark.parametrize("member", [member for member in DENSE if member != "aug_dgm"])
def test_a_member_is_its_template(member):
    found = descend(Choice("flexatc", {"member": member}), "ring", rounds=30, lr=0.1, d=3)
    np.testing.assert_allclose(found.x, template(member, 0.1, 30, 3), rtol=0, atol=1e-11)


def test_aug_dgm_begins_with_everybodys_own_gradient():
    """x <- W (x - lr y), y <- W (y + g_new - g_old), y = g at first: the template with another first round."""
    x = np.zeros((NUM, 3))
    g = y = gradient(x)
    for _ in range(30):
        x = RING @ (x - 0.1 * y)
        new = gradient(x)
        y, g = RING @ (y + new - g), new
    found = descend(Choice("flexatc", {"member": "aug_dgm"}), "ring", rounds=30, lr=0.1, d=3)
    np.testing.assert_allclose(found.x, x, rtol=0, atol=1e-12)


def test_members_are_what_other_wrappers_are():
    given = {"rounds": 25, "lr": 0.1, "d": 3}
    for member, wrapper in (("ed", "exact_diffusion"), ("ed", "led"), ("next", "gradient_tracking")):
        one, other = descend(Choice("flexatc", {"member": member}), "ring", **given), descend(wrapper, "ring", **given)
        np.testing.assert_allclose(one.x, other.x, rtol=0, atol=1e-12)
    step = descend(Choice("proxskip", {"p": 1.0}), "ring", **given)
    assert (step.x == descend("led", "ring", **given).x).all()


def test_two_exchanges_are_two_messages():
    for member, messages in (("ed", 16), ("aug_dgm", 32)):
        assert descend(Choice("flexatc", {"member": member}), "ring", rounds=1, lr=0.1).measures[0]["edges"] == messages
    assert {name: member.exchanges for name, member in members(1.0).items()} == {
        "ed": 1, "aug_dgm": 2, "next": 2, "extra": 1, "diging": 2, "dgd": 1}


def test_rounds_in_which_a_schedule_exchanges_nothing_take_nothing_off(monkeypatch):
    """Seven rounds in eight are silent: the correction of one exchange is taken off once, or disagreement would grow."""
    def one_in_eight(groups):
        """Exchange in every eighth round."""
        both, alone = SCHEDULES["both"](groups), SCHEDULES["alone"](groups)
        return Schedule(lambda t, peer: (alone if t % 8 < 7 else both).plan(t, peer))
    monkeypatch.setitem(SCHEDULES, "one_in_eight", one_in_eight)
    given = {"topology": "ring", "rounds": 240, "lr": 0.01, "d": 3, "schedule": "one_in_eight"}
    assert descend("led", **given).rms < descend("none", **given).rms
    assert descend("gradient_tracking", **given).rms < 0.5 * descend("none", **given).rms


class TestSkipping:
    def test_is_its_recursion_with_one_coin_for_all(self):
        """z <- x - lr g - y; with probability p x <- W_a z, y <- y + p (z - x); else x <- z."""
        p, x, y, toss, exchanges = 0.4, np.zeros((NUM, 3)), np.zeros((NUM, 3)), coin(3, 0.4), 0
        for t in range(60):
            z = x - 0.1 * gradient(x) - y
            x = (z + RING @ z) / 2 if toss(t) else z
            y, exchanges = y + (p * (z - x) if toss(t) else 0), exchanges + toss(t)
        found = descend(Choice("proxskip", {"p": p, "seed": 3}), "ring", rounds=60, lr=0.1, d=3)
        np.testing.assert_allclose(found.x, x, rtol=0, atol=1e-12)
        assert sum(sent.messages for sent in found.ledger.values()) == 16 * exchanges and 10 < exchanges < 40

    def test_tosses_are_binomial_and_a_function_of_seed_and_round(self):
        tosses = [coin(0, 0.3)(t) for t in range(4000)]
        assert abs(sum(tosses) - 1200) < 4 * (4000 * 0.3 * 0.7) ** 0.5
        assert tosses[::-1] == [coin(0, 0.3)(t) for t in reversed(range(4000))]
        assert tosses != [coin(1, 0.3)(t) for t in range(4000)] and all(coin(0, 1.0)(t) for t in range(100))

    @pytest.mark.long
    @pytest.mark.parametrize("p, chi, graph, local_steps", [(0.5, 1.0, "ring", 1), (0.2, 0.5, "complete", 1), (0.5, 1.0, "ring", 3)])
    def test_reaches_the_optimum_all_the_same(self, p, chi, graph, local_steps):
        wrapper = Choice("proxskip", {"p": p, "chi": chi})
        assert descend(wrapper, graph, rounds=600, lr=0.3 / local_steps, d=3, local_steps=local_steps).rms < 1e-4

    def test_on_a_complete_graph_all_are_equal_behind_an_exchange(self):
        found = descend(Choice("proxskip", {"p": 0.3, "chi": 0.5}), Given(np.full((NUM, NUM), 1 / NUM)), rounds=1 + next(
            t for t in range(10, 99) if coin(0, 0.3)(t)), lr=0.1, d=3)
        np.testing.assert_allclose(found.x, np.tile(found.x[:1], (NUM, 1)), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("name, chi, best", [("complete", 0.5, 0.0263), ("hypercube", 1.0, 0.0527), ("ring", 1.0, 0.0843)])
    def test_the_best_probability(self, name, chi, best):
        graph = topologies.build(name, NUM)
        assert best_probability(2885, graph, chi) == pytest.approx(best, abs=6e-5)
        assert best_probability(18.6, topologies.build("ring", NUM)) == 1.0
        method = build("lora", Context(make_layout([("x", 1, 1, 1, 1.0)]), topology=graph), {},
                       {"wrapper": Choice("proxskip", {"p": "auto", "kappa": 2885, "chi": chi})})
        assert method.facts["coin_probability"] == pytest.approx(best, abs=6e-5)

    def test_what_peers_keep_sums_to_zero_in_every_round(self):
        layout = make_layout([("x", 1, 3, 1, 1.0)])
        method = build("lora", Context(layout), {}, {"wrapper": Choice("proxskip", {"p": 0.5, "penalty": "l1", "strength": 0.1})})
        x = torch.zeros(NUM, layout.size, dtype=torch.float64)
        heart = Gossip(method, layout, Rows(Given(RING)), InProcess(), range(NUM), x)
        for t in range(20):
            change = heart.after_step(t, lr=0.1, local_steps=1)
            for i in range(NUM):
                x[i, :3] -= 0.1 * torch.from_numpy(gradient(x[:, :3].numpy()))[i]
                x[i] = change(i, x[i], 0)
            heart.round(t, x, lr=0.1, local_steps=1)
            kept = torch.stack([state["flexatc.dual"] for state in heart.state["rule"].values()])
            assert kept.sum(0).abs().max() < 1e-13 and (t < 3 or kept.abs().max() > 0.1)


def penalised(lr: float, strength: float, shrink) -> np.ndarray:
    """argmin of the mean of all objectives with a penalty, by proximal gradient on one machine."""
    x = np.zeros(3)
    for _ in range(4000):
        x = shrink(x - lr * (CURVATURE[:, None] * (x - centres(3))).mean(0), lr * strength)
    return x


class TestPenalties:
    @pytest.mark.long
    @pytest.mark.parametrize("wrapper, local_steps", [
        (Choice("flexatc", {"member": "ed"}), 1), (Choice("flexatc", {"member": "ed"}), 3),
        (Choice("flexatc", {"member": "aug_dgm"}), 1), (Choice("proxskip", {"p": 0.5}), 1), (Choice("proxskip", {"p": 0.5}), 3)])
    def test_reach_the_optimum_with_an_l1_term_and_its_zeros(self, wrapper, local_steps):
        """Strong enough that one coordinate of three is zero at every peer, and not only nearly."""
        strength = 5.76
        best = penalised(0.1, strength, lambda x, threshold: np.sign(x) * (np.abs(x) - threshold).clip(0))
        assert sorted(best == 0) == [False, False, True]
        wrapper = wrapper._replace(params={**wrapper.params, "penalty": "l1", "strength": strength})
        found = descend(wrapper, "ring", rounds=400, lr=0.1, d=3, local_steps=local_steps)
        np.testing.assert_allclose(found.x, np.tile(best, (NUM, 1)), rtol=0, atol=1e-6)
        assert (found.x[:, best == 0] == 0).all()

    def test_group_shrinks_components_as_a_whole(self):
        """A[k, :] and B[:, k] together by the same part; the weakest vanish."""
        layout = make_layout([("q", 3, 4, 5, 1.0), ("o", 3, 2, 6, 2.0)])
        x = torch.randn(layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        a_view(x, layout.pairs[0])[1] *= 0.01
        b_view(x, layout.pairs[0])[:, 1] *= 0.01
        out = x.clone()
        make_prox(layout, "group", 2.0)(out, Round(0, 0, {0: 1.0}, Plan(frozenset("AB"), frozenset("AB")), lr=0.1), ["A", "B"])
        for pair in layout.pairs:
            for k in range(3):
                before, after = (torch.cat([a_view(row, pair)[k], b_view(row, pair)[:, k]]) for row in (x, out))
                torch.testing.assert_close(after, before * max(0, 1 - 0.2 / float(before.norm())), rtol=0, atol=1e-12)
        assert not a_view(out, layout.pairs[0])[1].any() and not b_view(out, layout.pairs[0])[:, 1].any()
        with pytest.raises(ValueError, match="penalty = 'group' needs one learning rate for A and B, got .0.1, 0.8."):
            make_prox(layout, "group", 2.0)(out, Round(0, 0, {0: 1.0}, rates={"A": 0.1, "B": 0.8}), ["A", "B"])

    def test_nothing_of_a_penalty_is_nothing(self):
        given = {"rounds": 10, "lr": 0.1, "d": 3}
        none = descend(Choice("flexatc", {"penalty": "l1", "strength": 0.0}), "ring", **given)
        assert (none.x == descend("flexatc", "ring", **given).x).all()


@pytest.mark.parametrize("wrapper, params, said", [
    ("flexatc", {"member": "extra", "p": 0.5}, "wrapper.p below 1 needs .* wrapper.member = 'extra'; allowed: ed, aug_dgm"),
    ("flexatc", {"member": "next", "penalty": "l1", "strength": 1.0}, "wrapper.penalty needs a member whose next step begins"),
    ("flexatc", {"member": "gt"}, "wrapper.member = 'gt' is not allowed; allowed: ed, aug_dgm, next, extra, diging, dgd"),
    ("proxskip", {"p": 0}, "wrapper.p = 0 is not allowed"), ("proxskip", {"chi": 0.2}, "wrapper.chi = 0.2 is not allowed"),
    ("proxskip", {"p": "auto"}, "wrapper.p = 'auto' needs wrapper.kappa"), ("led", {"share": 2}, "wrapper.share = 2"),
    ("flexatc", {"penalty": "l0"}, "wrapper.penalty = 'l0' is not allowed; allowed: none, l1, group"),
    ("flexatc", {"strength": -1}, "wrapper.strength = -1 is not allowed"),
])
def test_parameters_that_are_none(wrapper, params, said):
    with pytest.raises(ValueError, match=said):
        descend(Choice(wrapper, params), "ring", rounds=1, lr=0.1)


def test_graphs_under_which_disagreement_grows_are_refused():
    with pytest.raises(ValueError, match="wrapper.name = 'led' diverges on topology.name = 'edge_activation': disagreement grows by"):
        descend("led", topologies.build("edge_activation", NUM, p=0.05), rounds=1, lr=0.1)
    with pytest.raises(ValueError, match="wrapper.name = 'proxskip' diverges on topology.name = 'hypercube'"):  # that is D2
        descend(Choice("proxskip", {"p": 1.0, "chi": 0.5}), "hypercube", rounds=1, lr=0.1)
    with pytest.raises(ValueError, match="trigger.name = 'event' holds|leaves messages out.*exchanges twice in a round"):
        descend(Choice("flexatc", {"member": "aug_dgm"}), "ring", rounds=1, lr=0.1, trigger=Choice("event", {"threshold": 0.1}))
