"""FedASK: sketches are linear, lose nothing between rounds, and decode to the best pair."""

import numpy as np
import pytest
import torch
from one_round import build, gossip
from test_rules import LAYOUT, NUM, activation, complete, mix_once, product, random_rows, ring, simulated

import topologies
from dfl.adapters.layout import a_view, b_view, pack
from dfl.rules.sketches import Sketch


def idle(rule, x, w, rounds, start=0):
    """Rows and states after rounds without training."""
    x, states = x.clone(), [rule.init(row) for row in x]
    for t in range(start, start + rounds):
        gossip(rule, x, states, w, t)
    return x, states


def stacked(states, name="sketch"):
    return torch.stack([state[name] for state in states])


def wide(num=8, size=24, rank=2, seed=0):
    """Peers whose mean has rank num * rank."""
    generator = torch.Generator().manual_seed(seed)
    return pack({"x": (torch.randn(num, rank, size, dtype=torch.float64, generator=generator),
                       torch.randn(num, size, rank, dtype=torch.float64, generator=generator))})


def test_a_sketch_is_linear_in_the_product():
    x, sketch = random_rows(), Sketch(LAYOUT, 3, 4, 0)
    for (pairs, y, z, psi), (_, omega, same) in zip(sketch.read(sketch.of(x[0])), sketch.parts, strict=True):
        for k, pair in enumerate(pairs):
            dense = b_view(x[0], pair) @ a_view(x[0], pair)
            np.testing.assert_allclose(y[k], dense @ omega, atol=1e-12)
            np.testing.assert_allclose(z[k], psi @ dense, atol=1e-12)
        assert psi is same
    again, other = (Sketch(LAYOUT, 3, 4, seed).of(x[0]) for seed in (0, 1))
    assert torch.equal(again, sketch.of(x[0])) and not torch.equal(other, sketch.of(x[0]))


def test_enough_columns_decode_exactly():
    x = random_rows()
    for w in (ring(), complete()):  # three peers of rank 2, six columns; the layer of four inputs has full rank
        params = {"s": 6, "l": 8} if w is not complete() else {"s": 7, "l": 9}
        torch.testing.assert_close(product(mix_once("fedask", x, w, **params)), product(mix_once("decaf", x, w)), rtol=0, atol=1e-8)


@pytest.mark.long
def test_many_rounds_of_truncation_lose_nothing():
    """Ring of 8, rank 2, mean of rank 16: consensus on the sketch of the true mean, where product mixing is far off."""
    layout, x = wide()
    ring_of_8 = topologies.build("ring", 8).matrix(0)
    rule = build("fedask", layout, s=16, l=20, steps=20, memory=True)
    out, states = idle(rule, x, ring_of_8, 200)
    sketches = stacked(states)
    truth = torch.stack([Sketch(layout, 16, 20, 0).of(row) for row in x]).mean(0)
    torch.testing.assert_close(sketches, truth.expand_as(sketches), rtol=0, atol=1e-9)
    pair = layout.pairs[0]
    mean = (b_view(x, pair) @ a_view(x, pair)).mean(0)
    u, s, vh = torch.linalg.svd(mean)
    best = (u[:, :2] * s[:2]) @ vh[:2]
    torch.testing.assert_close(b_view(out, pair)[5] @ a_view(out, pair)[5], best, rtol=0, atol=1e-7)
    lossy, _ = idle(build("decaf", layout), x, ring_of_8, 60)
    assert (b_view(lossy, pair)[5] @ a_view(lossy, pair)[5] - best).norm() > 0.1 * best.norm()


def test_the_mean_of_the_sketches_moves_by_the_mean_progress_only():
    layout, x = wide(rank=3)
    ring_of_8 = topologies.build("ring", 8).matrix(0)
    rule, sketch = build("fedask", layout, s=4, l=6, memory=True), Sketch(layout, 4, 6, 0)
    states, progress = [rule.init(row) for row in x], 0
    start = stacked(states).mean(0)
    for t in range(30):
        before = torch.stack([sketch.of(row) for row in x])
        x += 0.1 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(t))
        progress = progress + (torch.stack([sketch.of(row) for row in x]) - before).mean(0)
        w = ring_of_8 if t % 3 else np.eye(8)  # some rounds alone
        gossip(rule, x, states, w, t)
    torch.testing.assert_close(stacked(states).mean(0), start + progress, rtol=0, atol=1e-9)


