"""Sparse-and-orthogonal LoRA: frames, densities, bitmaps, what is refused, the bank, the router, a run."""

import numpy as np
import pytest
import torch
from one_round import build, gossip
from tiny_runs import make_config, make_folder, make_run

import topologies
from dfl import simulate
from dfl.adapters.frames import clusters, collision, frame, make_frames
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.adapters.router import forgetting, routed, shares
from dfl.methods import Choice
from dfl.rules.bank import bits, densities, packed, unpacked
from dfl.run.build import check
from dfl.slots import Message
from dfl.training.spectrum import participation

NUM = 3
LAYOUT = make_layout([("q", 2, 16, 7, 1.0), ("o", 2, 9, 5, 2.0)], [("head", (2, 3))])
FRAMES = make_frames(LAYOUT, 0, NUM)


def rows(seed=0) -> torch.Tensor:
    x = empty_rows(NUM, LAYOUT.size)
    x.copy_(torch.randn(NUM, LAYOUT.size, generator=torch.Generator().manual_seed(seed)))
    for peer, row in enumerate(x):
        row[LAYOUT.groups["A"]] = FRAMES(peer)[LAYOUT.groups["A"]]
    return x


def method(**given):
    return build("task_bank", LAYOUT, peers=NUM, frames=FRAMES, **given)


def test_frames_are_orthogonal_and_a_function_of_the_seed():
    """A_i A_j^T = 0, so that <B_i A_i, B_j A_j> = 0 for any B; full up to N R = I."""
    for rank, d_in, peers in ((2, 9, 4), (4, 16, 4), (1, 5, 5)):
        every = np.concatenate([frame(rank, d_in, peers, 7, peer) for peer in range(peers)])
        np.testing.assert_allclose(every @ every.T, np.eye(rank * peers), atol=1e-13)
    again = make_frames(LAYOUT, 0, NUM)
    assert all(torch.equal(FRAMES(peer), again(peer)) for peer in range(NUM))
    assert not torch.equal(FRAMES(0), make_frames(LAYOUT, 1, NUM)(0))
    x = rows().double()
    for pair in LAYOUT.pairs:
        first, second = (b_view(x, pair)[peer] @ a_view(x, pair)[peer] for peer in (0, 1))
        assert abs(float((first * second).sum())) < 1e-5


def test_without_room_frames_are_nearly_orthogonal():
    """E ||A_i A_j^T||_F is about R / sqrt(I): 0.816 for R = 32 and I = 1536."""
    first, second = (frame(32, 1536, 60, 3, peer) for peer in (0, 1))
    assert np.linalg.norm(first @ second.T) == pytest.approx(0.816, rel=0.1)
    assert np.linalg.norm(first @ first.T) == pytest.approx(32 ** 0.5, rel=0.1)


@pytest.mark.parametrize("density", [0.06, 0.3, 0.75, 1.0])
def test_densities_use_up_the_budget(density):
    sizes, scores = [100, 300, 50, 200], [1.0, 9.0, 2.0, 40.0]
    found = densities(scores, sizes, density)
    assert sum(share * size for share, size in zip(found, sizes, strict=True)) == pytest.approx(density * sum(sizes), rel=1e-6)
    assert all(0.05 <= share <= 1 for share in found)
    assert [found[k] for k in np.argsort(scores)] == sorted(found)
    assert densities([3.0, 3.0], [10, 20], density) == pytest.approx([density] * 2)


def test_layers_whose_inputs_fill_more_directions_keep_more():
    kept = {}
    for layers in ("spectrum", "even"):
        rule, x = method(density=0.4, layers=layers, spectra=dict.fromkeys(range(NUM), [1.0, 3.0])), rows()
        gossip(rule, x, [rule.init(row) for row in x], topologies.build("complete", NUM).matrix(0))
        kept[layers] = [int((b_view(x[0], pair) != 0).sum()) / (pair.d_out * pair.rank) for pair in LAYOUT.pairs]
    assert kept["spectrum"][0] < 0.3 < 0.5 < kept["spectrum"][1] and kept["even"] == pytest.approx([0.4, 0.4], abs=0.05)


def test_participation_counts_directions(folder, tmp_path):
    """Of inputs that are orthogonal and of one length it is their number."""
    from dfl.training.spectrum import _ratio
    assert _ratio(3 * torch.eye(8, dtype=torch.float64)[:5]) == pytest.approx(5)
    assert _ratio(torch.ones(9, 4, dtype=torch.float64)) == pytest.approx(1)


