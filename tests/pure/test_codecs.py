"""Codecs that round: no rule loses training to them, and the means that a rule keeps stay kept."""

from functools import cache

import pytest
import torch
from cases import CODEC_SETTINGS, NUM, ROUNDS, Case, codec_refusal, lora
from one_round import build, gossip

import topologies
from dfl import methods
from dfl.adapters.layout import empty_rows, make_layout
from dfl.codecs import CODECS
from dfl.codecs.rounding import rounded_at_random
from dfl.engine.gossip import Gossip
from dfl.transport import InProcess

GAIN = 1e-3
ROUND = ["bfloat16", "float16", "int8", "int4"]  # every message resembles what was to be said
lossy = pytest.mark.parametrize("codec", ROUND)
every_setting = pytest.mark.parametrize("codec", CODEC_SETTINGS)


@cache
def train(name: str, codec: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean model before and after rounds in which every number that is trained gains GAIN.

    A rule that turns the factors has one slot: the frame of an unused one is noise, and noise decides where its gain goes. `flora`,
    whose messages hold the progress of one round alone, begins at zero.
    """
    rank = 1 if Case(name).rule.changes_basis or name == "fed_svd" else 2
    case = Case(name, rank, slots={"codec": CODEC_SETTINGS.get(codec, codec)})
    x = empty_rows(NUM, case.layout.size)
    x.fill_(0.0 if name == "flora" else 0.75)
    heart = case.gossip(x)
    before = case.mean_model(x, states_of(heart))
    for t in range(ROUNDS):
        for cut in case.layout.columns(case.rule.trains(t)):
            x[:, cut] += GAIN
        heart.round(t, x)
    return before, case.mean_model(x, states_of(heart))


def states_of(heart: Gossip) -> list[dict]:
    return [heart.state["rule"][str(peer)] for peer in range(NUM)]


@pytest.mark.long
@pytest.mark.parametrize("codec", [*ROUND, "top_k", "qsgd"])
@pytest.mark.parametrize("name", sorted(set(methods.METHODS) - {"task_bank"}))  # whose own adapter no message touches
def test_small_steps_add_up_as_without_a_codec(name, codec):
    """A round moves each number by a quarter of the distance of two bfloat16 numbers: rounded means would stay for ever."""
    if codec_refusal(name, codec):
        return  # tests/pure/test_grid.py
    before, exact = train(name, "none")
    _, rounded = train(name, codec)
    progress = exact - before
    assert progress.norm() > 0.04 * before.norm()
    along = float((rounded - before) @ progress / progress.square().sum())
    # coefficients that are fitted to what arrived move with it
    coarse = name == "flora_na" and codec in ("int4", "top_k")
    assert along == pytest.approx(1, abs=0.1 if coarse else 0.05), along
    assert (rounded - exact).norm() < (0.12 if coarse else 0.1) * progress.norm()


def start_rows(layout) -> torch.Tensor:
    x = empty_rows(NUM, layout.size, dtype=torch.float64)
    x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    if layout.has("A"):  # common, for the rules that freeze it
        x[:, layout.groups["A"]] = x[0, layout.groups["A"]]
    return x


def mixed(case: Case, rounds: int):
    """Rows and states before and after rounds without training."""
    x = start_rows(case.layout)
    heart = case.gossip(x)
    before, states_before = x.clone(), states_of(heart)
    for t in range(rounds):
        heart.round(t, x)
    return before, states_before, x, states_of(heart)


@pytest.mark.long
@every_setting
@pytest.mark.parametrize("name", ["lora", "ffa", "share_a", "rolora", "adf", "tad", "replicate", "fed_sb", "fedex", "lora_fair"])
def test_the_mean_of_the_factors_is_kept_under_every_codec(name, codec):
    if codec_refusal(name, codec):
        return
    case = Case(name, slots={"codec": CODEC_SETTINGS[codec]})
    before, _, x, _ = mixed(case, 40)
    for cut in case.layout.columns({"lora_fair": {"A"}}.get(name, {"A", "B", "core"})):
        torch.testing.assert_close(x[:, cut].mean(0), before[:, cut].mean(0), rtol=0, atol=1e-12)
    if name not in ("lora_fair", "share_a"):  # and the peers agree, up to the distance of two numbers
        bound = 0.02 if codec in ("bfloat16", "float16", "int8", "int8 random") else 0.8
        assert (x - x.mean(0)).norm() < bound * (before - before.mean(0)).norm()


@lossy
@pytest.mark.parametrize("name, tolerance", [("fedhl", 1e-12), ("fedex", 1e-12), ("decaf", 2e-3), ("carry", 2e-3)])
def test_the_mean_model_is_kept_under_every_codec(name, tolerance, codec):
    """A is common, so that the mean product has the rank of one; `decaf` and `carry` cut what rounding A adds to it."""
    case = Case(name, slots={"codec": codec})
    if codec == "int4" and tolerance > 1e-3:  # sixteen times as coarse as eight bits
        tolerance *= 16
    before, states_before, x, states = mixed(case, 10)
    before, after = case.mean_model(before, states_before), case.mean_model(x, states)
    assert (after - before).norm() < tolerance * before.norm()


@lossy
def test_the_mean_of_sketches_is_kept_under_every_codec(codec):
    case = Case("fedask", slots={"codec": codec})
    _, states_before, _, states = mixed(case, 10)
    before, after = (torch.stack([s["sketch"] for s in of]).mean(0) for of in (states_before, states))
    assert (after - before).norm() < 1e-12 * before.norm()


class TestRoundedAtRandom:
    @pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("value", [0.7512, -0.7512, 1 - 2e-4, 1.0007, -1e-7, 2e-8, 3.3e-5, 123.456, 60001.0, -3e-40])
    def test_the_mean_is_the_value(self, wire, value):
        if wire == torch.float16 and value == -3e-40:
            value = -3e-9
        values = torch.full((200_000,), value)
        draws = rounded_at_random(values, wire, torch.Generator().manual_seed(0)).double()
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
            found = rounded_at_random(values.float(), wire, torch.Generator().manual_seed(seed))
            assert torch.equal(found, values)

    def test_too_large_numbers_travel_as_the_largest(self):
        codec = CODECS["float16"]()
        for key in (None, 7):
            data, _ = codec.encode({"A": torch.tensor([1e6, -1e6])}, {}, key)
            assert codec.decode("A", data["A"], 2, torch.float32).tolist() == [65504.0, -65504.0]

    def test_draws_depend_on_peer_round_and_seed(self):
        def after(t, seed):
            case = Case("hetlora", slots={"codec": "bfloat16"}, seed=seed)
            x = start_rows(case.layout)
            x[:] = x[0]
            case.gossip(x).round(t, x)
            return x
        assert torch.equal(after(3, 1), after(3, 1))
        assert not torch.equal(after(3, 1), after(4, 1)) and not torch.equal(after(3, 1), after(3, 2))
        assert not torch.equal(after(3, 1)[0], after(3, 1)[1])  # equal peers draw apart


@lossy
def test_ranks_are_not_rounded(codec):
    """No bfloat16 is 257, and no float16 2049: integers travel beside the parts."""
    big = 2049 if codec == "float16" else 257
    layout = make_layout([("q", big, 3, 3, 1.0)])
    rule = build("decaf", layout, ranks=(big, 1), slots={"codec": codec})
    x = empty_rows(2, layout.size)
    x[0] = 0.5
    found = {}

    class Look(InProcess):
        def exchange(self, t, packets, *given):
            found.update(packets)
            return super().exchange(t, packets, *given)

    states = [rule.init(row) for row in x]
    gossip(rule, x, states, topologies.build("complete", 2).matrix(0), 0, transport=Look())
    assert found[0].meta["ranks"].tolist() == [big] and found[1].meta["ranks"].tolist() == [1]
    assert found[0].numel == {"A": 3 * big, "B": 3 * big} and found[1].numel == {"A": 3, "B": 3}


def test_numbers_of_slots_are_not_rounded():
    message = build("lora_a2", lora(2), keep=0.5).message(torch.randn(lora(2).size))
    assert message.meta["slots"].dtype == torch.int64 and len(message.meta["slots"]) == 2
