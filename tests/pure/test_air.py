"""Over-the-air gossip: the chain's closed forms, and that differences lose the noise floor which models keep."""

import math

import numpy as np
import pytest
import torch
from test_channels import PEERS, SIZE, W, heads

import topologies
from dfl import methods
from dfl.channels import air
from dfl.transport import ledger

EVEN = ("model", "difference")


def gains_and_payloads(numbers: int, num: int = 4):
    draws = np.random.Generator(np.random.Philox(3))
    gains = {j: air.complex_normal(draws) for j in range(num)}
    payloads = {j: torch.from_numpy(draws.standard_normal(numbers) * (j + 1) + j) for j in range(num)}
    return gains, payloads, dict.fromkeys(range(num), 0.2), draws


def test_without_noise_the_weighted_sum_is_exact():
    gains, payloads, weights, draws = gains_and_payloads(50)
    found = air.received(payloads, weights, gains, 0.0, 0.0, draws, payloads[0])
    torch.testing.assert_close(found, sum(0.2 * v for v in payloads.values()), rtol=0, atol=1e-12)


def test_the_worst_sender_uses_all_its_power_and_none_more():
    gains, payloads, weights, _ = gains_and_payloads(50)
    deviations = {j: float(v.std(correction=0)) for j, v in payloads.items()}
    b, eta = air.precoders(deviations, weights, gains, power=2.5)
    assert max(abs(one) ** 2 for one in b.values()) == pytest.approx(2.5, rel=1e-12)
    for j in b:  # all arrive on one scale
        assert (gains[j] * b[j]).real == pytest.approx(0.2 * deviations[j] * eta ** 0.5, rel=1e-12)


def test_the_variance_is_the_closed_form():
    gains, payloads, weights, draws = gains_and_payloads(200_000)
    _, eta = air.precoders({j: float(v.std(correction=0)) for j, v in payloads.items()}, weights, gains)
    error = air.received(payloads, weights, gains, 0.3, 0.0, draws, payloads[0]) - sum(0.2 * v for v in payloads.values())
    assert float(error.var()) == pytest.approx(0.3 / (2 * eta), rel=0.02)
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(200_000)


def test_misalignment_is_a_bias_that_knows_the_data():
    gains, payloads, weights, draws = gains_and_payloads(1000)
    error = air.received(payloads, weights, gains, 0.0, 0.3, draws, payloads[0]) - sum(0.2 * v for v in payloads.values())
    centred = torch.stack([v - v.mean() for v in payloads.values()])
    left = error - centred.T @ torch.linalg.lstsq(centred.T, error[:, None]).solution[:, 0]
    assert float(error.norm()) > 1 and float(left.norm()) < 1e-9


@pytest.mark.parametrize("payload", EVEN)
def test_a_round_without_noise_or_fading_is_w(payload):
    heart, x = heads(("over_the_air", {"payload": payload, "snr": 300.0, "fading": "none"}))
    expected = x.clone()
    for t in range(4):
        expected = torch.from_numpy(W) @ expected
        heart.round(t, x)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("payload", EVEN)
def test_truncated_peers_leave_their_weight_or_what_they_said(payload):
    """As many are silent as exp(-least_gain) leaves; without noise the rest is exact."""
    heart, x = heads(("over_the_air", {"payload": payload, "snr": 300.0, "least_gain": 0.5}))
    before, changed = x.clone(), 0
    heart.round(0, x)
    full = torch.from_numpy(W) @ before
    if payload == "difference":  # the first round is digital
        torch.testing.assert_close(x, full, rtol=0, atol=1e-10)
        return
    draws = np.random.Generator(np.random.Philox(0))
    share = np.mean([abs(air.complex_normal(draws)) ** 2 >= 0.5 for _ in range(20000)])
    assert share == pytest.approx(math.exp(-0.5), abs=0.01)
    for i in range(PEERS):  # each neighbour is in, or the receiver's own numbers are in its place
        subsets = [full[i] + sum(W[i, j] * (before[i] - before[j]) for j in out)
                   for out in ([], [(i - 1) % 10], [(i + 1) % 10], [(i - 1) % 10, (i + 1) % 10])]
        distances = [float((x[i] - one).norm()) for one in subsets]
        assert min(distances) < 1e-9
        changed += int(np.argmin(distances)) > 0
    assert 0 < changed < PEERS


