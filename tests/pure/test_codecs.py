"""Codecs that round: no rule loses training to them, and the means that a rule keeps stay kept."""

from functools import cache

import pytest
import torch

import topologies
from dfl import codecs, rules
from dfl.cores import expand, make_cores
from dfl.factors import a_view, b_view, empty_rows, make_layout
from dfl.gossip import gossip
from dfl.rules.pairs import Slots
from dfl.transport import InProcess

NUM, ROUNDS, GAIN = 4, 60, 1e-3
SIZES = [("q", 7, 5, 1.0), ("o", 4, 9, 2.0)]
LOSSY = [name for name in codecs.CODECS if name != "none"]
lossy = pytest.mark.parametrize("codec", LOSSY)
# what a rule needs beside its name, as (graph, parameters)
WANTS = {"tad": ("ring", {"T": 1}), "flora": ("complete", {}), "fedask": ("ring", {"memory": True})}


def lora(rank: int, **others):
    return make_layout([(name, rank, d_in, d_out, scaling) for name, d_in, d_out, scaling in SIZES], **others)


class Case:
    """A rule on rows of its own kind of adapter, its graph, and the model that the rows make."""

    def __init__(self, name: str, rank: int = 2):
        graph, params = WANTS.get(name, ("ring", {}))
        self.lora = self.layout = lora(rank)
        self.cores = None
        if name in ("fed_sb", "ravan"):
            self.cores = make_cores(self.lora, [], seed=0, heads=1 + (name == "ravan"), scaled=name == "ravan")
            self.layout = self.cores.layout
        elif name in ("dora", "hira"):
            self.layout = lora(rank, magnitudes=[("q", (5,)), ("o", (9,))] if name == "dora" else ())
            generator = torch.Generator().manual_seed(5)
            params = {"weights": {key: 1 + 0.1 * torch.rand(d_out, d_in, generator=generator) for key, d_in, d_out, _ in SIZES}}
        self.rule = rules.build(name, self.layout, **params)
        self.topology = topologies.build(graph, NUM)

    def gossip(self, codec: str, x, states, t: int, **options):
        return gossip(self.rule, codecs.build(codec), InProcess(), x, range(NUM), states, self.topology.matrix(t), t, **options)

    def mean_model(self, x, states) -> torch.Tensor:
        """The mean of the peers' products, residuals included."""
        factors = x
        if self.cores:
            expand(self.cores, x, factors := empty_rows(len(x), self.lora.size))
        parts = [(factors, self.lora)]
        if self.rule.residual:
            parts.append((torch.stack([s["residual"] for s in states]), self.rule.residual))
        return sum(torch.cat([p.scaling * (b_view(r, p) @ a_view(r, p)).flatten(1) for p in layout.pairs], 1)
                   for r, layout in parts).mean(0)


