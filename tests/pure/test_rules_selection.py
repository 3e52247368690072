"""LoRA-A2: which slots travel, what becomes of them, and its limit."""

import numpy as np
import pytest
import torch
from test_rules import CODEC, LAYOUT, NUM, activation, assert_same, random_rows, ring, simulated

from dfl import rules
from dfl.factors import a_view, b_view
from dfl.gossip import gossip
from dfl.transport import InProcess

PLACES = [(pair, slot) for pair in LAYOUT.pairs for slot in range(pair.rank)]


def one_round(t, keep):
    """Rows before and after a round in which training moved everything, and the bytes sent."""
    rule, start = rules.build("lora_a2", LAYOUT, keep=keep), random_rows()
    states = [rule.init(row) for row in start]
    trained = start + 0.3 * random_rows(7)
    frozen = LAYOUT.groups["A" if t % 2 == 0 else "B"]
    trained[:, frozen] = start[:, frozen]
    mixed = trained.clone()
    traffic = gossip(rule, CODEC, InProcess(), mixed, range(NUM), states, ring(), t)
    assert all(torch.equal(state["start"], row) for state, row in zip(states, mixed, strict=True))
    return start, trained, mixed, traffic


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_the_best_slots_travel_and_the_others_stay(t, keep):
    start, trained, mixed, traffic = one_round(t, keep)
    w, sent = ring(), np.zeros((NUM, len(PLACES)), dtype=bool)
    for i in range(NUM):
        # the change of the product that a slot makes, densely
        changes = [float((b_view(trained, p)[i, :, l, None] * a_view(trained, p)[i, l]
                          - b_view(start, p)[i, :, l, None] * a_view(start, p)[i, l]).norm()) for p, l in PLACES]  # noqa: E741
        sent[i, np.argsort(changes)[::-1][:int(np.ceil(keep * len(PLACES)))]] = True
    view = b_view if t == 0 else (lambda x, p: a_view(x, p).mT)
    for k, (pair, slot) in enumerate(PLACES):
        values, got = view(trained, pair)[..., slot].numpy(), view(mixed, pair)[..., slot].numpy()
        for i in range(NUM):
            expected = values[i] + sum(w[i, j] * (values[j] - values[i]) for j in range(NUM) if sent[j, k])
            np.testing.assert_allclose(got[i], expected, atol=1e-12)
            if not sent[w[i] > 0, k].any():
                assert (got[i] == values[i]).all()
    sizes = np.array([pair.d_out if t == 0 else pair.d_in for pair, _ in PLACES])
    assert traffic.message_bytes == 2 * 8 * (NUM * len(PLACES) + (sent * sizes).sum())
    frozen = LAYOUT.groups["A" if t == 0 else "B"]
    assert torch.equal(mixed[:, frozen], trained[:, frozen])


def test_all_slots_are_rolora():
    assert_same(simulated("lora_a2", activation(), keep=1.0), simulated("rolora", activation()), atol=0)
    assert_same(simulated("lora_a2", activation(), keep=1.0, T=3), simulated("rolora", activation(), T=3), atol=0)


def test_it_learns_with_half_of_the_slots():
    a, b = simulated("lora_a2", activation(0.3), rounds=10, keep=0.5).factors["toy"]
    assert a.isfinite().all() and ((b @ a).norm(dim=(1, 2)) > 0.5).all()


@pytest.mark.parametrize("params, message", [({"keep": 0}, "rule.keep = 0 is not allowed"), ({"keep": 1.2}, "rule.keep = 1.2"),
                                             ({"T": 0}, "rule.T = 0")])
def test_bad_values_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        rules.build("lora_a2", LAYOUT, **params)
