"""LoRA-A2: which slots travel, what becomes of them, and its limit."""

import numpy as np
import pytest
import torch
from one_round import build, gossip
from test_rules import LAYOUT, NUM, activation, assert_same, complete, product, random_rows, ring, simulated

from dfl.adapters.layout import a_view, b_view

PLACES = [(pair, slot) for pair in LAYOUT.pairs for slot in range(pair.rank)]


def one_round(t, keep):
    """Rows before and after a round in which training moved everything, and the bytes sent."""
    rule, start = build("lora_a2", LAYOUT, keep=keep), random_rows()
    states = [rule.init(row) for row in start]
    trained = start + 0.3 * random_rows(7)
    frozen = LAYOUT.groups["A" if t % 2 == 0 else "B"]
    trained[:, frozen] = start[:, frozen]
    mixed = trained.clone()
    traffic = gossip(rule, mixed, states, ring(), t)
    return start, trained, mixed, traffic, torch.stack([state["start"] for state in states])


@pytest.mark.parametrize("t", [0, 1])
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_the_best_slots_travel_and_the_others_stay_in_the_difference(t, keep):
    start, trained, mixed, traffic, common = one_round(t, keep)
    w, sent = ring(), np.zeros((NUM, len(PLACES)), dtype=bool)
    for i in range(NUM):
        # the change of the product that a slot makes, densely
        changes = [float((b_view(trained, p)[i, :, l, None] * a_view(trained, p)[i, l]
                          - b_view(start, p)[i, :, l, None] * a_view(start, p)[i, l]).norm()) for p, l in PLACES]  # noqa: E741
        sent[i, np.argsort(changes)[::-1][:int(np.ceil(keep * len(PLACES)))]] = True
    view = b_view if t == 0 else (lambda x, p: a_view(x, p).mT)
    for k, (pair, slot) in enumerate(PLACES):
        values, got = view(trained, pair)[..., slot].numpy(), view(mixed, pair)[..., slot].numpy()
        began, shared = view(start, pair)[..., slot].numpy(), view(common, pair)[..., slot].numpy()
        for i in range(NUM):
            expected = began[i] + sum(w[i, j] * (values[j] - began[i]) for j in range(NUM) if sent[j, k])
            np.testing.assert_allclose(shared[i], expected, atol=1e-12)
            np.testing.assert_allclose(got[i], expected + (0 if sent[i, k] else values[i] - began[i]), atol=1e-12)
            if not sent[w[i] > 0, k].any():
                assert (got[i] == values[i]).all()
    sizes = np.array([pair.d_out if t == 0 else pair.d_in for pair, _ in PLACES])
    assert traffic.message_bytes == 2 * 8 * (sent.sum() + (sent * sizes).sum())  # the numbers of the slots, and what is in them
    frozen = LAYOUT.groups["A" if t == 0 else "B"]
    assert torch.equal(mixed[:, frozen], trained[:, frozen])


