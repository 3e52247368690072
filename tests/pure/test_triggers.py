"""Who speaks, what it costs, and what others then hold: published counts, closed forms and limits."""

import math

import numpy as np
import pytest
import torch
from cases import NUM, Case, start_rows
from one_round import build

import topologies
from dfl import methods
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.engine.gossip import Gossip
from dfl.engine.memory import message_of, packet_of
from dfl.methods import Choice
from dfl.simulation import Rows
from dfl.slots import Message
from dfl.transport import InProcess, ledger
from dfl.triggers.distance import product_distance


def scalars(num: int, topology=None, **slots):
    """Peers with one number each: B of a layer of one by one, beside a frozen A of one. The heart, and the rows."""
    layout = make_layout([("q", 1, 1, 1, 1.0)])
    built = build("ffa", layout, slots={slot: Choice(*choice) for slot, choice in slots.items()}, peers=num, rounds=50)
    x = torch.zeros(num, layout.size, dtype=torch.float64)
    x[:, 0] = 1
    topology = topologies.build("ring", num) if topology is None else topology
    methods.check_topology(built.method, topology)
    return Gossip(built.method, layout, topology, InProcess(), range(num), x, seed=0), x


def quadratics(heart, x, rounds: int) -> list:
    """f_i = a_i (x - b_i)² / 2 with a_i = 1 + i / 8, b_i = i, steps of 0.1."""
    ids, found = torch.arange(len(x), dtype=torch.float64), []
    for t in range(rounds):
        x[:, 1] -= 0.1 * (1 + ids / 8) * (x[:, 1] - ids)
        found.append(heart.round(t, x, lr=0.1, local_steps=1))
    return found


