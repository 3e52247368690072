"""One grid: every method under every trigger, codec, channel and wrapper, in its limit case and in a real setting, or refused with a
reason."""

from itertools import product

import pytest
import torch
from cases import Case, start_rows

from dfl import methods
from dfl.engine import state as trees
from dfl.methods import Choice

ROUNDS = 5
# what equals the run without it: a threshold of zero, a loss rate of zero
LIMITS = {"trigger": Choice("event", {"threshold": 0.0}), "channel": Choice("lossy", {"rate": 0.0})}
REAL = {"silent": {"trigger": Choice("event", {"threshold": 0.4, "max_silence": 3})},
        "bfloat16": {"codec": Choice("bfloat16")}, "int8": {"codec": Choice("int8", {"block": 8})},
        "lossy": {"channel": Choice("lossy", {"rate": 0.4})},
        "silent, int8, lossy": {"trigger": Choice("event", {"threshold": 0.4}), "codec": Choice("int8"),
                                "channel": Choice("lossy", {"rate": 0.3})},
        "tracking": {"wrapper": Choice("gradient_tracking")},
        "tracking, int8": {"wrapper": Choice("gradient_tracking"), "codec": Choice("int8")}}
EVERY = list(methods.METHODS)
# why a method cannot have something: words of the refusal
DATED, ACTIVE, COPIES = "mean something in their own round alone", "another factor is exchanged", "stay equal at both ends"
NO_SILENCE = {"fed_svd": DATED, "flora": DATED, "plora": DATED, "lora_a2": DATED, "rolora": ACTIVE, "fedex_choco": COPIES}
TRACKED = {"lora", "ffa", "share_a", "rolora", "adf", "tad", "fed_sb", "local", "replicate"}


def refusal(name: str, slots: dict) -> str | None:
    """The words with which a method must refuse these slots; None where it must not."""
    if "wrapper" in slots and name not in TRACKED:
        return "needs a rule that averages"
    if "trigger" in slots and name in NO_SILENCE:
        return NO_SILENCE[name]
    if "channel" in slots and name == "fedex_choco":
        return COPIES
    return None


def train(x: torch.Tensor, case: Case, t: int, heart) -> None:
    """A local phase that is a function of the row, the round and the peer."""
    for row, (peer, plan) in enumerate(zip(range(len(x)), heart.plans(t), strict=True)):
        moved = 0.1 * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(97 * t + peer), dtype=x.dtype)
        correction = heart.corrections()[row]
        moved = moved if correction is None else moved - 0.01 * correction
        for cut in case.layout.columns(plan.trains):
            x[row, cut] += moved[cut] if plan.mask is None else moved[cut] * plan.mask[cut]


def run(case: Case, x: torch.Tensor, heart, first: int, last: int):
    reports = []
    for t in range(first, last):
        train(x, case, t, heart)
        reports.append(heart.round(t, x, lr=0.01, local_steps=2))
    return reports


def whole(name: str, slots: dict):
    case = Case(name, slots=slots)
    x = start_rows(case)
    heart = case.gossip(x)
    return x, heart, run(case, x, heart, 0, ROUNDS)


@pytest.mark.parametrize("slot", LIMITS)
@pytest.mark.parametrize("name", EVERY)
def test_a_limit_case_is_the_run_without_it(name, slot):
    slots = {slot: LIMITS[slot]}
    if refusal(name, slots):
        with pytest.raises(ValueError, match=refusal(name, slots)):
            Case(name, slots=slots)
        return
    plain, _, _ = whole(name, {})
    limit, heart, reports = whole(name, slots)
    assert torch.equal(plain, limit)
    assert name == "local" or sum(report.messages for report in reports) > 0