def dense_server(start, noise, keep, rounds):
    """The server with error memory in plain numpy: one common pair, clients that keep what they did not send."""
    common = {p.name: [a_view(start[0], p).numpy().copy(), b_view(start[0], p).numpy().copy()] for p in LAYOUT.pairs}
    kept = {p.name: [np.zeros((NUM, *common[p.name][0].shape)), np.zeros((NUM, *common[p.name][1].shape))] for p in LAYOUT.pairs}
    count = int(np.ceil(keep * len(PLACES)))
    for t in range(rounds):
        active, view = (1, b_view) if t % 2 == 0 else (0, a_view)
        total = {p.name: np.zeros_like(common[p.name][active]) for p in LAYOUT.pairs}
        chosen = []
        for i in range(NUM):
            for p in LAYOUT.pairs:
                kept[p.name][active][i] += view(noise(t), p)[i].numpy()
            change = {p.name: kept[p.name][active][i] for p in LAYOUT.pairs}
            other = {p.name: common[p.name][1 - active] + kept[p.name][1 - active][i] for p in LAYOUT.pairs}
            score = [np.linalg.norm(change[p.name][:, l]) * np.linalg.norm(other[p.name][l]) if active else
                     np.linalg.norm(change[p.name][l]) * np.linalg.norm(other[p.name][:, l]) for p, l in PLACES]  # noqa: E741
            chosen.append([PLACES[k] for k in np.argsort(score)[::-1][:count]])
            for p, slot in chosen[-1]:
                place = (slice(None), slot) if active else (slot,)
                total[p.name][place] += change[p.name][place] / NUM
        for p in LAYOUT.pairs:
            common[p.name][active] += total[p.name]
        for i, slots in enumerate(chosen):
            for p, slot in slots:
                kept[p.name][active][i][(slice(None), slot) if active else (slot,)] = 0
    return {name: [c + k for c, k in zip(common[name], kept[name], strict=True)] for name in common}


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_a_complete_graph_is_the_server_with_error_memory(keep):
    rule, x = build("lora_a2", LAYOUT, keep=keep), random_rows(num=1).expand(NUM, -1).clone()
    states, start = [rule.init(row) for row in x], x.clone()

    def noise(t):
        moved = 0.3 * random_rows(50 + t)
        for group in ({"A", "B", "head"} - rule.trains(t)):
            moved[:, LAYOUT.groups[group]] = 0
        return moved
    for t in range(7):
        x += noise(t)
        gossip(rule, x, states, complete(), t)
    for name, (a, b) in dense_server(start, noise, keep, 7).items():
        pair = next(p for p in LAYOUT.pairs if p.name == name)
        np.testing.assert_allclose(a_view(x, pair).numpy(), a, atol=1e-12)
        np.testing.assert_allclose(b_view(x, pair).numpy(), b, atol=1e-12)


def test_idle_peers_of_a_complete_graph_agree():
    """What was not sent is sent later: after two rounds of each factor half of the slots at a time have been through."""
    rule, x = build("lora_a2", LAYOUT, keep=0.5), random_rows(num=1).expand(NUM, -1).clone()
    states = [rule.init(row) for row in x]
    x += 0.3 * random_rows(7)
    spread = [float((product(x) - product(x).mean(0)).norm())]
    for t in range(4):
        gossip(rule, x, states, complete(), t)
        spread.append(float((product(x) - product(x).mean(0)).norm()))
    assert spread[0] > 1 and spread[-1] < 1e-12 and spread == sorted(spread, reverse=True)


def test_who_heard_nobody_sends_it_later():
    rule, x = build("lora_a2", LAYOUT, keep=1.0), random_rows(num=1).expand(NUM, -1).clone()
    states = [rule.init(row) for row in x]
    start, moved = x.clone(), 0.3 * random_rows(7)
    moved[:, LAYOUT.groups["A"]] = 0
    x += moved
    gossip(rule, x, states, np.eye(NUM), 0)
    assert torch.equal(x, start + moved) and all(torch.equal(state["start"], start[0]) for state in states)
    gossip(rule, x, states, complete(), 0)
    cut = LAYOUT.groups["B"]
    torch.testing.assert_close(x[:, cut], (start + moved).mean(0)[cut].expand(NUM, -1), rtol=0, atol=1e-14)


def test_all_slots_are_rolora():
    assert_same(simulated("lora_a2", activation(), keep=1.0), simulated("rolora", activation()), atol=0)
    assert_same(simulated("lora_a2", activation(), keep=1.0, T=3), simulated("rolora", activation(), T=3), atol=0)


def test_it_learns_with_half_of_the_slots():
    a, b = simulated("lora_a2", activation(0.3), rounds=10, keep=0.5).factors["toy"]
    assert a.isfinite().all() and ((b @ a).norm(dim=(1, 2)) > 0.5).all()


@pytest.mark.parametrize("params, message", [({"keep": 0}, "method.keep = 0 is not allowed"), ({"keep": 1.2}, "method.keep = 1.2"),
                                             ({"T": 0}, "method.T = 0")])
def test_bad_values_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build("lora_a2", LAYOUT, **params)
