"""Stragglers by blocks: depths, what is trained and sent, the estimators, and a backward pass that really ends early."""

import math
from itertools import product as combinations

import numpy as np
import pytest
import torch
from one_round import build, gossip
from tiny_runs import local_phase, make_config, make_folder, make_run
from toy import Toy

import topologies
from dfl import simulate
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.methods import Choice
from dfl.schedules.depths import Depths, block_names
from dfl.schedules.stragglers import stretched

NUM, BLOCKS = 5, 4
LAYOUT = make_layout([(f"model.layers.{k}.{name}", 2, 6, 5, 1.0) for k in range(BLOCKS) for name in ("q", "v")], [("head", (3, 4))])
DEPTHS = {"layout": LAYOUT, "speed": "uniform", "deadline": None, "seconds": 1.0, "share": 1.0, "late": "blocks", "seed": 0,
          "peers": NUM}


def depths(**given) -> Depths:
    return Depths(**{**DEPTHS, **given})


def rows(num=NUM, seed=0) -> torch.Tensor:
    x = empty_rows(num, LAYOUT.size, dtype=torch.float64)
    return x.copy_(torch.randn(num, LAYOUT.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def salf(**given):
    return build("salf", LAYOUT, head="mixed", peers=NUM, **given)


def test_blocks_are_what_a_name_has_up_to_its_first_number():
    assert block_names(LAYOUT) == [f"model.layers.{k}" for k in range(BLOCKS)]
    names = [f"t.h.{k}.attn" for k in (10, 9, 2)]
    assert block_names(make_layout([(name, 1, 2, 2, 1.0) for name in names])) == ["t.h.2", "t.h.9", "t.h.10"]
    assert block_names(make_layout([("q", 1, 2, 2, 1.0), ("o", 1, 2, 2, 1.0)])) == ["q", "o"]


@pytest.mark.parametrize("given", [
    {}, {"share": 0.6}, {"late": "drop"}, {"speed": "poisson", "deadline": 2.0},
    {"speed": "poisson", "deadline": 3.0, "seconds": [1, 2, 3, 1, 1]},
    {"speed": "fixed", "deadline": 3.5, "seconds": [1, 2, 3, 5, 0.1]}])
def test_blocks_are_reached_as_often_as_is_said(given):
    found, num = depths(**given), 2000
    for peer in range(NUM):
        often = np.bincount([found.depth(t, peer) for t in range(num)], minlength=BLOCKS + 1)
        reached = [often[BLOCKS + 1 - block:].sum() / num for block in range(1, BLOCKS + 1)]
        q = found.reach(peer)
        assert q == sorted(q)
        np.testing.assert_allclose(reached, q, atol=4 * 0.5 / math.sqrt(num))


def test_nobody_reaches_a_block_as_the_paper_says():
    """p_l = (1 - l / L)^U of uniform depths, p_L = 0, falling in l and in U; U = 4, L = 3, l = 1: (2/3)^4 = 0.1975."""
    three = make_layout([(f"h.{k}", 1, 2, 2, 1.0) for k in range(3)])
    q = depths(layout=three, peers=None).reach(0)
    missed = [math.prod([1 - share] * 4) for share in q]
    np.testing.assert_allclose(missed, [(1 - block / 3) ** 4 for block in (1, 2, 3)], atol=1e-15)
    assert round(missed[0], 4) == 0.1975 and missed[2] == 0


def test_who_sent_a_block_sent_all_behind_it():
    rule, x = salf(), rows()
    for t, peer in combinations(range(6), range(NUM)):
        message, mask = rule.message(x[peer], t, peer), rule.masks(t, peer)
        depth = int(message.meta["depth"])
        trained = [bool(a_view(mask, pair).all() and b_view(mask, pair).all()) for pair in LAYOUT.pairs]
        assert trained == [index >= 2 * (BLOCKS - depth) for index in range(2 * BLOCKS)]
        assert bool(mask[LAYOUT.groups["head"]].all()) == (depth > 0)
        assert sum(part.numel() for part in message.parts.values()) == int(mask.sum())


@pytest.mark.parametrize("links", ["sent", "mutual"])
def test_everybody_at_full_depth_is_the_plain_average(links):
    w = topologies.build("ring", NUM).matrix(0)
    for estimator in ("step", "none"):
        rule, plain = (build(name, LAYOUT, head="mixed", peers=NUM, **given) for name, given in
                       (("salf", {"share": 0.0, "links": links, "estimator": estimator}), ("lora", {})))
        x, y = rows().float(), rows().float()
        for t in range(3):
            gossip(rule, x, [rule.init(row) for row in x], w, t)
            gossip(plain, y, [{}] * NUM, w, t)
        assert torch.equal(x, y) and rule.plan(0).stretch is None


def test_blocks_that_nobody_sent_keep_their_bits_and_others_mix_one_by_one():
    rule, x, w = salf(speed="fixed", deadline=2.0, seconds=[1, 2, 1, 2, 4]), rows(), topologies.build("complete", NUM).matrix(0)
    before = x.clone()
    gossip(rule, x, [{} for _ in x], w)  # depths 2, 1, 2, 1, 0
    lower = torch.cat([depths().block_of <= 2])
    assert torch.equal(x[:, lower], before[:, lower])
    third, fourth = depths().block_of == 3, depths().block_of == 4
    expected = before[:, third] + sum(w[0, j] * (before[j, third] - before[:, third]) for j in (0, 2))
    torch.testing.assert_close(x[:, third], expected, rtol=0, atol=1e-14)
    last = before[:, fourth] + sum(w[0, j] * (before[j, fourth] - before[:, fourth]) for j in range(4))
    torch.testing.assert_close(x[:, fourth], last, rtol=0, atol=1e-14)


@pytest.mark.parametrize("codec", ["none", "bfloat16", "int8"])
def test_links_that_both_ends_use_keep_the_mean_of_every_block(codec):
    """Also under rounding; with `sent` the mean moves."""
    w, drift = topologies.build("ring", NUM).matrix(0), {}
    for links in ("mutual", "sent"):
        rule, x = salf(links=links, slots={"codec": codec}), rows()
        before, states = x.mean(0).clone(), [rule.init(row) for row in x]
        for t in range(12):
            gossip(rule, x, states, w, t)
        drift[links] = float((x.mean(0) - before).abs().max())
    assert drift["mutual"] < 1e-14 and drift["sent"] > 1e-3


def server_draws(estimator: str, num: int, **given) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """On the complete graph: the mean row after one round each of `num` draws (num, D), the full average, the start."""
    w, start, steps = np.full((4, 4), 0.25), rows(1)[0], 0.3 * rows(4, seed=1)
    rule = build("salf", LAYOUT, peers=4, estimator=estimator, **given)
    found = torch.zeros(num, LAYOUT.size, dtype=torch.float64)
    for t in range(num):
        x = start + steps * torch.stack([rule.masks(t, peer) for peer in range(4)])
        for peer, plan in enumerate([rule.plan(t, peer) for peer in range(4)]):
            if plan.stretch is not None:
                x[peer] += (plan.stretch - 1) * (x[peer] - start)
        gossip(rule, x, [{"start": start.clone()} if estimator in ("paper", "code") else {} for _ in x], w, t)
        found[t] = x.mean(0)
    return found, start + steps.mean(0), start


def test_the_server_s_estimator_is_right_on_average_and_without_it_it_is_not():
    factors = slice(0, LAYOUT.groups["head"].start)
    found, full, start = server_draws("paper", 300)
    error = (found.mean(0) - full)[factors]
    spread = found.std(0)[factors] / math.sqrt(len(found))
    assert float((error / spread.clamp_min(1e-12)).square().mean()) < 1.5  # z-scores of one
    plain, full, start = server_draws("none", 300, links="mutual")
    first = depths().block_of[factors] == 1
    share = ((plain.mean(0) - start)[factors][first] @ (full - start)[factors][first]) / (full - start)[factors][first].square().sum()
    assert 0.2 < float(share) < 0.3  # of its step: a quarter of the peers reach the first of four blocks


def test_the_corrected_local_step_is_the_full_one_on_average():
    found, full, _ = server_draws("step", 300, links="mutual")
    error = (found.mean(0) - full)[:LAYOUT.groups["head"].start]
    spread = found.std(0)[:LAYOUT.groups["head"].start] / math.sqrt(len(found))
    assert float((error / spread.clamp_min(1e-12)).square().mean()) < 1.5


def test_the_authors_program_shrinks_the_step_of_early_blocks():
    """By 1 - f + f l / L for a share f of stragglers with uniform depths."""
    num = 600
    found, full, start = server_draws("code", num, share=0.5)
    for block in range(1, BLOCKS + 1):
        at = (depths().block_of == block).nonzero().flatten()
        at = at[at < LAYOUT.groups["head"].start]
        # over all peers: which of them are slow is drawn once
        whole = depths(share=0.5, peers=4)
        often = np.mean([[whole.depth(t, peer) > BLOCKS - block for peer in range(4)] for t in range(num)])
        assert abs(often - (1 - 0.5 + 0.5 * block / BLOCKS)) < 0.05
        slow = [peer in whole.slow for peer in range(4)]
        step = 0.3 * rows(4, seed=1)[:, at]
        expected = sum(step[peer] * (block / BLOCKS if slow[peer] else 1.0) for peer in range(4)) / 4
        torch.testing.assert_close(found.mean(0)[at] - start[at], expected, rtol=0, atol=0.05)


def test_the_largest_factor_bounds_what_a_rare_block_does():
    assert stretched(depths(), 0, 5.0).unique().tolist() == pytest.approx([1, 4 / 3, 2, 4])
    assert stretched(depths(), 0, 2.5).max() == 2.5
    never = stretched(depths(speed="fixed", deadline=1.0), 0, 5.0)
    assert never is None  # what is never reached has no step to correct


def test_a_file_of_depths_repeats(tmp_path):
    trace = tmp_path / "depths.csv"
    trace.write_text("0,1,2,3,4\n4,4,4,4,4\n")
    found = depths(speed=str(trace))
    assert [found.depth(t, 1) for t in range(4)] == [1, 4, 1, 4]
    assert found.reach(0) == [0.5] * 4 and found.reach(3) == [0.5, 1, 1, 1]


@pytest.mark.parametrize("given, words", [
    ({"speed": "fast"}, "schedule.speed = 'fast' is not allowed"), ({"speed": "poisson"}, "schedule.deadline is missing"),
    ({"share": 1.5}, "schedule.share = 1.5"), ({"late": "never"}, "schedule.late = 'never'"),
    ({"deadline": 0}, "schedule.deadline = 0"),
    ({"seconds": [1, 2]}, "schedule.seconds has 2 numbers for 5 peers")])
def test_wrong_depths_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        depths(**given)


def test_a_file_of_wrong_depths_is_named(tmp_path):
    for text, words in (("1,2\n", "has the shape"), ("1,2,3,4,9\n", "has the depth 9"), ("a,b\n", "is not allowed")):
        trace = tmp_path / "depths.csv"
        trace.write_text(text)
        with pytest.raises(ValueError, match=words):
            depths(speed=str(trace))


@pytest.mark.parametrize("executor", ["sequential", "stacked"])
def test_what_is_not_reached_is_not_computed(tmp_path, executor):
    """Nothing below the block reached gets a gradient, and the outputs of layers there belong to no graph."""
    trace = tmp_path / "depths.csv"
    trace.write_text("1,1,1,1\n2,2,2,2\n0,0,0,0\n")
    folder = make_folder(tmp_path, layers=3)
    config = make_config(folder / "bert", folder / "data.csv", tmp_path / "run", train__executor=executor,
                         method=f"{{name: salf, speed: {trace}}}")
    run, loaded = make_run(config)
    needed: dict[str, bool] = {}
    for name, module in loaded.adapted.model.named_modules():
        if name.endswith(("layer.0", "layer.1", "layer.2")):
            module.register_forward_hook(lambda module, args, output, name=name[-7:]: needed.__setitem__(
                name, (output[0] if isinstance(output, tuple) else output).requires_grad))
    seen = []
    for t in range(3):
        before, b = run.peers.x.clone(), [pair for pair in run.peers.layout.pairs]
        local_phase(run, t)
        seen.append(dict(needed))
        moved = [bool((b_view(run.peers.x, pair) != b_view(before, pair)).any()) for pair in b]
        depth = (1, 2, 0)[t]
        assert moved == [index >= len(b) * (3 - depth) // 3 for index in range(len(b))]
    assert seen == [{"layer.0": False, "layer.1": False, "layer.2": True}, {"layer.0": False, "layer.1": True, "layer.2": True},
                    {"layer.0": False, "layer.1": False, "layer.2": False}]


def test_who_is_late_is_so_at_the_deadline():
    """On the simulated clock; the others take what the network says."""
    rule = salf(speed="fixed", deadline=2.0, seconds=[1.0, 0.1, 0.1, 0.1, 0.1])
    assert [rule.plan(0, peer).seconds for peer in range(NUM)] == [2.0, None, None, None, None]
    toy = Toy(0)
    done = simulate("salf", topologies.build("complete", 10), toy.factors(), toy.local_step, 3, share=0.0,
                    network=Choice("links", {"compute": 0.01, "latency": 0.0, "bandwidth": 1e12}), local_steps=20)
    assert done.measures[-1]["seconds"] == pytest.approx(0.6, rel=1e-3)