@pytest.mark.parametrize("name, setting", list(product(EVERY, REAL)))
def test_a_real_setting_is_finite_and_resumes_to_the_same_bits(name, setting):
    slots = REAL[setting]
    if refusal(name, slots):
        with pytest.raises(ValueError, match=refusal(name, slots)):
            Case(name, slots=slots)
        return
    expected, heart, reports = whole(name, slots)
    assert expected.isfinite().all()
    plain, without, _ = whole(name, {})
    same = torch.equal(plain, expected) and (heart.residuals() is None or torch.equal(heart.residuals(), without.residuals()))
    assert same == (name == "local")  # it does something
    case = Case(name, slots=slots)
    x = start_rows(case)
    before = case.gossip(x)
    run(case, x, before, 0, 3)
    saved = trees.flatten(trees.snapshot(before.state))
    again = Case(name, slots=slots).gossip(start_rows(case))
    again.restore(trees.unflatten({key: value.clone() for key, value in saved.items()}))
    run(case, x, again, 3, ROUNDS)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("setting", ["silent", "int8", "bfloat16", "tracking, int8"])
@pytest.mark.parametrize("name", ["lora", "adf", "ffa", "fed_sb"])
def test_the_network_mean_moves_by_the_mean_step_alone(name, setting):
    case = Case(name, slots=REAL[setting])
    x, moved = start_rows(case).double(), None
    heart = case.gossip(x)
    for t in range(20):
        before = x.mean(0)
        train(x, case, t, heart)
        moved = x.mean(0) - before if moved is None else moved + x.mean(0) - before
        heart.round(t, x, lr=0.01, local_steps=2)
    torch.testing.assert_close(x.mean(0), start_rows(case).double().mean(0) + moved, rtol=0, atol=1e-11)


def test_who_has_little_to_say_is_silent_and_who_is_silent_long_speaks():
    case = Case("lora", slots={"trigger": Choice("event", {"threshold": 1e9, "max_silence": 3})})
    x = start_rows(case)
    heart = case.gossip(x)
    spoke = [report.broadcasts for report in run(case, x, heart, 0, 9)]
    assert spoke == [4, 0, 0, 0, 4, 0, 0, 0, 4]


def test_peers_that_say_little_still_agree():
    """A threshold that falls with the round: the consensus error falls with it. One that does not leaves it where it is."""
    left = {}
    for decay in ("inverse", "constant"):
        case = Case("lora", slots={"trigger": Choice("event", {"threshold": 0.5, "decay": decay})})
        x = start_rows(case, apart=True).double()
        heart = case.gossip(x)
        for t in range(150):
            heart.round(t, x)
        left[decay] = float((x - x.mean(0)).norm())
    assert left["inverse"] < 0.05 * left["constant"]


def test_lost_messages_are_counted_and_their_weight_stays_with_the_receiver():
    case = Case("lora", slots={"channel": Choice("lossy", {"rate": 1.0})})
    x = start_rows(case)
    heart, before = case.gossip(x), x.clone()
    report = heart.round(0, x)
    assert report.lost == report.messages == 8 and torch.equal(x, before)


def test_gradient_tracking_finds_the_optimum_of_all_where_plain_local_steps_do_not():
    """Quadratics of unequal curvature, five local steps, full gradients: the corrections sum to zero and take the bias off."""
    torch.manual_seed(0)
    curvature, centre, distance = torch.rand(4, 1).double() + 0.2, torch.randn(4, 44).double(), {}
    optimum = (curvature * centre).sum(0) / curvature.sum()
    for wrapper in ("none", "gradient_tracking"):
        case = Case("lora", slots={"wrapper": Choice(wrapper)})
        x = torch.zeros(4, case.layout.size, dtype=torch.float64)
        heart = case.gossip(x)
        for t in range(400):
            corrections = heart.corrections()
            for row in range(4):
                for _ in range(5):
                    gradient = torch.zeros(case.layout.size, dtype=torch.float64)
                    gradient[:44] = curvature[row] * (x[row, :44] - centre[row])
                    x[row] -= 0.05 * (gradient if corrections[row] is None else gradient + corrections[row])
            heart.round(t, x, lr=0.05, local_steps=5)
        distance[wrapper] = float((x[:, :44] - optimum).norm())
    assert distance["gradient_tracking"] < 1e-6 < 1e-2 < distance["none"]
