"""What the way does: what is lost and what stands for it, errors that add up, delay, and simulated time."""

import math

import numpy as np
import pytest
import torch
from cases import NUM, Case, start_rows
from one_round import build

import topologies
from dfl.adapters.layout import empty_rows, make_layout
from dfl.channels import CHANNELS, repeats
from dfl.channels.segments import MODES
from dfl.engine.gossip import Gossip
from dfl.methods import Choice
from dfl.networks import NETWORKS
from dfl.seeds import derive
from dfl.slots import Link, Message
from dfl.transport import InProcess, ledger

PEERS, SIZE = 10, 60
LAYOUT = make_layout([], head=[("w", (SIZE,))])
W = topologies.build("ring", PEERS).matrix(0)


def heads(channel=("perfect",), seed: int = 0, topology=None, spread: bool = True, **slots):
    """Ten peers with sixty numbers each, all exchanged; the heart, and the rows."""
    slots = {slot: Choice(*choice) for slot, choice in {"channel": channel, **slots}.items()}
    built = build("lora", LAYOUT, head="mixed", slots=slots, peers=PEERS, rounds=50)
    x = empty_rows(PEERS, SIZE, dtype=torch.float64)
    x.copy_(torch.randn(PEERS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if spread else torch.ones(1, 1))
    topology = topologies.build("ring", PEERS) if topology is None else topology
    return Gossip(built.method, LAYOUT, topology, InProcess(), range(PEERS), x, seed=seed), x


class TestSegments:
    @pytest.mark.parametrize("mode", MODES)
    def test_without_errors_all_modes_are_j_applications_of_w(self, mode):
        heart, x = heads(("segments", {"rate": 0.0, "mode": mode, "aggregations": 3}))
        expected = torch.from_numpy(np.linalg.matrix_power(W, 3)) @ x
        report = heart.round(0, x)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-13)
        assert report.aggregations == 3 and report.messages == 3 * 2 * PEERS
        assert report.ledger[0].rounds == 1 and report.ledger[0].messages == 6 and report.ledger[0].repeated == 0

    @pytest.mark.parametrize("mode", ["substitute_own", "renormalise", "stale", "retransmit"])
    def test_where_nothing_arrives_nothing_changes(self, mode):
        heart, x = heads(("segments", {"rate": 1.0, "mode": mode}))
        before = x.clone()
        report = heart.round(0, x)
        torch.testing.assert_close(x, before, rtol=0, atol=1e-14)
        assert report.ledger[0].repeated == (2 * 2 if mode == "retransmit" else 0)

    def test_zeros_shrink_by_the_own_weight(self):
        heart, x = heads(("segments", {"rate": 1.0, "mode": "zero_fill", "aggregations": 4}))
        before = x.clone()
        heart.round(0, x)
        torch.testing.assert_close(x, before / 3 ** 4, rtol=0, atol=1e-14)

    @pytest.mark.parametrize("mode", ["substitute_own", "renormalise", "stale", "retransmit"])
    def test_consensus_is_a_fixed_point(self, mode):
        heart, x = heads(("segments", {"rate": 0.5, "count": 7, "mode": mode}), spread=False)
        for t in range(5):
            heart.round(t, x)
        torch.testing.assert_close(x, torch.ones_like(x), rtol=0, atol=1e-14)

    def test_one_round_by_hand(self):
        """What arrives is a function of the link: every mode in numpy, number by number."""
        got, start = {}, None
        for mode in ("substitute_own", "renormalise", "zero_fill"):
            heart, x = heads(("segments", {"rate": 0.4, "count": 6, "mode": mode}))
            start = x.numpy().copy()
            heart.round(0, x)
            got[mode] = x.numpy()
        for i in range(PEERS):
            arrives, others = {}, [(i - 1) % PEERS, (i + 1) % PEERS]
            for j in others:
                key = derive(0, "channel", j, i, 0)
                arrives[j] = np.repeat(np.random.Generator(np.random.Philox(key)).random((1, 6))[0] >= 0.4, SIZE // 6)
            received = sum(W[i, j] * arrives[j] * start[j] for j in others)
            mass = W[i, i] + sum(W[i, j] * arrives[j] for j in others)
            np.testing.assert_allclose(got["zero_fill"][i], W[i, i] * start[i] + received, atol=1e-14)
            np.testing.assert_allclose(got["renormalise"][i], (W[i, i] * start[i] + received) / mass, atol=1e-14)
            np.testing.assert_allclose(got["substitute_own"][i], W[i, i] * start[i] + received + (1 - mass) * start[i], atol=1e-14)

    def test_stale_segments_are_the_last_that_came(self):
        deliver, state = CHANNELS["segments"](rate=0.5, count=4, mode="stale").deliver, {}
        last, missing = torch.full((8,), -1.0), torch.ones(8, dtype=torch.bool)
        for t in range(12):
            message = Message({"A": torch.full((8,), float(t))})
            found, state = deliver(message, state, Link(0, 1, t, derive(0, t)))
            came = torch.from_numpy(np.repeat(np.random.Generator(np.random.Philox(derive(0, t))).random((1, 4))[0] >= 0.5, 2))
            last, missing = torch.where(came, torch.full((8,), float(t)), last), missing & ~came
            assert torch.equal(found.parts["A"][~missing], last[~missing])
            assert torch.equal(found.lost.get("A", torch.zeros(8, dtype=torch.bool)), missing)
        assert not missing.any()

    def test_a_segment_is_sent_until_it_arrives(self):
        """1 / (1 - rate) times on average, and counted."""
        heart, x = heads(("segments", {"rate": 0.5, "count": 20, "mode": "retransmit", "attempts": 50}))
        expected, total = torch.from_numpy(W) @ x, ledger.Ledger()
        report = heart.round(0, x)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-14)
        total = ledger.total(report.ledger)
        assert total.messages == 2 * PEERS and total.repeated / total.messages == pytest.approx(1.0, abs=0.25)
        assert total.payload_bytes == pytest.approx(8 * SIZE * (total.messages + total.repeated), abs=PEERS)

    @pytest.mark.long
    def test_the_mean_is_kept_in_expectation_where_rates_are_equal_both_ways(self):
        drifts = []
        for seed in range(200):
            heart, x = heads(("segments", {"rate": 0.3, "count": 3}), seed)
            before = x.mean()
            heart.round(0, x)
            drifts.append(float(x.mean() - before))
        assert abs(np.mean(drifts)) < 4 * np.std(drifts) / math.sqrt(200) and np.std(drifts) > 0

    def test_as_many_segments_as_numbers_lose_as_much_with_less_variance(self):
        shares = {}
        for count in (1, SIZE):
            deliver = CHANNELS["segments"](rate=0.3, count=count, mode="zero_fill").deliver
            found = [deliver(Message({"A": torch.ones(SIZE)}), {}, Link(0, 1, t, derive(1, t)))[0].lost for t in range(600)]
            lost = [float(masks["A"].float().mean()) if masks else 0.0 for masks in found]
            shares[count] = np.mean(lost), np.var(lost)
        assert shares[1][0] == pytest.approx(0.3, abs=0.06) and shares[SIZE][0] == pytest.approx(0.3, abs=0.02)
        assert shares[1][1] > 10 * shares[SIZE][1]

    def test_rates_by_link(self):
        rate = np.zeros((PEERS, PEERS))
        rate[0, 1] = 1.0  # what 1 tells 0
        heart, x = heads(("segments", {"rate": rate.tolist(), "count": 1}))
        start = x.clone()
        assert heart.round(0, x).lost == 1
        torch.testing.assert_close(x[0], (2 * start[0] + start[9]) / 3, rtol=0, atol=1e-14)
        torch.testing.assert_close(x[1], (start[0] + start[1] + start[2]) / 3, rtol=0, atol=1e-14)

    def test_a_file_of_rates(self, tmp_path):
        np.savetxt(tmp_path / "rates.csv", np.full((PEERS, PEERS), 1.0), delimiter=",")
        heart, x = heads(("segments", {"rate": str(tmp_path / "rates.csv")}))
        assert heart.round(0, x).lost == 2 * PEERS

    @pytest.mark.long
    @pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "additive"])
    def test_under_a_trigger_both_ends_know_what_arrived_and_the_mean_stays(self, mode):
        """On a graph that changes, with rows that move: the receiver keeps what came before, and the rest is sent again."""
        topology = topologies.build("edge_activation", PEERS, base="complete", p=0.3, seed=2)
        heart, x = heads(("segments", {"rate": 0.4, "count": 3, "mode": mode, "attempts": 2}), topology=topology,
                         trigger=("event", {"threshold": 0.6, "decay": "constant"}))
        for t in range(30):
            x += 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
            mean = x.mean(0)
            heart.round(t, x)
            torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=1e-14)
            for key, held in heart.state["received"].items():
                receiver, sender = key.split("/")
                assert torch.equal(held["part.head"], heart.state["delivered"][f"{sender}/{receiver}"]["part.head"])
        assert len(heart.state["received"]) > 2 * PEERS

    def test_bursts_have_the_mean_and_the_length_that_are_said(self):
        deliver, state, lost = CHANNELS["bursts"](to_bad=0.1, to_good=0.25, loss=0.8).deliver, {}, []
        bad = []
        for t in range(6000):
            found, state = deliver(Message({"A": torch.ones(4)}), state, Link(0, 1, t, derive(0, t)))
            lost.append(found is None)
            bad.append(bool(state["bad"]))
        assert np.mean(lost) == pytest.approx(0.8 * 0.1 / 0.35, abs=0.03)
        starts = sum(b and not a for a, b in zip([False, *bad], bad, strict=False))
        assert sum(bad) / starts == pytest.approx(4, abs=0.5)

    @pytest.mark.parametrize("name, params, words", [
        ("segments", {"rate": 2}, "from 0 to 1"), ("segments", {"rate": [[0, 2], [0, 0]]}, "a row and a column for each of 10"),
        ("segments", {"rate": "nowhere.csv"}, "no matrix of numbers"), ("segments", {"count": 0}, "from 1"),
        ("segments", {"mode": "drop"}, "substitute_own, renormalise"), ("segments", {"aggregations": "often"}, "allowed: auto"),
        ("segments", {"attempts": 0}, "from 1"), ("bursts", {"to_bad": -1}, "from 0 to 1"), ("noise", {}, "needs one of them"),
        ("noise", {"sigma": 1, "snr": 10}, "needs one of them"), ("noise", {"sigma": -1}, "from 0"),
        ("delay", {"by": -1}, "from 0"), ("delay", {"jitter": 0.5}, "whole number"),
        ("perfect", {"aggregations": "auto"}, "needs a channel that adds errors")])
    def test_what_cannot_be_is_refused(self, name, params, words):
        with pytest.raises(ValueError, match=rf"channel\..*{words}"):
            heads((name, params))

    def test_rates_out_of_range_in_a_matrix_are_named(self):
        with pytest.raises(ValueError, match="channel.rate = 1.5 is not allowed"):
            heads(("segments", {"rate": np.full((PEERS, PEERS), 1.5).tolist()}))