class TestEvent:
    """Zhai et al.'s trigger; the golden run is ours, checked by a second program."""

    @pytest.mark.parametrize("decay, rounds, messages, error", [("sqrt", 50, 248, None), ("sqrt", 500, 1450, 0.997556),
                                                                ("constant", 50, 180, None), ("constant", 500, 1448, 1.276992)])
    def test_golden_counts(self, decay, rounds, messages, error):
        heart, x = scalars(8, trigger=("event", {"threshold": 0.5, "decay": decay, "start": "common"}))
        reports = quadratics(heart, x, rounds)
        assert sum(report.messages for report in reports) == messages == 2 * sum(report.broadcasts for report in reports)
        assert sum(one.messages for report in reports for one in report.ledger.values()) == messages
        # a number of eight bytes, and the digest of the frozen A
        assert sum(report.message_bytes for report in reports) == 16 * messages
        if error is not None:
            assert float((x[:, 1] - 3.956521739130435).abs().max()) == pytest.approx(error, abs=1e-6)

    def test_the_same_run_that_always_sends(self):
        heart, x = scalars(8)
        reports = quadratics(heart, x, 500)
        assert sum(report.messages for report in reports) == 8000
        assert float((x[:, 1] - 3.956521739130435).abs().max()) == pytest.approx(1.006059, abs=1e-6)

    def test_who_never_speaks_trains_alone(self):
        heart, x = scalars(8, trigger=("event", {"threshold": 1e9, "decay": "constant", "start": "common"}))
        alone, y = scalars(8, schedule=("alone",))
        assert sum(report.messages for report in quadratics(heart, x, 20)) == 0
        quadratics(alone, y, 20)
        assert torch.equal(x, y)

    @pytest.mark.parametrize("start", ["sent", "common"])
    def test_receivers_hold_what_senders_think_and_none_is_far(self, start):
        heart, x = scalars(8, trigger=("event", {"threshold": 0.5, "start": start}))
        for t in range(20):
            before = x.clone()
            ids = torch.arange(8, dtype=torch.float64)
            before[:, 1] -= 0.1 * (1 + ids / 8) * (before[:, 1] - ids)
            quadratics(heart, x, 1) if t == 0 else self.one(heart, x, t)
            for key, held in heart.state["received"].items():
                sender = key.split("/")[1]
                assert torch.equal(held["part.B"], heart.state["trigger"][sender]["sent.B"])
            for peer in range(8):
                assert abs(float(before[peer, 1] - heart.state["trigger"][str(peer)]["sent.B"])) < 0.5 / math.sqrt(t + 1)

    @staticmethod
    def one(heart, x, t):
        ids = torch.arange(len(x), dtype=torch.float64)
        x[:, 1] -= 0.1 * (1 + ids / 8) * (x[:, 1] - ids)
        return heart.round(t, x, lr=0.1, local_steps=1)

    @pytest.mark.parametrize("channel", [("lossy", {"rate": 0.4}), ("lossy", {"rate": 0.9})])
    def test_lost_messages_are_sent_again_and_the_mean_stays(self, channel):
        """A loss at one end alone would move the mean, were differences not of what each neighbour holds."""
        heart, x = scalars(8, trigger=("event", {"threshold": 1e9, "decay": "constant"}), channel=channel)
        x[:, 1] = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mean, sent = float(x[:, 1].mean()), []
        for t in range(60):
            sent.append(heart.round(t, x).messages)
            assert float(x[:, 1].mean()) == pytest.approx(mean, abs=1e-13)
            for key, held in heart.state["received"].items():
                receiver, sender = key.split("/")
                assert torch.equal(held["part.B"], heart.state["delivered"][f"{sender}/{receiver}"]["part.B"])
        if channel[1]["rate"] < 0.5:  # said once, then to those who had lost it, until all have it
            assert sent[0] == 16 and 0 < sent[1] < 16 and sent[-1] == 0 and len(heart.state["received"]) == 16

    def test_who_becomes_a_neighbour_is_sent_all(self):
        topology = Changing()
        heart, x = scalars(4, topology, trigger=("event", {"threshold": 1e9, "decay": "constant"}))
        x[:, 1] = torch.arange(4, dtype=torch.float64)
        assert [heart.round(t, x).messages for t in range(6)] == [4, 4, 0, 0, 0, 0]

    def test_without_the_products_norm_a_turned_basis_is_news(self):
        """(B R^-1)(R A) is the same adapter: the norm of the product does not see it, that of the factors does."""
        spoke = {}
        for norm in ("factors", "product"):
            case = Case("lora", slots={"trigger": Choice("event", {"threshold": 1e-3, "decay": "constant", "norm": norm})})
            x = start_rows(case).double()
            heart = case.gossip(x)
            heart.round(0, x)
            x[:] = x.mean(0)
            heart = case.gossip(x)
            heart.round(0, x)
            turn = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
            for pair in case.layout.pairs:
                a, b = a_view(x, pair), b_view(x, pair)
                a.copy_(turn @ a), b.copy_(b @ turn.inverse())
            spoke[norm] = heart.round(1, x).broadcasts
        assert spoke == {"factors": NUM, "product": 0}

    def test_product_distance_is_that_of_dense_products(self):
        case = Case("lora")
        layout, rows = case.layout, start_rows(case, apart=True).double()
        one, other = ({group: row[layout.groups[group]] for group in "AB"} for row in rows[:2])
        dense = sum((pair.scaling * (b_view(rows[0], pair) @ a_view(rows[0], pair) - b_view(rows[1], pair) @ a_view(rows[1], pair)))
                    .square().sum() for pair in layout.pairs)
        assert product_distance(one, other, layout) == pytest.approx(float(dense) ** 0.5, rel=1e-12)
        assert product_distance(one, one, layout) == 0

    @pytest.mark.parametrize("name, params, words", [
        ("event", {"norm": "frobenius"}, "factors, product"), ("event", {"start": "zero"}, "sent, common"),
        ("sparq", {"growth": 1.0}, "below 1"), ("sparq", {"every": 0}, "from 1"), ("eventgrad", {"horizon": -1}, "from 0"),
        ("efhc", {"bandwidth": [1.0, 2.0]}, "2 numbers for 4 peers"), ("efhc", {"bandwidth": "fast"}, "allowed: measured"),
        ("efhc", {"bandwidth": 0}, "above 0"), ("efhc", {"least": 5, "most": 1}, "least <= most"),
        ("efhc", {"bandwidth": "measured"}, "needs a network"), ("global_threshold", {"bandwidth": -1}, "above 0"),
        ("random_gossip", {"probability": 2}, "from 0 to 1"), ("periodic", {"every": 0}, "from 1"),
        ("late", {"share": 2}, "from 0 to 1"), ("late", {"merge": 1}, "true, false")])
    def test_what_cannot_be_is_refused(self, name, params, words):
        with pytest.raises(ValueError, match=rf"trigger\..*{words}"):
            build("lora", Case("lora").layout, slots={"trigger": Choice(name, params)}, peers=4, rounds=10)

    def test_peers_that_start_apart_have_no_common_start(self):
        case = Case("lora", slots={"trigger": Choice("event", {"start": "common"})})
        with pytest.raises(ValueError, match="trigger.start = 'common' needs peers that all start from the same"):
            case.gossip(start_rows(case))
        with pytest.raises(ValueError, match="those of unequal ranks"):
            build("decaf", case.layout, ranks=(2, 1, 2, 2), slots={"trigger": Choice("event", {"start": "common"})})
        with pytest.raises(ValueError, match="trigger.norm = 'product' needs messages of A and B"):
            build("ffa", case.layout, slots={"trigger": Choice("event", {"norm": "product"})})


