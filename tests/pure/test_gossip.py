"""One exchange: what is refused before it can do harm, and what that leaves the others with."""

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import Case, start_rows
from one_round import build, gossip

import topologies
from dfl import methods
from dfl.adapters.common import digest_of_common
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.engine import timing
from dfl.engine.gossip import Gossip
from dfl.methods import Choice
from dfl.transport import InProcess, edges_of
from dfl.transport.base import links_of

NUM = 5
LAYOUT = make_layout([("q", 2, 7, 5, 1.0), ("o", 2, 4, 9, 2.0)])
WANT_AN_ADAPTER = {"fed_sb", "ravan", "dora", "hira", "task_bank"}
EVERY = [name for name in methods.METHODS if name not in WANT_AN_ADAPTER | {"local"}]


def rows():
    x = empty_rows(NUM, LAYOUT.size)
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    x[:, LAYOUT.groups["A"]] = x[0, LAYOUT.groups["A"]]  # common, for the rules that freeze it
    return x


class Spoiled(InProcess):
    """A medium in which every number of peer `sender`'s message becomes `value` on its way to others."""

    def __init__(self, sender, value):
        self.sender, self.value = sender, value

    def exchange(self, *given):
        arrived = super().exchange(*given)
        for inbox in arrived.values():
            if self.sender in inbox:
                payload = {name: torch.full_like(part.view(torch.float32), self.value).view(torch.uint8)
                           for name, part in inbox[self.sender].payload.items()}
                inbox[self.sender] = inbox[self.sender]._replace(payload=payload)
        return arrived


def mix(name, transport, w, x, guard="norm"):
    rule, out = build(name, LAYOUT, slots={"guard": guard}, **({"T": 1} if name == "tad" else {})), x.clone()
    states = [rule.init(row) for row in x]
    traffic = gossip(rule, out, states, w, 0, transport=transport)
    return out, states, traffic


def test_what_has_to_stay_equal_at_both_ends_ends_where_a_message_is_refused():
    with pytest.raises(ValueError, match="peer 0 rejected what peer 2 sent, which 'fedex_choco'"):
        mix("fedex_choco", Spoiled(2, float("nan")), topologies.build("complete", NUM).matrix(0), rows())


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in EVERY if name != "fedex_choco"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_message_that_is_not_finite_is_refused_and_counted(name, value):
    """As if the link were not there: its weight stays with the receiver. No QR or SVD ever sees it."""
    w = topologies.build("complete", NUM).matrix(0)
    x = rows()
    out, states, traffic = mix(name, Spoiled(2, value), w, x)
    assert out.isfinite().all() and len(traffic.rejected) == NUM - 1
    assert all(value.isfinite().all() for state in states for value in state.values() if value.is_floating_point())
    without = w.copy()
    for i in range(NUM):
        if i != 2:
            without[i, i], without[i, 2] = without[i, i] + without[i, 2], 0.0
    expected, _, clean = mix(name, InProcess(), without, x)
    assert clean.rejected == ()
    receivers = [i for i in range(NUM) if i != 2]
    torch.testing.assert_close(out[receivers], expected[receivers], rtol=0, atol=1e-6)


def test_large_numbers_are_numbers():
    x = rows()
    x[3] *= 1e10
    out, _, traffic = mix("decaf", InProcess(), topologies.build("ring", NUM).matrix(0), x, guard="finite")
    assert out.isfinite().all() and traffic.rejected == ()


def test_who_has_diverged_itself_keeps_its_row():
    x = rows()
    x[2, 0] = float("nan")
    out, _, traffic = mix("decaf", InProcess(), topologies.build("ring", NUM).matrix(0), x)
    assert len(traffic.rejected) == 2 and torch.equal(out[2].isnan(), x[2].isnan())
    assert out[[0, 1, 3, 4]].isfinite().all()


class Other(InProcess):
    """A medium that brings what a peer with another common A has sent."""

    def exchange(self, *given):
        arrived = super().exchange(*given)
        arrived[1][2].meta["common"] += 1
        return arrived


def test_frozen_factors_that_differ_are_a_type_error():
    rule, x, a = build("ffa", LAYOUT), rows(), frozenset({"A"})
    tag = digest_of_common(a, LAYOUT, x)
    assert 0 < tag < 2**32 and tag == digest_of_common(a, LAYOUT, x[:1])
    with pytest.raises(TypeError, match="peer 2 sent a message that belongs to .* what all share .A.: all must start from the same"):
        gossip(rule, x.clone(), [{}] * NUM, np.full((NUM, NUM), 1 / NUM), 0, transport=Other(), common=True)
    x[3, 0] += 1
    with pytest.raises(TypeError, match="2 different A"):
        gossip(rule, x.clone(), [{}] * NUM, np.full((NUM, NUM), 1 / NUM), 0, common=True)
    assert digest_of_common(a, LAYOUT, x[3:4]) != tag
    assert digest_of_common(frozenset(), LAYOUT, x) == 0