@cache
def train(name: str, codec: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean model before and after rounds in which every number that is trained gains GAIN.

    A rule that turns the factors has one slot: the frame of an unused one is noise, and noise decides where its gain goes. `flora`,
    whose messages hold the progress of one round alone, begins at zero.
    """
    case = Case(name, 1 if Case(name).rule.changes_basis or name == "fed_svd" else 2)
    x = empty_rows(NUM, case.layout.size)
    x.fill_(0.0 if name == "flora" else 0.75)
    states = [case.rule.init(row) for row in x]
    before = case.mean_model(x, states)
    for t in range(ROUNDS):
        for cut in case.layout.columns(case.rule.trains(t)):
            x[:, cut] += GAIN
        case.gossip(codec, x, states, t)
    return before, case.mean_model(x, states)


@lossy
@pytest.mark.parametrize("name", rules.RULES)
def test_small_steps_add_up_as_without_a_codec(name, codec):
    """A round moves each number by a quarter of the distance of two bfloat16 numbers: rounded means would stay for ever."""
    before, exact = train(name, "none")
    _, rounded = train(name, codec)
    progress = exact - before
    assert progress.norm() > 0.04 * before.norm()
    along = float((rounded - before) @ progress / progress.square().sum())
    assert along == pytest.approx(1, abs=0.05), along
    assert (rounded - exact).norm() < 0.1 * progress.norm()


def start_rows(layout) -> torch.Tensor:
    x = empty_rows(NUM, layout.size, dtype=torch.float64)
    x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    if layout.has("A"):  # common, for the rules that freeze it
        x[:, layout.groups["A"]] = x[0, layout.groups["A"]]
    return x


def mixed(case: Case, codec: str, rounds: int):
    """Rows and states before and after rounds without training."""
    x = start_rows(case.layout)
    states = [case.rule.init(row) for row in x]
    before, states_before = x.clone(), list(states)
    for t in range(rounds):
        case.gossip(codec, x, states, t)
    return before, states_before, x, states


@lossy
@pytest.mark.parametrize("name", ["lora", "ffa", "share_a", "rolora", "adf", "tad", "ps", "replicate", "fed_sb", "fedex", "lora_fair"])
def test_the_mean_of_the_factors_is_kept_under_every_codec(name, codec):
    case = Case(name)
    before, _, x, _ = mixed(case, codec, 40)
    for cut in case.layout.columns({"lora_fair": {"A"}}.get(name, {"A", "B", "core"})):
        torch.testing.assert_close(x[:, cut].mean(0), before[:, cut].mean(0), rtol=0, atol=1e-12)
    if name not in ("lora_fair", "share_a"):  # and the peers agree, up to the distance of two numbers
        assert (x - x.mean(0)).norm() < 0.02 * x.norm()


@lossy
@pytest.mark.parametrize("name, tolerance", [("fedhl", 1e-12), ("fedex", 1e-12), ("decaf", 2e-3), ("carry", 2e-3)])
def test_the_mean_model_is_kept_under_every_codec(name, tolerance, codec):
    """A is common, so that the mean product has the rank of one; `decaf` and `carry` cut what rounding A adds to it."""
    case = Case(name)
    before, states_before, x, states = mixed(case, codec, 10)
    before, after = case.mean_model(before, states_before), case.mean_model(x, states)
    assert (after - before).norm() < tolerance * before.norm()


@lossy
def test_the_mean_of_sketches_is_kept_under_every_codec(codec):
    case = Case("fedask")
    _, states_before, _, states = mixed(case, codec, 10)
    before, after = (torch.stack([s["sketch"] for s in of]).mean(0) for of in (states_before, states))
    assert (after - before).norm() < 1e-12 * before.norm()


class TestRoundedAtRandom:
    @pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("value", [0.7512, -0.7512, 1 - 2e-4, 1.0007, -1e-7, 2e-8, 3.3e-5, 123.456, 60001.0, -3e-40])
    def test_the_mean_is_the_value(self, wire, value):
        if wire == torch.float16 and value == -3e-40:
            value = -3e-9
        values = torch.full((200_000,), value)
        draws = codecs.rounded_at_random(values, wire, torch.Generator().manual_seed(0)).double()
        low, high = draws.min(), draws.max()
        assert low <= value <= high and len(draws.unique()) == 2  # the two numbers beside it
        between = torch.nextafter(low.float(), high.float()).to(wire)
        assert between in (low, high)
        assert float((draws.mean() - value).abs()) < 5 * float(high - low) / 200_000 ** 0.5

    @pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
    def test_what_the_type_holds_stays(self, wire):
        limits = torch.finfo(wire)
        values = torch.tensor([0.0, -0.0, 1.0, -0.75, 2.0, limits.max, -limits.max, limits.tiny, limits.smallest_normal], dtype=wire)
        for seed in range(20):
            found = codecs.rounded_at_random(values.float(), wire, torch.Generator().manual_seed(seed))
            assert torch.equal(found, values)

    def test_too_large_numbers_travel_as_the_largest(self):
        codec = codecs.build("float16")
        data = codec.unbiased(torch.tensor([1e6, -1e6]), torch.Generator().manual_seed(0))
        assert codec.decode(data, torch.float32).tolist() == [65504.0, -65504.0]

    def test_draws_depend_on_peer_round_and_seed(self):
        def after(t, seed):
            case = Case("hetlora")
            x = start_rows(case.layout)
            x[:] = x[0]
            case.gossip("bfloat16", x, [{}] * NUM, t, seed=seed)
            return x
        assert torch.equal(after(3, 1), after(3, 1))
        assert not torch.equal(after(3, 1), after(4, 1)) and not torch.equal(after(3, 1), after(3, 2))
        assert not torch.equal(after(3, 1)[0], after(3, 1)[1])  # equal peers draw apart


@lossy
def test_ranks_are_not_rounded(codec):
    """No bfloat16 is 257, and no float16 2049."""
    big = 2049 if codec == "float16" else 257
    layout = make_layout([("q", big, 3, 3, 1.0)])
    rule = rules.build("decaf", layout, ranks=(big, 1))
    x = empty_rows(2, layout.size)
    x[0] = 0.5
    found = {}

    class Look(InProcess):
        def exchange(self, t, outbox, edges, size, tag=0):
            found.update(outbox)
            return super().exchange(t, outbox, edges, size, tag)

    states = [rule.init(row) for row in x]
    gossip(rule, codecs.build(codec), Look(), x, range(2), states, topologies.build("complete", 2).matrix(0), 0)
    assert rule.integers == 1 and found[0][:4].view(torch.float32).item() == big
    assert len(found[0]) == 4 + 2 * 6 * big
    assert Slots(layout).unpack(torch.cat([torch.tensor([float(big)]), torch.zeros(6 * big)])).shape == (6 * big,)


def test_marks_of_slots_are_not_rounded():
    rule = rules.build("lora_a2", lora(2), keep=0.5)
    assert rule.integers == 4 and rules.build("florist", lora(2)).integers == 2 and rules.build("decaf", lora(2)).integers == 0