@pytest.mark.long
def test_models_keep_a_noise_floor_and_differences_do_not():
    """As peers agree, differences vanish and with them their noise: the model's floor stays where it is at 10 dB."""
    left = {}
    for payload in EVEN:
        heart, x = heads(("over_the_air", {"payload": payload, "snr": 10.0, "fading": "none"}))
        apart = []
        for t in range(120):
            heart.round(t, x)
            apart.append(float((x - x.mean(0)).square().mean()))
        left[payload] = apart
    assert left["difference"][-1] < 1e-12
    assert left["model"][-1] > 1e-4 and np.mean(left["model"][-40:]) > 0.1 * np.mean(left["model"][40:80])


@pytest.mark.long
def test_a_step_that_decays_keeps_the_mean_from_walking():
    walked = []
    for decay in (0.0, 0.6):
        heart, x = heads(("over_the_air", {"payload": "model", "snr": 10.0, "fading": "none", "decay": decay}))
        mean = x.mean(0)
        for t in range(200):
            heart.round(t, x)
        walked.append(float((x.mean(0) - mean).square().mean()))
    assert walked[1] < walked[0] / 5


def test_uses_of_the_channel_do_not_depend_on_how_many_send():
    found = {}
    for name in ("ring", "complete"):
        heart, x = heads(("over_the_air", {"payload": "model"}), topology=topologies.build(name, PEERS))
        found[name] = ledger.total(heart.round(0, x).ledger)
    assert found["ring"].channel_uses == found["complete"].channel_uses == PEERS * SIZE
    assert found["complete"].messages == 9 * PEERS and found["ring"].messages == 2 * PEERS


def test_references_are_told_now_and_then():
    heart, x = heads(("over_the_air", {"refresh": 3, "snr": 0.0}))
    for t in range(7):
        expected = torch.from_numpy(W) @ x
        report = heart.round(t, x)
        assert (float((x - expected).norm()) < 1e-12) == (t % 3 == 0)  # digital rounds have no noise
        assert ledger.total(report.ledger).channel_uses == PEERS * SIZE


def test_slots_are_colours_of_peers_more_than_two_links_apart():
    assert air.num_slots(topologies.build("complete", 5).matrix(0)) == 5  # one listens, all others send
    assert air.num_slots(topologies.build("ring", 9).matrix(0)) == 3
    assert air.num_slots(np.eye(3)) == 0


@pytest.mark.parametrize("given, words", [
    ({"payload": "picture"}, "difference, model, gradient"), ({"snr": "high"}, "a number from -100 to 300"),
    ({"gamma": 2}, "from 0 to 1"),
    ({"fading": "rice"}, "rayleigh, none"), ({"least_gain": -1}, "from 0")])
def test_what_cannot_be_is_refused(given, words):
    with pytest.raises(ValueError, match=rf"channel\..*{words}"):
        heads(("over_the_air", given))


@pytest.mark.parametrize("slots, words", [({"trigger": ("event",)}, "which a trigger cannot have"),
                                          ({"codec": ("int8",)}, "which a codec cannot have")])
def test_what_needs_single_messages_is_refused(slots, words):
    with pytest.raises(ValueError, match=words):
        heads(("over_the_air",), **slots)


def test_differences_need_the_same_graph_in_every_round():

    topology = topologies.build("edge_activation", PEERS, base="complete", p=0.3)
    heart, _ = heads(("over_the_air",))
    with pytest.raises(ValueError, match="channel.payload = 'difference' needs a topology that is the same"):
        methods.check_topology(heart.method, topology)
    heart, _ = heads(("over_the_air", {"payload": "model"}))
    methods.check_topology(heart.method, topology)