class TestHowOften:
    def test_where_errors_are_injected_there_is_a_best_number(self):
        """Noise: chosen in each round, as the formula says, from what the peers see; without disagreement once is best."""
        heart, x = heads(("noise", {"sigma": 0.01, "aggregations": "auto", "most": 200}))
        disagreement = float((x - x.mean(0)).square().sum() / PEERS)
        report = heart.round(0, x)
        rho, v = repeats.contraction(W), SIZE * 2 * 0.01 ** 2 / 9
        best = math.log(disagreement * 2 * math.log(1 / rho) / v) / (2 * math.log(1 / rho))
        assert report.aggregations == pytest.approx(best, abs=5) and 10 < report.aggregations < 200
        assert report.messages == 2 * PEERS * report.aggregations
        assert heart.round(1, x).aggregations < report.aggregations / 2

    @pytest.mark.long
    def test_it_is_where_the_distance_to_the_mean_is_smallest(self):
        """The noise's random walk against the disagreement: more and fewer are both worse."""
        def left(aggregations):
            errors = []
            for seed in range(5):
                heart, x = heads(("noise", {"sigma": 0.1, "aggregations": aggregations}), seed)
                mean = x.mean(0)
                chosen = heart.round(0, x).aggregations
                errors.append(float((x - mean).square().mean()))
            return np.mean(errors), chosen
        best, chosen = left("auto")
        assert 3 < chosen < 60
        assert best < left(1)[0] and best < left(8 * chosen)[0]

    @pytest.mark.parametrize("mode", ["substitute_own", "renormalise", "stale", "retransmit"])
    def test_where_none_are_more_is_better_and_the_most_is_taken(self, mode):
        heart, x = heads(("segments", {"rate": 0.3, "mode": mode, "aggregations": "auto", "most": 12}))
        mean, before = x.mean(0), float((x - x.mean(0)).square().mean())
        assert heart.round(0, x).aggregations == 12
        assert float((x - mean).square().mean()) < before / 3

    def test_zeros_are_an_error_that_is_injected(self):
        """Of numbers that are far from zero, each exchange takes off more than it brings together."""
        heart, x = heads(("segments", {"rate": 0.3, "mode": "zero_fill", "aggregations": "auto"}))
        x += 3
        assert heart.round(0, x).aggregations == 1

    def test_methods_that_keep_more_than_rows_are_refused(self):
        with pytest.raises(ValueError, match="channel.aggregations: 'decaf' cannot mix more than once"):
            Case("decaf", slots={"channel": Choice("perfect", {"aggregations": 2})})