def test_a_bitmap_comes_back():
    for num in (1, 63, 64, 200):
        mask = torch.rand(num, generator=torch.Generator().manual_seed(num)) < 0.4
        assert torch.equal(bits(packed(mask), num), mask) and bool((packed(mask) >= 0).all())
        values = torch.arange(1.0, 1 + int(mask.sum()))
        row = unpacked(Message({"B": values}, {"bitmap": packed(mask)}), num)
        assert torch.equal(row[mask], values) and not row[~mask].any()


def test_what_is_masked_is_zero_and_bytes_are_the_closed_form():
    rule, x, w = method(density=0.3, refresh=4), rows(), topologies.build("complete", NUM).matrix(0)
    states, cut = [rule.init(row) for row in x], LAYOUT.groups["B"]
    total, kept = cut.stop - cut.start, sum(max(1, round(0.3 * p.d_out * p.rank)) for p in LAYOUT.pairs)
    for t in range(6):
        for row, state in zip(x, states, strict=True):
            row[cut] += 0.1 * torch.randn(total, generator=torch.Generator().manual_seed(t))
            plan = rule.plan(t)
            row[:] = rule.after_step(row, state, FakeRound(t, plan), 0)
        before = x.clone()
        report = gossip(rule, x, states, w, t)
        assert report.message_bytes == NUM * (NUM - 1) * (4 * kept + 8 * -(-total // 63))
        assert {one.index_bytes for one in report.ledger.values()} == {(NUM - 1) * 8 * -(-total // 63)}
        assert (x[:, cut] != 0).sum(1).tolist() == [kept] * NUM
        assert torch.equal(x[:, LAYOUT.groups["A"]], before[:, LAYOUT.groups["A"]])
        if t % 4:  # nothing new is kept between two prunings
            assert torch.equal(x, before)


class FakeRound:
    def __init__(self, t, plan):
        self.t, self.plan = t, plan


def test_a_bank_holds_what_others_sent_last_and_sums_to_their_products():
    rule, x, w = method(density=1.0), rows(), topologies.build("ring", NUM).matrix(0)
    states = [rule.init(row) for row in x]
    gossip(rule, x, states, w)
    for pair, place in zip(LAYOUT.pairs, rule.residual.pairs, strict=True):
        for i in range(NUM):
            found = b_view(states[i]["residual"], place) @ a_view(states[i]["residual"], place)
            expected = sum(b_view(x[j], pair) @ a_view(x[j], pair) for j in range(NUM) if j != i)
            torch.testing.assert_close(found, expected)
            # an input in the rows of A_i meets B_i alone
            h = a_view(x[i], pair)[0]
            torch.testing.assert_close(found @ h, torch.zeros(pair.d_out), rtol=0, atol=1e-5)


def test_no_rule_averages_b_of_frames_that_differ():
    with pytest.raises(ValueError, match="exchanges 'own', which rule 'average' cannot mix; it takes"):
        build("lora", LAYOUT, slots={"schedule": "own_a"})
    rule, x = method(), rows()
    x[1, 0] += 1
    with pytest.raises(TypeError, match="peer 1 holds another A"):
        gossip(rule, x, [rule.init(row) for row in x], topologies.build("complete", NUM).matrix(0))
    with pytest.raises(TypeError, match="different A"):
        simulate("ffa", topologies.build("ring", NUM), {"q": (a_view(rows(), LAYOUT.pairs[0]), b_view(rows(), LAYOUT.pairs[0]))},
                 lambda *_: None, 1)


def test_who_is_silent_stays_in_the_bank_as_it_was():
    rule = method(density=1.0, slots={"trigger": Choice("event", {"threshold": 1e9})})
    x, states = rows(), None
    from dfl.engine.gossip import Gossip
    from dfl.transport import InProcess
    heart = Gossip(rule.method, LAYOUT, topologies.build("complete", NUM), InProcess(), range(NUM), x)
    heart.round(0, x)
    first = {key: state["residual"] for key, state in heart.state["rule"].items()}
    x[:, LAYOUT.groups["B"]] += 1
    assert heart.round(1, x).messages == 0
    assert all(torch.equal(first[key], state["residual"]) for key, state in heart.state["rule"].items()) and states is None


def test_a_router_takes_the_adapter_in_whose_rows_an_input_lies():
    pair = LAYOUT.pairs[0]
    a = torch.stack([a_view(FRAMES(peer), pair) for peer in range(NUM)])
    for peer in range(NUM):
        found = shares(a, a[peer].sum(0), 0.1)
        assert int(found.argmax()) == peer and float(found.sum()) == pytest.approx(1)
    h = torch.randn(4, 5, pair.d_in)
    assert shares(a, h, 1.0).shape == (4, 5, NUM)
    torch.testing.assert_close(shares(a, 10 * h, 1.0), shares(a, h, 1.0))


def test_clusters_are_of_cheap_links_whose_adapters_do_not_meet():
    masks = torch.ones(NUM, LAYOUT.size, dtype=torch.bool)
    assert float(collision(masks, [FRAMES(peer) for peer in range(NUM)], LAYOUT).fill_diagonal_(0).max()) < 1e-10
    same = collision(masks, [FRAMES(0), FRAMES(0), FRAMES(1)], LAYOUT)
    assert float(same[0, 1]) == pytest.approx(1, rel=1e-5) and float(same[0, 2]) < 1e-10
    disjoint = masks.clone()
    for pair in LAYOUT.pairs:
        middle, end = pair.b + 6, pair.b + pair.d_out * pair.rank
        disjoint[0, pair.b:middle], disjoint[1, middle:end] = False, False
    assert float(collision(disjoint, [FRAMES(0)] * 3, LAYOUT)[0, 1]) == 0
    cost = np.array([[0, 1, 5, 5], [1, 0, 5, 5], [5, 5, 0, 5], [5, 5, 5, 0.0]])
    assert clusters(cost, np.zeros((4, 4)), degree=1) == [(0, 1), (2, 3)]
    meets = np.zeros((4, 4))
    meets[0, 1] = meets[1, 0] = 1
    assert clusters(cost, meets, kappa=10.0, degree=1) == [(0, 2), (1, 3)]
    with pytest.raises(ValueError, match="symmetric matrices"):
        clusters(np.array([[0, 1], [2, 0]]), np.zeros((2, 2)))


def test_forgetting_is_what_others_cost():
    assert torch.equal(forgetting(torch.tensor([0.75, 0.5]), torch.tensor([0.5, 0.75])), torch.tensor([0.25, -0.25]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("bank"), layers=2)


def config_of(folder, output, **fields):
    given = {"method": "{name: task_bank, density: 0.4}", "lora__adapter": "orthogonal", "lora__head": "local",
             "train__lr": 0.02} | fields
    return make_config(folder / "bert", folder / "data.csv", output, **given)


def test_a_run_divides_by_the_inputs_of_each_peer_and_serves_its_bank(folder, tmp_path):
    from dfl.run.loop import Hooks, run_rounds
    run, loaded = make_run(config_of(folder, tmp_path / "run", train__rounds=2))
    adapted, layout = run.peers.adapted, run.peers.layout
    start = run.peers.x.clone()
    assert not torch.equal(start[0], start[1])
    run_rounds(run, Hooks(lambda record: None, lambda: None, lambda: False))
    assert torch.equal(run.peers.x[:, layout.groups["A"]], start[:, layout.groups["A"]])
    used = [[int((b_view(run.peers.x[peer], pair) != 0).sum()) for pair in layout.pairs] for peer in range(2)]
    calibration = run.task.collate([run.split.features[k] for k in run.peers.streams[0].batch(0)])
    assert len(participation(adapted, run.task, [calibration])) == len(layout.pairs)
    assert sum(used[0]) == pytest.approx(0.4 * layout.length({"B"}), abs=len(layout.pairs))
    batch = run.task.collate([run.split.features[k] for k in range(4)])
    bank = run.peers.x
    with torch.no_grad():
        with routed(adapted, bank) as model:
            summed = model(**run.task.inputs(batch)).logits
        with routed(adapted, bank, 1e-4) as model:
            chosen = model(**run.task.inputs(batch)).logits
        with run.executor.bound(adapted, run.rows(), None, [0]) as forward:
            own = forward(run.task.inputs(batch), [0]).logits
    # on a ring of four, peer 0 has not received from the one opposite
    with torch.no_grad(), routed(adapted, bank[[0, 1, 3]]) as model:
        torch.testing.assert_close(model(**run.task.inputs(batch)).logits, own, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(summed, chosen)
    with pytest.raises(ValueError, match="temperature = 0"), routed(adapted, bank, 0):
        pass


def test_other_methods_refuse_the_adapter_and_the_method_other_adapters(folder, tmp_path):
    for fields, words in (({"method": "lora"}, "which method.name = 'lora' does not mix; allowed: task_bank, local"),
                          ({"lora__adapter": "lora"}, "needs lora.adapter = 'orthogonal'"),
                          ({"method": "task_bank", "rule": "average"}, "does not mix"),
                          ({"lora__rank": "[1, 2, 1, 1]"}, "unequal ranks")):
        with pytest.raises(ValueError, match=words):
            check(config_of(folder, tmp_path / "run", **fields))