def models(name, codec):
    """The models after one round on a ring, residuals included: (N, sum O I)."""
    x = rows()
    rule = build(name, LAYOUT, slots={"codec": codec}, **({"T": 1} if name == "tad" else {}))
    states = [rule.init(row) for row in x]
    gossip(rule, x, states, topologies.build("ring", NUM).matrix(0), 0)
    whole = [(x, LAYOUT)] + ([(torch.stack([s["residual"] for s in states]), rule.residual)] if rule.residual else [])
    return sum(torch.cat([p.scaling * (b_view(r, p) @ a_view(r, p)).flatten(1) for p in layout.pairs], 1) for r, layout in whole)


@pytest.mark.parametrize("name", EVERY)
def test_half_the_bytes_are_a_hundredth_off_at_most(name):
    exact, rounded = models(name, "none"), models(name, "float16")
    assert float((rounded - exact).norm()) <= 1e-2 * float(exact.norm())
    assert name == "flora" or not torch.equal(rounded, exact)


# numbers of a message for R = 2 and layers of 7 -> 5 and 4 -> 9: sums of R I and R O
IN, OUT = 2 * (7 + 4), 2 * (5 + 9)
NUMBERS = {"ffa": OUT, "rolora": OUT, "fed_svd": OUT, "share_a": IN, "plora": (IN + OUT) // 2}
META = {"fedhl": 2 * 8}  # bytes of integers: the ranks of both layers


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("fedask", "florist", "hetlora", "lora_a2", "salf")])
def test_bytes_are_the_closed_form(name):
    """The others' messages depend on their sketches, on the slots in use or on who is late."""
    _, _, traffic = mix(name, InProcess(), topologies.build("ring", NUM).matrix(0), rows())
    assert traffic.message_bytes == 2 * NUM * (4 * NUMBERS.get(name, IN + OUT) + META.get(name, 0))


def test_weights_by_sample_size_converge_to_the_weighted_mean():
    """Hastings weights for the numbers of examples: FFA's B ends at sum_j n_j B_j / sum_j n_j, not at the plain mean."""
    sizes = [10, 20, 30, 40, 100]
    w = topologies.build("ring", NUM, weights={"rule": "target", "mass": sizes}).matrix(0)
    x = rows().double()
    start, rule = x.clone(), build("ffa", LAYOUT)
    for t in range(300):
        gossip(rule, x, [{}] * NUM, w, t)
    b = LAYOUT.groups["B"]
    expected = (torch.tensor(sizes, dtype=torch.float64) / sum(sizes)) @ start[:, b]
    torch.testing.assert_close(x[:, b], expected.expand(NUM, -1), rtol=0, atol=1e-9)
    assert (expected - start[:, b].mean(0)).abs().max() > 0.1