class TestNoise:
    def test_the_variance_is_the_closed_form(self):
        heart, x = heads(("noise", {"sigma": 0.5}), spread=False)
        heart.round(0, x)
        assert float((x - 1).var()) == pytest.approx(0.25 * 2 / 9, rel=0.15)

    def test_a_ratio_to_the_message(self):
        heart, x = heads(("noise", {"snr": 20.0}), spread=False)
        heart.round(0, x)
        assert float((x - 1).var()) == pytest.approx(0.01 * 2 / 9, rel=0.15)


class TestDelay:
    def test_messages_come_later(self):
        heart, x = heads(("delay", {"by": 2}))
        history = []
        for t in range(6):
            before, w = x.clone(), torch.from_numpy(W)
            history.append(before)
            heart.round(t, x)
            diagonal = torch.diag(torch.diag(w))
            expected = before if t < 2 else diagonal @ before + (w - diagonal) @ history[t - 2]
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-14)

    def test_a_delay_that_varies_delivers_the_newest(self):
        deliver, state, seen = CHANNELS["delay"](by=1, jitter=3).deliver, {}, []
        for t in range(60):
            message = Message({"A": torch.full((1,), float(t))}, {"n": torch.tensor([t])})
            found, state = deliver(message, state, Link(0, 1, t, derive(0, t)))
            if found is not None:
                assert int(found.meta["n"]) == int(found.parts["A"]) <= t - 1
                seen.append(int(found.parts["A"]))
        assert seen == sorted(set(seen)) and 20 < len(seen) < 58 and len(state) <= 3 * 4

    def test_who_holds_messages_back_cannot_have_them_late(self):
        with pytest.raises(ValueError, match="channel.name = 'delay' delays messages: with trigger.name = 'event'"):
            heads(("delay",), trigger=("event",))
        with pytest.raises(ValueError, match="'delay' delays messages, which 'plora' cannot have"):
            Case("plora", slots={"channel": Choice("delay")})