def test_steps_of_mixing_before_a_decoding():
    x = random_rows()
    rule = build("fedask", LAYOUT, steps=3, memory=True)
    kept, states = idle(rule, x, ring(), 2)
    assert torch.equal(kept, x) and not torch.equal(states[0]["sketch"], states[0]["held"])
    mixed, _ = idle(rule, x, ring(), 3)
    thrice = np.linalg.matrix_power(ring(), 3)
    params = {"s": 7, "l": 9}
    exact, _ = idle(build("fedask", LAYOUT, steps=3, memory=True, **params), x, ring(), 3)
    torch.testing.assert_close(product(exact), product(mix_once("decaf", x, thrice)), rtol=0, atol=1e-7)
    assert not torch.equal(mixed, x)


def test_without_memory_it_is_decaf_through_a_sketch():
    sketched, exact = (simulated(name, activation(0.3), rounds=8, **params) for name, params in
                       (("fedask", {"s": 32, "l": 32}), ("decaf", {})))
    for one, other in zip(sketched.factors["toy"], exact.factors["toy"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    remembering = simulated("fedask", activation(0.3), rounds=8, s=32, l=32, memory=True)
    assert (remembering.factors["toy"][0] - exact.factors["toy"][0]).abs().max() > 1e-2


def test_unequal_ranks_do_not_collapse():
    layout, x = wide(rank=4)
    ranks = (1, 1, 2, 2, 4, 4, 4, 4)
    pair = layout.pairs[0]
    for peer, rank in enumerate(ranks):
        a_view(x, pair)[peer, rank:], b_view(x, pair)[peer, :, rank:] = 0, 0
    rule = build("fedask", layout, s=24, l=24, ranks=ranks, steps=30, memory=True)
    out, states = idle(rule, x, topologies.build("ring", 8).matrix(0), 150)
    mean = (b_view(x, pair) @ a_view(x, pair)).mean(0)
    u, s, vh = torch.linalg.svd(mean)
    for peer, rank in enumerate(ranks):
        torch.testing.assert_close(b_view(out, pair)[peer] @ a_view(out, pair)[peer], (u[:, :rank] * s[:rank]) @ vh[:rank],
                                   rtol=0, atol=1e-6)
        assert not a_view(out, pair)[peer, rank:].any()
        assert float(states[peer]["truncation_error"]) == pytest.approx(float(s[rank:].norm()), abs=1e-6)


def test_bytes_are_those_of_the_sketch():
    rule = build("fedask", LAYOUT, s=3, l=4, head="mixed")
    assert rule.length(0) == sum(pair.d_out * 3 + 4 * pair.d_in for pair in LAYOUT.pairs) + 12
    assert build("fedask", LAYOUT).length(0) == 2 * (5 * 4 + 5 * 7) + 9 * 4 + 8 * 4  # s = 2 R, l = 2 s, as far as the layer goes


def test_it_learns_and_a_frame_of_its_own_changes_no_product():
    for gauge in ("none", "own"):
        a, b = simulated("fedask", activation(), rounds=10, gauge=gauge).factors["toy"]
        assert a.isfinite().all() and ((b @ a).norm(dim=(1, 2)) > 0.5).all()
    x = random_rows()
    torch.testing.assert_close(product(mix_once("fedask", x, ring(), gauge="own")), product(mix_once("fedask", x, ring())),
                               rtol=0, atol=1e-10)
    assert NUM == len(x) and not build("fedask", LAYOUT, gauge="own").changes_basis


@pytest.mark.parametrize("params, message", [
    ({"s": 0}, "method.s = 0 is not allowed; allowed: a whole number from 1"), ({"l": 1.5}, "method.l = 1.5"),
    ({"steps": None}, "method.steps"), ({"memory": 1}, "method.memory = 1"),
    ({"steps": 2}, "method.memory = False is not allowed; allowed: true, or false where method.steps = 1"),
    ({"gauge": "x"}, "method.gauge"), ({"split": "x"}, "method.split")])
def test_bad_values_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build("fedask", LAYOUT, **params)