class TestGuard:
    """Five peers in a ring; peer 2 sends its message times a factor."""

    W = topologies.build("ring", NUM).matrix(0)

    def mixed(self, name, factor, guard="norm", x=None, medium=None):
        change = lambda packet: times(packet, factor)  # noqa: E731
        rule = build(name, LAYOUT, slots={"guard": guard}, **({"T": 1} if name == "tad" else {}))
        out = (rows() if x is None else x).clone()
        states = [rule.init(row) for row in out]
        traffic = gossip(rule, out, states, self.W, 0, transport=Changed(medium or change))
        return out, list(traffic.rejected)

    # fedex_choco's copies need every message; a sketch of a product is as large as the product
    @pytest.mark.parametrize("name", [name for name in EVERY if name not in ("flora", "fedex_choco")])
    @pytest.mark.parametrize("factor", [1e30, -100.0, 1e5])
    def test_absurd_values_are_rejected_and_their_sender_is_known(self, name, factor):
        out, rejected = self.mixed(name, factor)
        assert rejected == [(1, 2), (3, 2)]
        without = self.W.copy()
        for i in (1, 3):
            without[i, i], without[i, 2] = without[i, i] + without[i, 2], 0.0
        expected, _, _ = mix(name, InProcess(), without, rows())
        torch.testing.assert_close(out[[1, 3]], expected[[1, 3]], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", EVERY)
    @pytest.mark.parametrize("factor", [1.0, -1.0, 10.0])
    def test_what_may_be_honest_passes(self, name, factor):
        assert self.mixed(name, factor)[1] == []

    def test_off_means_only_what_is_not_finite(self):
        out, rejected = self.mixed("lora", -100.0, guard="finite")
        assert rejected == [] and out[1].abs().max() > 30
        assert self.mixed("lora", float("nan"), guard="finite")[1] == [(1, 2), (3, 2)]

    def test_each_factor_is_judged_by_itself(self):
        """B is small beside A: a hundred times as much of it would hide in the norm of both."""
        x = rows()
        x[:, LAYOUT.groups["B"]] *= 0.05

        assert self.mixed("decaf", 1, x=x, medium=lambda packet: times(packet, -100, ["B"]))[1] == [(1, 2), (3, 2)]

    def test_a_peer_that_begins_at_zero_hears_those_that_have_learnt(self):
        x = rows() * 0.3
        x[1, LAYOUT.groups["B"]] = 0
        assert self.mixed("ffa", 1, x=x)[1] == []
        x[1] = 0  # nothing to compare with
        assert self.mixed("lora", 1, x=x)[1] == []

    @pytest.mark.parametrize("ranks", [[9, 2], [-1, 2], [1, 2], [2], [2, 2, 2]])
    def test_ranks_that_are_none_are_rejected(self, ranks):
        rule, x = build("decaf", LAYOUT, ranks=(2,) * NUM), rows()
        other = Changed(lambda packet: packet._replace(meta={"ranks": torch.tensor(ranks)}))
        traffic = gossip(rule, x, [rule.init(row) for row in x], self.W, 0, transport=other)
        assert traffic.rejected == ((1, 2), (3, 2)) and x.isfinite().all()

    @pytest.mark.parametrize("name", ["florist", "lora", "lora_a2", "plora", "fedask"])
    @pytest.mark.parametrize("cut", [1, 4])
    def test_bytes_that_are_no_numbers_or_too_few_are_rejected(self, name, cut):
        def shorter(packet):
            name, *_ = packet.payload
            return packet._replace(payload={**packet.payload, name: packet.payload[name][:-cut]})
        assert self.mixed(name, 1, medium=shorter)[1] == [(1, 2), (3, 2)]

    @pytest.mark.parametrize("slots", [[0, 99], [0, 0], [-1, 2]])
    def test_slots_that_are_none_are_rejected(self, slots):
        rule, x = build("lora_a2", LAYOUT, keep=0.5), rows()
        other = Changed(lambda packet: packet._replace(meta={"slots": torch.tensor(slots)}))
        assert gossip(rule, x, [rule.init(row) for row in x], self.W, 0, transport=other).rejected == ((1, 2), (3, 2))

    def test_parts_that_are_missing_are_rejected(self):
        other = Changed(lambda packet: packet._replace(payload={"A": packet.payload["A"]}, numel={"A": packet.numel["A"]}))
        rule, x = build("decaf", LAYOUT), rows()
        assert gossip(rule, x, [rule.init(row) for row in x], self.W, 0, transport=other).rejected == ((1, 2), (3, 2))


class Changed(InProcess):
    """A medium that changes what peer 2 has sent to others."""

    def __init__(self, change):
        self.change = change

    def exchange(self, *given):
        arrived = super().exchange(*given)
        return {i: {j: self.change(packet) if j == 2 else packet for j, packet in inbox.items()} for i, inbox in arrived.items()}


def times(packet, factor, names=None):
    payload = {name: (data.view(torch.float32) * factor).view(torch.uint8) if names is None or name in names else data
               for name, data in packet.payload.items()}
    return packet._replace(payload=payload)


def test_it_goes_when_nobody_has_it_any_more():
    """Without a garbage collection: connections and a store go with it, whose ends have to come in their order."""
    case = Case("lora")
    heart = case.gossip(start_rows(case))
    gone = weakref.ref(heart)
    gc.disable()
    try:
        del heart
        assert gone() is None
    finally:
        gc.enable()


def test_seconds_of_a_phase_are_not_those_of_work_on_a_gpu_that_was_begun_before(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert timing.now(SimpleNamespace(is_cuda=True, device="cuda:1")) <= timing.now(torch.zeros(1))
    assert waited == ["cuda:1"]


class RowsAlone:
    """A topology without its matrices."""

    def __init__(self, topology):
        self.topology, self.num_peers = topology, topology.num_peers

    def neighbors(self, t, i):
        return self.topology.neighbors(t, i)

    def receivers(self, t, j):
        return self.topology.receivers(t, j)


@pytest.mark.parametrize("slots", [{}, {"trigger": "event"}, {"channel": Choice("lossy", {"rate": 0.3})}, {"codec": "top_k"},
                                   {"wrapper": "gradient_tracking"}, {"trigger": Choice("periodic", {"every": 2})}], ids=str)
def test_a_round_and_the_handshake_ask_for_rows_of_w_alone(slots):
    """Many peers elsewhere cost a process nothing: there is no table of all pairs."""
    graph = topologies.build("ring", NUM)
    built = methods.build("lora", methods.Context(LAYOUT, topology=graph, peers=NUM), {}, {
        slot: Choice(one) if isinstance(one, str) else one for slot, one in slots.items()})
    x = rows()
    heart = Gossip(built, LAYOUT, RowsAlone(graph), InProcess(), range(NUM), x)
    for t in range(3):
        heart.round(t, x, lr=0.1, local_steps=1)
    for name, params in (("ring", {}), ("edge_activation", {"p": 0.4}), ("exponential", {})):
        made = topologies.build(name, 9, **params)
        for t in range(3):
            assert links_of(RowsAlone(made), t) == edges_of(made.matrix(t))
