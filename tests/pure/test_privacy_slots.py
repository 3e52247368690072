"""Noise and masks between peers: sums unchanged, single messages hidden, what leaks by distance, refusals."""

import numpy as np
import pytest
import torch
from cases import Case, start_rows
from test_grid import TOLD, train

import topologies
from dfl.channels.privacy import masked, zip_noise
from dfl.methods import Choice
from dfl.seeds import derive
from dfl.slots import Link, Message
from dfl.wrappers.muffliato import acceleration, losses, num_steps, polynomials, second_eigenvalue
from topologies import acceleration as reference

RING = topologies.build("ring", 6)


def test_noise_cancels_over_the_receivers_of_a_peer():
    graph = topologies.build("erdos_renyi", 6, p=0.7, seed=2)
    channel = zip_noise(sigma=2.0, topology=graph)
    x = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sender in range(6):
        total, noises = torch.zeros(40, dtype=torch.float64), []
        for receiver in graph.receivers(0, sender):
            found, _ = channel.deliver(Message({"A": x[sender]}), {}, Link(sender, receiver, 0, 99))
            noises.append(found.parts["A"] - x[sender])
            total += graph.neighbors(0, receiver)[sender] * noises[-1]
        assert float(total.abs().max()) < 1e-14
        assert all(0.5 < float(noise.std()) < 3 for noise in noises)
    again, _ = channel.deliver(Message({"A": x[0]}), {}, Link(0, graph.receivers(0, 0)[0], 0, 5))
    later, _ = channel.deliver(Message({"A": x[0]}), {}, Link(0, graph.receivers(0, 0)[0], 1, 5))
    assert not torch.equal(again.parts["A"], later.parts["A"])


def test_one_receiver_alone_has_no_noise_and_is_refused():
    channel = zip_noise(sigma=1.0, topology=topologies.build("path", 4))
    with pytest.raises(ValueError, match="peer 0 has 1 in round 0"):
        channel.deliver(Message({"A": torch.zeros(3)}), {}, Link(0, 1, 0, 1))
    with pytest.raises(ValueError, match="peer 3 receives from one"):
        masked().air({2: Message({"A": torch.zeros(3)})}, Message({"A": torch.zeros(3)}), {2: 0.5, 3: 0.5}, {}, Link(3, 3, 0, 1))


@pytest.mark.parametrize("bits", [8, 24, 40])
def test_masks_leave_the_weighted_sum_and_none_of_its_terms(bits):
    inbox = {j: Message({"A": torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(j))}) for j in (1, 2, 5)}
    weights, own = {0: 0.4, 1: 0.3, 2: 0.2, 5: 0.1}, Message({"A": torch.zeros(50, dtype=torch.float64)})
    found, _ = masked(bits=bits).air(inbox, own, weights, {}, Link(0, 0, 3, 1))
    expected = sum(weights[j] * message.parts["A"] for j, message in inbox.items())
    summed = sum(weights[j] * message.parts["A"] for j, message in found.items())
    assert float((summed - expected).abs().max()) <= 3 * 2.0 ** -bits / 2 * 1.001
    assert torch.equal(found[1].parts["A"], found[2].parts["A"])
    # who drops out takes its masks along
    two = {j: inbox[j] for j in (1, 5)}
    found, _ = masked(bits=bits).air(two, own, {0: 0.6, 1: 0.3, 5: 0.1}, {}, Link(0, 0, 3, 1))
    expected = sum(weights[j] * message.parts["A"] for j, message in two.items())
    assert float((sum(weights[j] * found[j].parts["A"] for j in two) - expected).abs().max()) <= 2 * 2.0 ** -bits / 2 * 1.001


@pytest.mark.parametrize("loss", [0.5, 1.0])
def test_masks_of_who_drops_out_behind_them_are_taken_off(loss):
    """They cancel with nothing that arrives: those left name the seeds, or the sum would be noise of the size of 2^63."""
    ids, seen = (1, 2, 5, 7), set()
    inbox = {j: Message({"A": torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(j))}) for j in ids}
    own = Message({"A": torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))})
    weights = {0: 0.2, 1: 0.3, 2: 0.2, 5: 0.1, 7: 0.2}
    for t in range(30):
        found, _ = masked(loss=loss, bits=30).air(inbox, own, weights, {}, Link(0, 0, t, 1))
        left = [j for j in ids if not derive(0, "drop", 0, j, t) / 2 ** 63 < loss]
        left = left if len(left) > 1 else []  # one alone would be read
        expected = sum(weights[j] * (inbox[j] if j in left else own).parts["A"] for j in ids)
        torch.testing.assert_close(sum(weights[j] * found[j].parts["A"] for j in ids), expected, rtol=0, atol=1e-8)
        seen.add(len(left))
    assert seen == ({0, 2, 3, 4} if loss < 1 else {0})