class TestClock:
    def test_a_round_takes_as_long_as_the_last_message(self):
        """Fifty ms and eight bytes a number over a link, and two local steps before."""
        heart, x = heads(network=("links", {"bandwidth": 1000.0, "latency": 0.05, "compute": 0.1}))
        for t in range(3):
            report = heart.round(t, x, local_steps=2)
            assert report.ledger[4].seconds == pytest.approx((t + 1) * (0.2 + 0.05 + 8 * SIZE / 1000))

    def test_who_is_slow_delays_its_neighbours_round_by_round(self):
        compute = [1.0] + [0.0] * 9
        heart, x = heads(network=("links", {"bandwidth": 1e12, "latency": 0.0, "compute": compute}))
        seconds = []
        for t in range(3):
            report = heart.round(t, x, local_steps=1)
            seconds.append([round(report.ledger[peer].seconds, 6) for peer in range(PEERS)])
        assert seconds[0] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
        assert seconds[1] == [2, 2, 1, 0, 0, 0, 0, 0, 1, 2] and seconds[2] == [3, 3, 2, 1, 0, 0, 0, 1, 2, 3]

    def test_silence_takes_no_time_and_an_answer_takes_two_ways(self):
        network = ("links", {"bandwidth": 1e12, "latency": 1.0})
        heart, x = heads(network=network, trigger=("event", {"threshold": 1e9, "decay": "constant"}))
        assert [heart.round(t, x).ledger[0].seconds for t in range(3)] == pytest.approx([1.0] * 3)
        heart, x = heads(network=network, trigger=("efhc", {"r": 1.0, "bandwidth": 1.0}), spread=False)
        heart.round(0, x)
        x[0] += 2
        report = heart.round(1, x)
        assert [round(report.ledger[peer].seconds, 6) for peer in (0, 1, 2, 9)] == [2, 1, 0, 1]

    def test_a_matrix_is_read_by_receiver_and_sender(self, tmp_path):
        latency = np.zeros((PEERS, PEERS))
        latency[3, 4] = 7.0  # from 4 to 3
        np.savetxt(tmp_path / "latency.csv", latency, delimiter=",")
        for given in (latency.tolist(), str(tmp_path / "latency.csv")):
            heart, x = heads(network=("links", {"bandwidth": 1e12, "latency": given}))
            report = heart.round(0, x)
            assert [peer for peer in range(PEERS) if report.ledger[peer].seconds > 1] == [3]

    def test_a_trace(self, tmp_path):
        path = tmp_path / "trace.csv"
        rows = [f"{t},{j},{i},1000,{t + 1}" for t in (0, 2) for j in range(PEERS) for i in range(PEERS)]
        path.write_text("\n".join(["round,sender,receiver,bandwidth,latency", *rows]))
        for repeat, latencies in ((False, [1, 1, 3, 3, 3]), (True, [1, 1, 3, 1, 1])):
            heart, x = heads(network=("trace", {"path": str(path), "repeat": repeat}))
            seconds = [heart.round(t, x).ledger[0].seconds for t in range(5)]
            assert np.diff([0, *seconds]).tolist() == pytest.approx([latency + 0.48 for latency in latencies])

    @pytest.mark.parametrize("text, words", [("round,sender\n0,1", "line 2"), ("", "no rows"),
                                             ("round,sender,receiver,bandwidth,latency\n0,0,99,1,1", "a peer that is none"),
                                             ("round,sender,receiver,bandwidth,latency\n0,0,1,0,1", "bandwidth = 0.0 is not")])
    def test_a_trace_that_is_none_is_refused(self, tmp_path, text, words):
        (tmp_path / "trace.csv").write_text(text)
        with pytest.raises(ValueError, match=f"network.path.*{words}"):
            heads(network=("trace", {"path": str(tmp_path / "trace.csv")}))

    @pytest.mark.parametrize("params, words", [({"bandwidth": 0}, "network.bandwidth = 0"), ({"latency": -1}, "network.latency = -1"),
                                               ({"compute": [1.0]}, "network.compute has 1 numbers for 10 peers")])
    def test_links_that_cannot_be_are_refused(self, params, words):
        with pytest.raises(ValueError, match=words):
            heads(network=("links", params))

    def test_a_link_without_a_row_is_named(self, tmp_path):
        (tmp_path / "trace.csv").write_text("round,sender,receiver,bandwidth,latency\n5,0,1,1,1")
        network = NETWORKS["trace"](path=str(tmp_path / "trace.csv"))
        with pytest.raises(ValueError, match="no row for the link from peer 0 to 1 in round 3"):
            network.seconds(Link(0, 1, 3, 0), 10)

    def test_the_clock_changes_no_number_and_goes_on_after_a_stop(self):
        runs = {}
        for network in (("none",), ("links",)):
            heart, x = heads(network=network)
            for t in range(4):
                report = heart.round(t, x)
            runs[network[0]] = x
        assert torch.equal(runs["none"], runs["links"])
        again, y = heads(network=("links",))
        again.restore(heart.state)
        assert again.round(4, y).ledger[0].seconds > report.ledger[0].seconds

    def test_bandwidth_that_is_measured_sets_the_threshold(self):
        """The peer whose links are a hundred times slower speaks less; the message's own size and the latency count."""
        bandwidth = np.full((PEERS, PEERS), 1e4)
        bandwidth[:, 0] = 1e2
        heart, x = heads(network=("links", {"bandwidth": bandwidth.tolist(), "latency": 0.0}),
                         trigger=("efhc", {"r": 1e3, "bandwidth": "measured", "least": 10.0, "most": 1e5}))
        spoke = np.zeros(PEERS)
        for t in range(30):
            x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
            spoke += [one.broadcasts for one in heart.round(t, x).ledger.values()]
        assert float(heart.state["clock"]["0"]["bandwidth"]) == pytest.approx(1e2)
        assert float(heart.state["clock"]["5"]["bandwidth"]) == pytest.approx(1e4)
        assert spoke[0] < spoke[1:].min()


def test_products_of_factors_may_lose_segments_too():
    """Not only rows that are averaged as they are: what stands for lost numbers is filled before any rule sees it."""
    case = Case("decaf", slots={"channel": Choice("segments", {"rate": 0.5, "count": 5})})
    x = start_rows(case)
    report = case.gossip(x).round(0, x)
    assert x.isfinite().all() and report.mixed == tuple(range(NUM))