class Changing(Rows):
    """Two pairs in even rounds, the other two in odd ones."""

    period = 2

    def __init__(self):
        super().__init__(self)
        self.num_peers = 4

    num_peers = 4

    def matrix(self, t, alive=None):
        w = np.eye(4) / 2
        for i, j in ((0, 1), (2, 3)) if t % 2 == 0 else ((0, 2), (1, 3)):
            w[i, j] = w[j, i] = 0.5
        return w


def held_by(heart, receiver: int, sender: int) -> Message:
    return message_of(heart.state["received"][f"{receiver}/{sender}"])


class TestLinks:
    """EF-HC and its baselines."""

    def test_used_links_are_the_same_at_both_ends_and_the_mean_stays(self):
        heart, x = scalars(8, trigger=("efhc", {"r": 1.0, "bandwidth": [1, 2, 4, 8, 1, 2, 4, 8]}))
        total, answers = 0, 0
        for t in range(40):
            ids = torch.arange(8, dtype=torch.float64)
            x[:, 1] -= 0.1 * (1 + ids / 8) * (x[:, 1] - ids)
            mean = float(x[:, 1].mean())
            report = heart.round(t, x)
            assert float(x[:, 1].mean()) == pytest.approx(mean, abs=1e-13)
            used = {peer: one.messages for peer, one in report.ledger.items()}
            assert report.messages == sum(used.values()) and report.messages % 2 == 0
            assert report.messages >= 2 * report.broadcasts
            total, answers = total + report.messages, answers + report.messages - 2 * report.broadcasts
        assert 0 < total < 40 * 16 and answers > 0

    def test_slow_links_speak_less(self):
        spoke = []
        for bandwidth in (1.0, 2.0, 4.0):
            heart, x = scalars(8, trigger=("efhc", {"r": 1.0, "bandwidth": bandwidth}))
            spoke.append(sum(report.broadcasts for report in quadratics(heart, x, 60)))
        assert spoke[0] < spoke[1] < spoke[2]

    def test_equal_bandwidths_are_the_global_threshold(self):
        found = []
        for trigger in (("efhc", {"r": 2.0, "bandwidth": [4.0] * 8}), ("global_threshold", {"r": 2.0, "bandwidth": 4.0})):
            heart, x = scalars(8, trigger=trigger)
            quadratics(heart, x, 30)
            found.append(x)
        assert torch.equal(*found)

    def test_a_link_that_comes_back_is_greeted_once_from_both_ends(self):
        heart, x = scalars(4, Changing(), trigger=("efhc", {"r": 1e9, "bandwidth": 1.0}))
        # links change in every round: both ends of each of the two new ones send
        assert [heart.round(t, x).messages for t in range(4)] == [0, 4, 4, 4]
        heart, x = scalars(4, trigger=("efhc", {"r": 1e9, "bandwidth": 1.0}))
        assert [heart.round(t, x).messages for t in range(4)] == [0] * 4

    def test_messages_are_answered_with_what_one_holds_now(self):
        """Peer 0 alone moves: its neighbours answer, and both ends meet in the middle; peer 2 is told nothing."""
        heart, x = scalars(4, trigger=("efhc", {"r": 1.0, "bandwidth": 1.0}))
        heart.round(0, x)
        x[0, 1] = 3.0
        report = heart.round(1, x)
        assert report.broadcasts == 1 and {peer: one.messages for peer, one in report.ledger.items()} == {0: 2, 1: 1, 2: 0, 3: 1}
        assert x[:, 1].tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0])

    def test_transmission_time_of_always_sending(self):
        """Zehtabi et al.'s setting: 7850 parameters, eight peers of bandwidth 1000, two of 21000."""
        bandwidth = [1000.0] * 8 + [21000.0] * 2
        layout = make_layout([], head=[("w", (7850,))])
        built = build("lora", layout, head="mixed", slots={"trigger": Choice("zero_threshold")}, peers=10)
        topology = topologies.build("ring", 10)
        x = empty_rows(10, layout.size)
        report = Gossip(built.method, layout, topology, InProcess(), range(10), x).round(0, x)
        degrees = [len(topology.receivers(0, peer)) for peer in range(10)]
        assert ledger.transmission_time(report.ledger, bandwidth, degrees) == pytest.approx(6.355, abs=5e-4)
        slower = [1000.0] * 4 + [23000 / 3] * 6
        assert ledger.transmission_time(report.ledger, slower, degrees) == pytest.approx(3.754, abs=5e-4)

    def test_random_gossip_speaks_as_often_as_it_is_told(self):
        heart, x = scalars(8, trigger=("random_gossip",))
        spoke = sum(heart.round(t, x).broadcasts for t in range(400))
        assert 300 < spoke < 500  # 400 expected, a standard deviation of 19
        heart, x = scalars(8, trigger=("random_gossip", {"probability": 0.0}))
        assert sum(heart.round(t, x).messages for t in range(10)) == 0

    def test_a_directed_topology_is_refused(self):
        with pytest.raises(ValueError, match="links that go one way"):
            scalars(4, topologies.build("directed_ring", 4), trigger=("efhc",))