def test_numbers_without_room_for_them_are_named():
    inbox = {j: Message({"A": torch.full((3,), 1e9)}) for j in (1, 2)}
    with pytest.raises(ValueError, match="channel.bits = 40 leaves no room"):
        masked(bits=40).air(inbox, Message({"A": torch.zeros(3)}), {0: 0.4, 1: 0.3, 2: 0.3}, {}, Link(0, 0, 0, 1))


def test_masked_gossip_is_plain_gossip_to_rounding():
    ends = []
    for slots in ({}, {"channel": Choice("masked", {"bits": 30})}):
        case = Case("lora", slots=slots)
        x = start_rows(case).double()
        heart = case.gossip(x)
        for t in range(5):
            train(x, case, t, heart)
            heart.round(t, x, **TOLD)
        ends.append(x)
    assert not torch.equal(*ends)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-7)


def muffled(sigma: float, steps: int | None, **given):
    case = Case("lora", slots={"wrapper": Choice("muffliato", {"sigma": sigma, "steps": steps, **given})})
    x = start_rows(case, apart=True).double()
    return case, x, case.gossip(x)


def test_accelerated_gossip_is_the_reference_s():
    case, x, heart = muffled(0.0, 5)
    w = case.topology.matrix(0)
    expected = reference.muffliato(lambda y: w @ y, x.numpy().copy(), 5, second_eigenvalue(case.topology))
    report = heart.round(0, x, **TOLD)
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-12)
    assert report.messages == 5 * 8


def test_the_mean_moves_by_the_mean_noise_alone_and_rows_end_as_near_as_it_is():
    case, x, heart = muffled(1.5, 12)
    before = x.mean(0)
    heart.round(0, x, **TOLD)
    moved = x.mean(0) - before
    assert float(moved.square().mean()) == pytest.approx(1.5 ** 2 / 4, rel=0.5)  # sigma^2 / n
    assert float((x - x.mean(0)).square().mean()) < float(moved.square().mean())


def test_a_clip_bounds_the_local_step():
    case, x, heart = muffled(0.0, 1, clip=0.5)
    start = x.clone()
    x += 10 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    moved = x - start
    heart.round(0, x, **TOLD)
    w = torch.from_numpy(case.topology.matrix(0))
    torch.testing.assert_close(x, w @ (start + 0.5 * moved / moved.norm(dim=1, keepdim=True)))


def test_what_leaks_falls_with_the_distance_and_never_exceeds_the_noise_s_own():
    w = topologies.build("ring", 12).matrix(0)
    sigma, alpha = 1.0, 2.0
    found = losses(w, polynomials(w, num_steps(12, sigma, second_eigenvalue(topologies.build("ring", 12)))), sigma, alpha)
    assert found.max() <= alpha / (2 * sigma ** 2)
    assert found[0, 1] == pytest.approx(alpha / (2 * sigma ** 2))  # its own message is seen
    once = losses(w, polynomials(w, 2), sigma, alpha)  # x and W x: nobody further than two links away is seen at all
    assert once[0, 6] == 0 and once[0, 2] == pytest.approx(alpha / 2 * 1 / 3) and once[0, 1] > once[0, 2] > once[0, 6]
    assert acceleration(0.0) == 1.0


def test_wrong_settings_are_named():
    for params, words in (({"sigma": 0}, "wrapper.steps = null follows"), ({"sigma": -1}, "wrapper.sigma = -1"),
                          ({"sigma": 1, "clip": 0}, "wrapper.clip = 0"), ({"sigma": 1, "steps": 0}, "wrapper.steps = 0")):
        with pytest.raises(ValueError, match=words):
            Case("lora", slots={"wrapper": Choice("muffliato", params)})
    with pytest.raises(ValueError, match="channel.sigma = -1"):
        zip_noise(sigma=-1)
    with pytest.raises(ValueError, match="channel.bits = 60"):
        masked(bits=60)
    with pytest.raises(ValueError, match="channel.loss = 2"):
        masked(loss=2)
