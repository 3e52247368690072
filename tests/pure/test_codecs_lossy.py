"""Codecs that leave out most of a message: bytes by closed forms, what they promise of it, copies that stay equal, steps."""

import math

import numpy as np
import pytest
import torch
from cases import CODEC_SETTINGS, DIFFERENCES, Case, start_rows

import topologies
from dfl import methods, simulate
from dfl.adapters.layout import empty_rows, make_layout
from dfl.codecs import CODECS
from dfl.codecs import step as steps
from dfl.codecs.bits import bits_for, pack_bits, unpack_bits
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, Context
from dfl.transport import InProcess

M = 1000
RING = topologies.build("ring", 8)
LAYOUT = make_layout([("q", 4, 30, 20, 1.0), ("o", 4, 30, 20, 1.0), ("v", 2, 9, 40, 1.0)], head=[("w", (3, 50)), ("b", (3,))])


def values(seed: int = 0, numel: int = M) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def through(codec, part: torch.Tensor, key: int = 7, name: str = "A") -> torch.Tensor:
    """What arrives of a first message, as a codec without differences has it."""
    data, _ = codec.encode({name: part}, {}, key)
    return codec.decode(name, data[name], part.numel(), part.dtype)


def second(codec, part: torch.Tensor, key: int = 7, name: str = "A") -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes and the copy after a second message that differs from the first, which is zero, by `part`."""
    first, state = codec.encode({name: torch.zeros_like(part)}, {}, 1)
    copy = codec.update(name, first[name], None, part.numel(), part.dtype)
    data, state = codec.encode({name: part}, state, key)
    copy = codec.update(name, data[name], copy, part.numel(), part.dtype)
    assert torch.equal(copy, state[name])
    return data[name], copy


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [1, 7, 8, 1001])
def test_numbers_of_a_few_bits_come_back(bits, numel):
    numbers = torch.randint(0, 2**bits, (numel,), generator=torch.Generator().manual_seed(0))
    data = pack_bits(numbers, bits)
    assert data.dtype == torch.uint8 and len(data) == math.ceil(numel * bits / 8)
    assert torch.equal(unpack_bits(data, bits, numel).long(), numbers)
    with pytest.raises(ValueError, match="are not"):
        unpack_bits(data, bits, numel + 8)
    assert bits_for(2**bits) == bits


# bytes of M = 1000 numbers: values, then places, signs or levels, then scales and seeds
BYTES = [("int8", {}, 1000 + 4 * 4), ("int4", {}, 500 + 4 * 16), ("qsgd", {}, 750 + 4 * 4),
         ("qsgd", {"levels": 3, "block": 100}, 375 + 40),
         ("sign", {}, 125 + 4 * 4), ("top_k", {"share": 0.01}, 10 * (4 + 4)), ("top_k", {"share": 0.1}, 100 * 4 + 125),
         ("random_k", {"share": 0.1}, 8 + 100 * 4), ("bfloat16", {}, 2000)]


@pytest.mark.parametrize("name, params, expected", BYTES)
def test_bytes_are_the_closed_form(name, params, expected):
    codec = CODECS[name](**params)
    if codec.update is None:
        data = codec.encode({"A": values()}, {}, 7)[0]["A"]
    else:
        assert codec.encode({"A": values()}, {}, 7)[0]["A"].nbytes == 4 * M  # the first message is full
        data, _ = second(codec, values())
    assert data.nbytes == expected


def test_the_bytes_of_directions_are_the_closed_form():
    codec = CODECS["low_rank"](layout=LAYOUT)
    lengths = {group: LAYOUT.length({group}) for group in ("A", "B", "head")}
    sent = {name: len(second(codec, values(1, numel), name=name)[0]) for name, numel in lengths.items()}
    assert sent == {"A": 4 * (2 * (4 + 30) + (2 + 9)), "B": 4 * (2 * (4 + 20) + (2 + 40)), "head": 4 * (3 + 50 + 3)}
    assert len(second(codec, values(1, 77), name="sketch")[0]) == 4 * 77  # nothing that it knows a shape of
    two = CODECS["low_rank"](layout=LAYOUT, components=2)
    assert len(second(two, values(1, lengths["A"]))[0]) == 4 * (2 * 2 * (4 + 30) + 2 * 9)  # v's A (2, 9) would not get smaller


@pytest.mark.parametrize("name, params, numbers, values_, places", [
    ("top_k", {"share": 0.05}, 10, 40, 24), ("top_k", {"share": 0.02}, 4, 16, 16),
    ("random_k", {"share": 0.05, "memory": "differences"}, 10, 40, 8), ("sign", {"block": 64}, 192, 24 + 12, 0)])
def test_the_ledger_counts_these_bytes_and_which_of_them_name_places(name, params, numbers, values_, places):
    """In a ring of four each speaks to two: the first message of twice 192 numbers in full, then what the codec makes of them."""
    layout = make_layout([("q", 4, 48, 48, 1.0)])
    method = methods.build("lora", Context(layout, topology=topologies.build("ring", 4)), {}, {"codec": Choice(name, params)})
    x = empty_rows(4, layout.size)
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    heart = Gossip(method, layout, topologies.build("ring", 4), InProcess(), range(4), x)
    first, later = (heart.round(t, x).ledger[0] for t in range(2))
    assert (first.payload_bytes, first.index_bytes, first.channel_uses) == (2 * 2 * 192 * 4, 0, 2 * 192)
    assert (later.payload_bytes, later.index_bytes, later.channel_uses) == (2 * 2 * values_, 2 * 2 * places, 2 * numbers)


# what a codec promises to leave out, of the square: normal numbers, a few very large ones, one alone
INPUTS = {"normal": values(), "heavy": values() ** 5, "one": torch.eye(M)[3]}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name, params, kept", [
    ("top_k", {"share": 0.1}, 0.1), ("random_k", {"share": 0.1, "memory": "differences"}, 0.1), ("sign", {"block": 100}, 0.01),
    ("qsgd", {"levels": 16, "block": 250}, 1 / (1 + 250 / 256)), ("qsgd", {"levels": 3, "block": 100}, 1 / (1 + 10 / 3)),
    ("low_rank", {"layout": LAYOUT}, 0.25)])
def test_what_is_left_out_shrinks_as_promised(name, params, kept, kind):
    codec, part = CODECS[name](**params), INPUTS[kind]
    part = part.repeat(2)[:LAYOUT.length({"A"})] if name == "low_rank" else part
    errors = [float((second(codec, part, key)[1] - part).square().sum() / part.square().sum()) for key in range(40)]
    assert np.mean(errors) <= (1 - kept) * (1.25 if name == "random_k" and kind != "normal" else 1.02)


@pytest.mark.long
@pytest.mark.parametrize("name, params", [("qsgd", {"memory": "none", "block": 100}),
                                          ("int8", {"memory": "none", "rounding": "random"}),
                                          ("int4", {"memory": "none", "rounding": "random"})])
def test_random_rounding_is_right_on_average(name, params):
    codec, part = CODECS[name](**params), values(numel=200)
    found = torch.stack([through(codec, part, 100 * key) for key in range(4000)])
    spread = found.std(0) / 4000**0.5
    assert float(((found.mean(0) - part).abs() / (spread + 1e-6)).max()) < 6
    assert float((found[0] - part).abs().max()) > 0


def test_signs_are_signs_and_the_largest_are_the_largest():
    part = torch.tensor([3.0, -1.0, 0.5, -4.0])
    assert second(CODECS["sign"](), part)[1].tolist() == [2.125, -2.125, 2.125, -2.125]
    assert second(CODECS["sign"](block=2), part)[1].tolist() == [2.0, -2.0, 2.25, -2.25]
    assert second(CODECS["top_k"](share=0.5), part)[1].tolist() == [3.0, 0, 0, -4.0]
    for share in (0.02, 0.3):  # by places, and by a bitmap
        found = second(CODECS["top_k"](share=share), values())[1]
        assert int((found != 0).sum()) == share * M and found.abs().max() == values().abs().max()


def test_directions_are_the_best_ones():
    part = values(1, LAYOUT.length({"B"}))
    found = second(CODECS["low_rank"](layout=LAYOUT, components=1), part, name="B")[1]
    for start, rows, columns in ((0, 20, 4), (80, 20, 4), (160, 40, 2)):
        mine, given = (x[start:start + rows * columns].view(rows, columns) for x in (found, part))
        u, s, v = torch.linalg.svd(given)
        torch.testing.assert_close(mine, s[0] * u[:, :1] @ v[:1], rtol=0, atol=1e-5)


def test_what_is_sent_at_random_is_the_same_at_all_peers_and_another_in_every_round():
    case = Case("lora", slots={"codec": CODEC_SETTINGS["random_k"]})
    seen = []

    class Look(InProcess):
        def exchange(self, t, packets, *given):
            seen.append({peer: int(packet.payload["A"][:8].clone().view(torch.int64)) for peer, packet in packets.items()})
            return super().exchange(t, packets, *given)

    x = start_rows(case)
    heart = Gossip(case.rule.method, case.layout, case.topology, Look(), range(4), x, seed=3)
    for t in range(3):
        heart.round(t, x)
    assert all(len(set(seeds.values())) == 1 for seeds in seen) and len({seeds[0] for seeds in seen}) == 3


@pytest.mark.parametrize("setting", sorted(DIFFERENCES))
@pytest.mark.parametrize("trigger", ["always", Choice("event", {"threshold": 0.3})])
def test_receivers_hold_the_copy_that_the_sender_holds(setting, trigger):
    case = Case("lora", slots={"codec": CODEC_SETTINGS[setting], "trigger": trigger})
    x = start_rows(case, apart=True)
    heart = case.gossip(x)
    for t in range(12):
        x += 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(t))
        heart.round(t, x)
        for key, copy in heart.state["received"].items():
            sender = key.partition("/")[2]
            assert all(torch.equal(copy[f"part.{name}"], heart.state["codec"][sender][name]) for name in "AB"), (t, key)
    # one tensor for all receivers of a sender, as long as nobody came back from a file
    first, second_ = (heart.state["received"][f"{i}/0"]["part.A"] for i in (1, 3))
    assert first is second_


@pytest.mark.parametrize("setting", [name for name in CODEC_SETTINGS if name not in ("bfloat16", "float16")])
@pytest.mark.parametrize("change", ["cut", "more", "ones"])
def test_bytes_that_a_codec_cannot_have_made_are_rejected(setting, change):
    case = Case("lora", slots={"codec": CODEC_SETTINGS[setting], "guard": "finite"})

    class Changed(InProcess):
        def exchange(self, t, packets, *given):
            arrived = super().exchange(t, packets, *given)
            if t == 1:
                for i in (1, 3):
                    packet = arrived[i][0]
                    data = packet.payload["A"]
                    data = {"cut": data[:-1], "more": torch.cat([data, data[:4]]), "ones": torch.full_like(data, 255)}[change]
                    arrived[i][0] = packet._replace(payload={**packet.payload, "A": data})
            return arrived

    x = start_rows(case)
    heart = Gossip(case.rule.method, case.layout, case.topology, Changed(), range(4), x)
    assert heart.round(0, x).rejected == ()
    assert heart.round(1, x).rejected == ((1, 0), (3, 0)) and x.isfinite().all()


def quadratic(codec: Choice, rounds: int, rate: float = 0.05) -> float:
    """The rms error of the yardstick: a ring of eight, f_i = a_i ||x - b_i||² / 2, 20 numbers as one part, adapt then combine."""
    layout = make_layout((), head=[("w", (20,))])
    method = methods.build("lora", Context(layout, "mixed", topology=RING), {}, {"codec": codec})
    i, k = torch.arange(8, dtype=torch.float64)[:, None], torch.arange(1, 21, dtype=torch.float64)
    a, b = 1 + i / 8, i + torch.sin(i * k)
    optimum = (a * b).sum(0) / a.sum()
    x = empty_rows(8, 20, dtype=torch.float64)
    heart = Gossip(method, layout, RING, InProcess(), range(8), x)
    for t in range(rounds):
        x -= rate * a * (x - b)
        heart.round(t, x)
    return float((x - optimum).square().mean().sqrt())


@pytest.mark.long
@pytest.mark.parametrize("codec, rounds, expected", [
    (Choice("none"), 400, 0.4279),
    (Choice("low_rank", {"components": 20, "gamma": 1.0}), 500, 0.4279),  # no compression: D-PSGD
    (Choice("top_k", {"share": 0.2, "gamma": 0.2}), 600, 1.256),
    (Choice("sign", {"gamma": 0.3}), 600, 1.036),
    (Choice("top_k", {"share": 0.2, "memory": "feedback", "gamma": 0.1}), 500, 1.69),
    (Choice("top_k", {"share": 0.2, "memory": "feedback", "gamma": 0.3}), 500, 1.90)])
def test_the_yardstick(codec, rounds, expected):
    """The known floors of D-PSGD, CHOCO and DeepSqueeze on the quadratics."""
    assert quadratic(codec, rounds) == pytest.approx(expected, rel=0.03)


@pytest.mark.long
def test_a_step_that_diverges_is_refused_and_the_one_that_is_found_is_not():
    sparse = (("top_k", {"share": 0.02}), ("random_k", {"share": 0.02, "memory": "differences"}))
    for name, params in (*sparse, ("sign", {}), ("qsgd", {}), ("sign", {"memory": "feedback"})):
        gamma = CODECS[name](**params, topology=RING).gamma
        assert 0 < gamma < 1 and CODECS[name](**params, topology=RING, gamma=gamma).gamma == gamma
    for name, params in sparse:
        with pytest.raises(ValueError, match=r"codec.gamma = 1.0 diverges on this topology.*allowed: less, such as 0\.0"):
            CODECS[name](**params, topology=RING, gamma=1.0)
    for gamma in (0, -0.1, 1.5, True, "small"):
        with pytest.raises(ValueError, match="codec.gamma = .* is not allowed"):
            CODECS["sign"](gamma=gamma)


@pytest.mark.parametrize("memory, gamma, kept", [("differences", 0.3, 0.5), ("feedback", 0.05, 0.5), ("none", 0.3, 0.4)])
def test_the_radius_is_that_of_the_moments(memory, gamma, kept):
    """One number (of two peers, lambda = 0) under all sequences of what travels: its mean square shrinks at the rate that is said."""
    x, other, share, squares = np.ones(1), np.zeros(1), np.ones(1), []
    for _ in range(18):
        if memory == "differences":
            sent, not_sent = (x - gamma * x, x), (x - gamma * other, other)
        elif memory == "feedback":
            sent, not_sent = (x - gamma * (x + other), 0 * x), (x, x + other)
        else:
            sent, not_sent = (x - gamma * x / kept, other), (x, other)
        x, other = (np.concatenate(pair) for pair in zip(sent, not_sent, strict=True))
        share = np.concatenate([kept * share, (1 - kept) * share])
        squares.append((share * x**2).sum())
    said = float(steps.radius(np.array(gamma), kept, memory, np.array(0.0)))
    assert squares[-1] / squares[-2] == pytest.approx(said, rel=0.003)


@pytest.mark.long
@pytest.mark.parametrize("setting, rounds", [("bfloat16", 1), ("int8", 1), ("qsgd", 12)])
def test_flora_na_fits_what_the_codec_lets_through(setting, rounds):
    """Its peers come closer to the mean product under a codec than plain averaging of factors does under it, or without any."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, *shape, generator=generator).double() + torch.randn(8, *shape, generator=generator).double()
            for shape in ((4, 24), (20, 4)))
    goal, graph = (b @ a).mean(0), topologies.build("complete", 8)

    def error(method: str, codec: Choice, rounds: int, **params) -> float:
        end_a, end_b = simulate(method, graph, {"q": (a, b)}, lambda *given: None, rounds, codec=codec, measure_every=0,
                                **params).factors["q"]
        return float(((end_b @ end_a) - goal).norm(dim=(1, 2)).mean() / goal.norm())

    found = error("flora_na", CODEC_SETTINGS[setting], rounds, steps=5)
    assert found < 0.99 * error("lora", CODEC_SETTINGS[setting], rounds) and found < 0.99 * error("lora", Choice("none"), 1)


@pytest.mark.parametrize("name, params, words", [
    ("top_k", {"share": 0}, "codec.share = 0 is not allowed"), ("top_k", {"memory": "none"}, "codec.memory = 'none' is not allowed"),
    ("random_k", {"memory": "feedback"}, "allowed: none, differences"), ("sign", {"block": 0}, "codec.block = 0 is not allowed"),
    ("qsgd", {"levels": 128}, "codec.levels = 128 is not allowed"), ("int4", {"memory": "none"}, "would lose every step"),
    ("int8", {"rounding": "up"}, "codec.rounding = 'up' is not allowed"), ("low_rank", {"components": 0}, "codec.components = 0")])
def test_parameters_that_are_none_are_refused(name, params, words):
    with pytest.raises(ValueError, match=words):
        CODECS[name](**params)