class TestOthers:
    def test_periodic_is_gossip_in_every_kth_round(self):
        heart, x = scalars(8, trigger=("periodic", {"every": 3}))
        assert [report.messages for report in quadratics(heart, x, 7)] == [0, 0, 16, 0, 0, 16, 0]

    def test_late_is_alone_then_gossip_then_the_mean_of_all(self):
        heart, x = scalars(8, trigger=("late", {"share": 0.1}))  # of 50 rounds
        messages = [report.messages for report in quadratics(heart, x, 50)]
        assert messages == [0] * 45 + [16] * 4 + [56]
        assert float(x[:, 1].max() - x[:, 1].min()) < 1e-14

    def test_a_merge_alone_is_the_mean_of_those_who_trained_alone(self):
        heart, x = scalars(8, trigger=("late", {"share": 0}))
        alone, y = scalars(8, schedule=("alone",))
        assert sum(report.messages for report in quadratics(heart, x, 50)) == 56
        quadratics(alone, y, 50)
        torch.testing.assert_close(x[:, 1], y[:, 1].mean().expand(8), rtol=0, atol=1e-13)

    def test_sparq_asks_for_more_than_the_rate_is_worth(self):
        """c = tau² / lr² is a constant threshold of tau, and H = 2 asks in every second round."""
        found = []
        for trigger in (("sparq", {"c": 25.0}), ("event", {"threshold": 0.5, "decay": "constant"})):
            heart, x = scalars(8, trigger=trigger)
            found.append([report.messages for report in quadratics(heart, x, 50)])
        assert found[0] == found[1] and 0 < sum(found[0]) < 800
        heart, x = scalars(8, trigger=("sparq", {"c": 0.0, "every": 2}))
        assert [report.messages for report in quadratics(heart, x, 4)] == [0, 16, 0, 16]

    def test_eventgrad_sends_tensors_one_by_one(self):
        case = Case("lora", slots={"trigger": Choice("eventgrad", {"initial": 1})})
        x = start_rows(case)
        heart = case.gossip(x)
        for t in range(3):  # a change, from which its threshold is made: the others never change
            b_view(x, case.layout.pairs[0]).mul_(1.5)
            before = x.clone()
            report = heart.round(t, x)
        pair = case.layout.pairs[0]
        assert set(packet_of(heart.state["sent"]["0"]).numel) == {"A0", "A1", "B0", "B1"}
        assert report.ledger[0].payload_bytes < 2 * 4 * case.layout.size
        assert report.ledger[0].payload_bytes % (2 * 4) == 0 and not torch.equal(b_view(x, pair), b_view(before, pair))
        for peer in range(NUM):
            for other in heart.topology.receivers(2, peer):
                sent = {name: data for name, data in packet_of(heart.state["sent"][str(peer)]).payload.items()}
                whole = torch.cat([sent[f"B{k}"].view(torch.float32) for k in range(2)])
                assert torch.equal(held_by(heart, other, peer).parts["B"], whole)

    def test_eventgrad_with_a_horizon_of_nought_always_sends(self):
        case = Case("lora", slots={"trigger": Choice("eventgrad", {"horizon": 0.0, "initial": 1})})
        x = start_rows(case)
        heart = case.gossip(x)
        assert [heart.round(t, x).messages for t in range(4)] == [8] * 4
