"""Guards that weigh or replace messages: each against its formula written out, and against one poisoned peer in ten."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from cases import Case
from one_round import build, gossip
from toy import PEERS, Toy

import topologies
from dfl import simulate
from dfl.adapters.layout import a_view, b_view, empty_rows, make_layout
from dfl.channels import CHANNELS
from dfl.guards import GUARDS
from dfl.methods import Choice

NUM = 7
LAYOUT = make_layout([("q", 2, 7, 5, 1.0), ("o", 2, 4, 9, 2.0)], head=[("w", (6,))])
W = topologies.build("complete", NUM).matrix(0)
HASTY = np.full((NUM, NUM), 0.1) + 0.3 * np.eye(NUM)


def rows() -> torch.Tensor:
    x = empty_rows(NUM, LAYOUT.size, dtype=torch.float64)
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    x[0] *= 3
    return x


def mixed(guard: Choice, w=HASTY, x=None, method: str = "lora", **slots) -> torch.Tensor:
    built = build(method, LAYOUT, head="mixed", slots={"guard": guard, **slots})
    out = (rows() if x is None else x).clone()
    gossip(built, out, [built.init(row) for row in out], w)
    return out


def product_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    squares = 0.0
    for pair in LAYOUT.pairs:
        difference = b_view(one, pair) @ a_view(one, pair) - b_view(other, pair) @ a_view(other, pair)
        squares += float((pair.scaling * difference).square().sum())
    return (squares + float((one[LAYOUT.groups["head"]] - other[LAYOUT.groups["head"]]).square().sum())) ** 0.5


@pytest.mark.parametrize("metric", ["factors", "product"])
@pytest.mark.parametrize("radius", [4.0, None])
def test_clipping_is_a_step_of_at_most_tau_towards_each(metric, radius):
    x, found = rows(), mixed(Choice("clipped", {"radius": radius, "metric": metric, "tolerate": 2}))
    for i in range(NUM):
        far = {j: product_distance(x[j], x[i]) if metric == "product" else float((x[j] - x[i]).norm()) for j in range(NUM) if j != i}
        tau = sorted(far.values())[1] if radius is None else radius  # the (1 - 4 / 6)-quantile of six: the lower one
        expected = x[i] + sum(0.1 * min(1, tau / far[j]) * (x[j] - x[i]) for j in far)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-10)


def test_a_large_radius_is_plain_gossip_and_none_is_isolation():
    torch.testing.assert_close(mixed(Choice("clipped", {"radius": 1e9})), mixed(Choice("norm")), rtol=0, atol=1e-12)
    torch.testing.assert_close(mixed(Choice("clipped", {"radius": 0.0})), rows(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", ["product", "factors"])
def test_the_same_model_in_another_frame_passes_by_its_product_alone(metric):
    """Everybody has one model; peer 0 says -A and -B. By factors no step is longer than the radius, by products all of it is taken."""
    x = rows()
    x[:] = x[1]
    flip = Choice("attack", {"kind": "sign_flip", "by": [0]})
    pairs = slice(0, LAYOUT.groups["head"].start)
    x[:, LAYOUT.groups["head"]] = 0  # which has no frame
    found = mixed(Choice("clipped", {"radius": 0.5, "metric": metric}), x=x, channel=flip)
    step = float((found[2] - x[2])[pairs].norm())
    taken = {"product": 0.1 * 2 * float(x[0][pairs].norm()), "factors": 0.1 * 0.5}[metric]
    assert step == pytest.approx(taken, rel=1e-6)


def scores(x: torch.Tensor, tolerate: int) -> list[float]:
    squares = torch.cdist(x, x).square()
    others = [row[[k for k in range(len(x)) if k != j]] for j, row in enumerate(squares)]
    return [float(row.sort().values[:len(x) - tolerate - 2].sum()) for row in others]


@pytest.mark.parametrize("average", [1, 3])
def test_krum_takes_what_is_closest_to_most(average):
    x, found = rows(), mixed(Choice("krum", {"tolerate": 2, "average": average}))
    best = np.argsort(scores(x, 2))[:average]
    assert 0 not in best
    torch.testing.assert_close(found, x[best].mean(0).expand_as(x), rtol=0, atol=1e-12)


def test_the_geometric_median_is_weiszfeld_s():
    x, found = rows(), mixed(Choice("geometric_median", {"steps": 5, "smoothing": 0.2}))
    for i in range(NUM):
        given = torch.from_numpy(HASTY[i])
        z = given @ x
        for _ in range(5):
            beta = given / (x - z).norm(dim=1).clamp_min(0.2)
            z = (beta / beta.sum()) @ x
        torch.testing.assert_close(found[i], z, rtol=0, atol=1e-10)
    near = mixed(Choice("geometric_median", {"steps": 300, "smoothing": 1e-6}), w=W)[0]
    pulls = (x - near) / (x - near).norm(dim=1, keepdim=True)
    assert pulls.sum(0).norm() < 1e-3  # the unit vectors to all messages cancel


def test_numbers_are_sorted_one_by_one():
    x = rows()
    ordered = x.sort(0).values
    for guard, expected in ((Choice("trimmed_mean", {"tolerate": 2}), ordered[2:5].mean(0)), (Choice("median"), ordered[3]),
                            (Choice("bridge", {"screen": "median"}), ordered[3]),
                            (Choice("bridge", {"screen": "krum", "tolerate": 2}), x[int(np.argmin(scores(x, 2)))])):
        torch.testing.assert_close(mixed(guard), expected.expand_as(x), rtol=0, atol=1e-12)
    assert torch.equal(mixed(Choice("median"), w=np.kron(np.eye(1), W), x=x), mixed(Choice("median"), x=x))  # W counts for nothing


def test_bridge_t_keeps_the_own_number():
    x, found = rows(), mixed(Choice("bridge", {"tolerate": 2}))
    for i in range(NUM):
        others = x[[j for j in range(NUM) if j != i]].sort(0).values[2:4]
        torch.testing.assert_close(found[i], (others.sum(0) + x[i]) / 3, rtol=0, atol=1e-12)


def test_bulyan_selects_by_krum_and_then_by_number():
    x, found = rows(), mixed(Choice("bridge", {"screen": "bulyan", "tolerate": 1}))
    left, chosen = list(range(NUM)), []
    while len(chosen) < NUM - 2:
        best = left[int(np.argmin(scores(x[left], min(1, (len(left) - 3) // 2))))]
        chosen.append(best)
        left.remove(best)
    best = None  # of every number the three closest to the median of five
    for three in itertools.combinations(sorted(x[chosen].double(), key=lambda row: float(row[0])), 3):
        spread = sum(abs(float(row[0]) - float(x[chosen][:, 0].median())) for row in three)
        if best is None or spread < best[0]:
            best = (spread, np.mean([float(row[0]) for row in three]))
    assert float(found[0, 0]) == pytest.approx(best[1], abs=1e-12)


@pytest.mark.parametrize("name", GUARDS)
def test_peers_that_agree_go_on_to_and_too_few_keep_to_themselves(name):
    x = rows()
    x[:] = x[1]
    torch.testing.assert_close(mixed(Choice(name), x=x), x, rtol=0, atol=1e-9)
    if name in ("krum", "trimmed_mean", "bridge"):
        ring = topologies.build("ring", NUM).matrix(0)
        params = {"tolerate": 2} if name == "trimmed_mean" else {}
        assert torch.equal(mixed(Choice(name, params), w=ring), rows())


@pytest.mark.parametrize("codec", ["none", "int8", "sign"])
@pytest.mark.parametrize("guard", [Choice("clipped"), Choice("median"), Choice("krum")])
def test_what_was_rounded_is_judged_and_what_is_left_out_is_not_lost(guard, codec):
    """Peers that train alike under a guard and a codec go all the way."""
    case = Case("lora", slots={"guard": guard, "codec": codec})
    x = empty_rows(4, case.layout.size)
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.5)
    start, heart = x.mean(0), case.gossip(x)
    for t in range(40):
        x += 1e-3
        heart.round(t, x)
    assert float((x.mean(0) - start).mean()) == pytest.approx(0.04, rel=0.05)


ATTACKS = {"sign_flip": 2.0, "ipm": 3.0, "dissensus": None, "huge": None, "alie": None}


@cache
def loss_under(guard: Choice, attack: str | None) -> float:
    """Of the honest nine, after 20 rounds in which all talk to all."""
    toy, channel = Toy(0), Choice("perfect")
    if attack:
        channel = Choice("attack", {"kind": attack, "by": [0], "strength": ATTACKS[attack]})
    a, b = simulate("lora", topologies.build("complete", PEERS), toy.factors(), toy.local_step, 20, guard=guard, channel=channel,
                    measure_every=0).factors["toy"]
    goal = torch.from_numpy(toy.targets[1:].mean(0))
    return float((b @ a - goal)[1:].square().sum((1, 2)).mean() / 2)


class Hashed(Choice):
    """A choice that may be a key."""

    def __hash__(self):
        return hash((self.name, tuple(self.params.items())))


@pytest.mark.long
@pytest.mark.parametrize("guard", [Hashed("clipped"), Hashed("geometric_median"), Hashed("krum", {"average": 5}),
                                   Hashed("trimmed_mean"), Hashed("median"), Hashed("bridge"), Hashed("bridge", {"screen": "bulyan"})])
def test_one_poisoned_peer_in_ten(guard):
    """Far worse without a guard; with each, near what the guard has without an attack. ALIE hides: it costs little either way."""
    open_door = Hashed("finite")
    assert loss_under(guard, None) < 1.5 * loss_under(open_door, None)
    for attack in ("sign_flip", "ipm", "dissensus", "huge"):
        without, with_guard = loss_under(open_door, attack), loss_under(guard, attack)
        assert not without < 5 * loss_under(open_door, None), attack  # or not finite at all
        assert with_guard < 1.35 * loss_under(guard, None), attack
    assert loss_under(guard, "alie") < 1.35 * loss_under(guard, None)


@pytest.mark.parametrize("method, slots, words", [
    ("flora_na", {"guard": "krum"}, "not averaged with weights"), ("flora", {"guard": "median"}, "not averaged with weights"),
    ("decaf", {"guard": "median"}, "does not average numbers as they are"),
    ("lora", {"guard": "clipped", "channel": "over_the_air"}, "only the sum of its messages arrives"),
    ("lora", {"guard": "clipped", "wrapper": "gradient_tracking"}, "has to cancel over all of them")])
def test_who_does_not_average_is_refused(method, slots, words):
    with pytest.raises(ValueError, match=words):
        build(method, LAYOUT, slots=slots)
    build("decaf", LAYOUT, slots={"guard": "clipped"})


@pytest.mark.parametrize("build_it, words", [
    (lambda: GUARDS["clipped"](radius=-1), "guard.radius = -1"), (lambda: GUARDS["krum"](tolerate=-1), "guard.tolerate = -1"),
    (lambda: GUARDS["krum"](average=0), "guard.average = 0"), (lambda: GUARDS["geometric_median"](smoothing=0), "guard.smoothing = 0"),
    (lambda: GUARDS["clipped"](metric="both"), "guard.metric = 'both' is not allowed; allowed: factors, product"),
    (lambda: GUARDS["bridge"](screen="mean"), "guard.screen = 'mean'"),
    (lambda: CHANNELS["attack"](kind="rude"), "channel.kind = 'rude'"),
    (lambda: CHANNELS["attack"](by=[4], peers=4), r"channel.by = \[4\] is not allowed; allowed: a list of peers, from 0 to 3"),
    (lambda: CHANNELS["attack"](by=[]), "channel.by"), (lambda: CHANNELS["attack"](strength=-1), "channel.strength = -1")])
def test_parameters_that_are_none_are_refused(build_it, words):
    with pytest.raises(ValueError, match=words):
        build_it()


def test_attacks_are_what_they_say():
    x = rows()
    honest, w = x[1:], torch.from_numpy(HASTY)

    def reaches(kind: str, strength: float | None = None) -> torch.Tensor:
        """What peer 2 must have been told by peer 0."""
        out = mixed(Choice("finite"), x=x, channel=Choice("attack", {"kind": kind, "by": [0], "strength": strength}))
        return (out[2] - sum(w[2, j] * x[j] for j in range(1, NUM))) / w[2, 0]

    torch.testing.assert_close(reaches("sign_flip", 2.0), -2 * x[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(reaches("huge", 7.0), torch.full_like(x[0], 7.0), rtol=0, atol=1e-9)
    torch.testing.assert_close(reaches("ipm"), -0.1 * honest.mean(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(reaches("alie"), honest.mean(0) - 1.5 * honest.std(0, correction=0), rtol=0, atol=1e-9)
    pull = sum(0.1 * (x[j] - x[2]) for j in range(1, NUM) if j != 2)
    torch.testing.assert_close(reaches("dissensus"), x[2] - 1.5 * pull / 0.1, rtol=0, atol=1e-9)
