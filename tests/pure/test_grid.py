"""One grid: every method under every trigger, codec, channel and wrapper, in its limit case and in a real setting, or refused with a
reason."""

from functools import cache
from itertools import product

import pytest
import torch
from cases import CODEC_SETTINGS, DIFFERENCES, PARTS, Case, codec_refusal, start_rows

import topologies
from dfl import methods
from dfl.channels.segments import MODES
from dfl.engine import state as trees
from dfl.guards.numbers import SCREENS
from dfl.methods import Choice
from dfl.wrappers import WRAPPERS

ROUNDS = 5
# what equals the run without it: a threshold of zero, a loss rate of zero
LIMITS = {"event": {"trigger": Choice("event", {"threshold": 0.0})}, "lossy": {"channel": Choice("lossy", {"rate": 0.0})},
          "sparq": {"trigger": Choice("sparq", {"c": 0.0})}, "eventgrad": {"trigger": Choice("eventgrad", {"horizon": 0.0})},
          "efhc": {"trigger": Choice("efhc", {"r": 0.0})}, "zero_threshold": {"trigger": Choice("zero_threshold")},
          "global_threshold": {"trigger": Choice("global_threshold", {"r": 0.0})},
          "random_gossip": {"trigger": Choice("random_gossip", {"probability": 1.0})},
          "periodic": {"trigger": Choice("periodic", {"every": 1})},
          "late": {"trigger": Choice("late", {"share": 1.0, "merge": False})},
          **{f"segments, {mode}": {"channel": Choice("segments", {"rate": 0.0, "mode": mode})} for mode in MODES},
          "bursts": {"channel": Choice("bursts", {"to_bad": 0.0})}, "noise": {"channel": Choice("noise", {"sigma": 0})},
          "delay": {"channel": Choice("delay", {"by": 0})}, "perfect": {"channel": Choice("perfect", {"aggregations": 1})},
          "zip_noise": {"channel": Choice("zip_noise", {"sigma": 0.0})},
          "muffliato": {"wrapper": Choice("muffliato", {"sigma": 0, "steps": 1})},
          "links": {"network": Choice("links")}}
REAL = {"silent": {"trigger": Choice("event", {"threshold": 0.4, "max_silence": 3})},
        "products": {"trigger": Choice("event", {"threshold": 4.0, "norm": "product"})},
        "sparq": {"trigger": Choice("sparq", {"c": 3e4, "growth": 0.5})},
        "eventgrad": {"trigger": Choice("eventgrad", {"horizon": 0.9, "initial": 1})},
        "efhc": {"trigger": Choice("efhc", {"r": 500.0, "bandwidth": [1e3, 2e3, 1e3, 4e3]})},
        "global_threshold": {"trigger": Choice("global_threshold", {"r": 0.5, "bandwidth": 1.0})},
        "random_gossip": {"trigger": Choice("random_gossip", {"probability": 0.2})},
        "periodic": {"trigger": Choice("periodic", {"every": 2})},
        "late": {"trigger": Choice("late", {"share": 0.95})},  # of 60 rounds: from the fourth on
        "efhc, int8, lossy": {"trigger": Choice("efhc", {"r": 0.3, "bandwidth": 1.0}), "codec": CODEC_SETTINGS["int8"],
                              "channel": Choice("lossy", {"rate": 0.3})},
        **{f"segments, {mode}": {"channel": Choice("segments", {"rate": 0.4, "count": 4, "mode": mode})} for mode in MODES},
        "silent, segments": {"trigger": Choice("event", {"threshold": 0.4}), "channel": Choice("segments", {"rate": 0.3, "count": 3})},
        "bursts": {"channel": Choice("bursts", {"to_bad": 0.4, "to_good": 0.4})},
        "noise": {"channel": Choice("noise", {"sigma": 0.05})},
        "delay": {"channel": Choice("delay", {"by": 1, "jitter": 1})},
        "over_the_air": {"channel": Choice("over_the_air", {"least_gain": 0.1})},
        "zip_noise": {"channel": Choice("zip_noise", {"sigma": 0.3})},
        "zip_noise, int8": {"channel": Choice("zip_noise", {"sigma": 0.3}), "codec": CODEC_SETTINGS["int8"]},
        "masked": {"channel": Choice("masked", {"bits": 12})},
        "masked, drop-outs": {"channel": Choice("masked", {"bits": 12, "loss": 0.3})},
        "twice": {"channel": Choice("perfect", {"aggregations": 2})},
        "as often as noise allows": {"channel": Choice("noise", {"sigma": 0.3, "aggregations": "auto"})},
        "measured": {"network": Choice("links"), "trigger": Choice("efhc", {"r": 3e3, "bandwidth": "measured"})},
        **{name: {"codec": choice} for name, choice in CODEC_SETTINGS.items()},
        "silent, sign": {"trigger": Choice("event", {"threshold": 0.4}), "codec": CODEC_SETTINGS["sign"]},
        "sparq, top_k": {"trigger": Choice("sparq", {"c": 3e4, "growth": 0.5}), "codec": CODEC_SETTINGS["top_k"]},
        "periodic, sign": {"trigger": Choice("periodic", {"every": 2}), "codec": CODEC_SETTINGS["sign"]},
        "lossy, random_k": {"channel": Choice("lossy", {"rate": 0.3}), "codec": CODEC_SETTINGS["random_k"]},
        "lossy": {"channel": Choice("lossy", {"rate": 0.4})},
        "silent, int8, lossy": {"trigger": Choice("event", {"threshold": 0.4}), "codec": CODEC_SETTINGS["int8"],
                                "channel": Choice("lossy", {"rate": 0.3})},
        "silent, lossy": {"trigger": Choice("event", {"threshold": 0.4}), "channel": Choice("lossy", {"rate": 0.3})},
        "ahead": {"delay": 1}, "ahead, int8": {"delay": 1, "codec": CODEC_SETTINGS["int8"]},
        "ahead, silent": {"delay": 1, "trigger": Choice("event", {"threshold": 0.4, "max_silence": 3})},
        "ahead, lossy": {"delay": 1, "channel": Choice("lossy", {"rate": 0.4})},
        "ahead, sign": {"delay": 1, "codec": CODEC_SETTINGS["sign"]},
        "clipped": {"guard": Choice("clipped")}, "median": {"guard": Choice("median")},
        "krum": {"guard": Choice("krum", {"tolerate": 0, "average": 2})},
        "trimmed_mean": {"guard": Choice("trimmed_mean")}, "geometric_median": {"guard": Choice("geometric_median")},
        **{f"bridge, {screen}": {"guard": Choice("bridge", {"screen": screen, "tolerate": 0})} for screen in SCREENS},
        "clipped, sign": {"guard": Choice("clipped", {"radius": 0.5}), "codec": CODEC_SETTINGS["sign"]},
        **{f"attack, {kind}": {"channel": Choice("attack", {"kind": kind, "by": [2], "strength": strength})}
           for kind, strength in (("sign_flip", 2.0), ("huge", 9.0), ("ipm", 0.1), ("alie", 1.5), ("dissensus", 1.5))},
        "attack, nan": {"channel": Choice("attack", {"kind": "nan", "by": [2]})},
        "tracking, int8": {"wrapper": Choice("gradient_tracking"), "codec": CODEC_SETTINGS["int8"]},
        "tracking, top_k": {"wrapper": Choice("gradient_tracking"), "codec": CODEC_SETTINGS["top_k"]}}
PARAMETERS = {"adaptive_consensus": {"gamma": 0.5}, "proxskip": {"p": 0.5}, "muffliato": {"sigma": 0.1, "steps": 2}}
WRAPPED = {name: Choice(name, PARAMETERS.get(name, {})) for name in WRAPPERS if name != "none"}
# "aug_dgm", "next" and "diging" exchange twice in a round
WRAPPED |= {member: Choice("flexatc", {"member": member}) for member in ("aug_dgm", "next", "extra", "diging", "dgd")}
for _name, _choice in WRAPPED.items():
    REAL |= {_name: {"wrapper": _choice}, f"silent, {_name}": {"wrapper": _choice, "trigger": Choice("event", {"threshold": 0.4})},
             f"lossy, {_name}": {"wrapper": _choice, "channel": Choice("lossy", {"rate": 0.4})}}
EVERY = list(methods.METHODS)
# why a method cannot have something: words of the refusal
DATED, ACTIVE, COPIES = "mean something in their own round alone", "another factor is exchanged", "stay equal at both ends"
NO_SILENCE = {**dict.fromkeys(("fed_svd", "flora", "plora", "salf", "lora_a2"), DATED), "rolora": ACTIVE, "fedex_choco": COPIES}
CANCELS = "has to cancel over all of them"
AVERAGED = {"lora", "ffa", "share_a", "rolora", "adf", "tad", "fed_sb", "local", "replicate"}
# what a wrapper keeps has to cancel, so that no message may be lost
BALANCED = {"gradient_tracking", "momentum_tracking", "exact_diffusion", "d2", "led", "proxskip", "flexatc", "push_sum", "push_diging"}
# under the others the mean takes outer steps
MEAN_KEPT = sorted(BALANCED | {"quasi_global", "adaptive_consensus"})
ONE_WAY, TWICE = {"push_sum", "push_diging"}, {"aug_dgm", "next", "diging"}
NUMBERS = {"median", "trimmed_mean", "bridge"}  # guards that go number by number


HELD = {"event", "sparq", "eventgrad"}  # triggers that hold messages back
PAIRS = {"lora", "replicate", "adf", "tad"}  # those of them that send A and B in every round
STATIC = {"fedex_choco"}
NO_AHEAD = {**dict.fromkeys(("fed_svd", "flora", "plora", "lora_a2", "salf"), DATED), "fedex_choco": COPIES,
            "task_bank": "a change meanwhile cannot be added"}
# what a guard that weighs messages cannot go with
WEIGHED = {"lora_a2", "plora", "fedrot", "flora_na", "hetlora", "fedex_choco", "flora", "task_bank"}
MANY_LENGTHS = {"florist", "fedhl", "salf"}


def refusal(name: str, slots: dict) -> str | None:
    """The words with which a method must refuse these slots; None where it must not."""
    if slots.get("delay") and name in NO_AHEAD:
        return NO_AHEAD[name] if not ("codec" in slots or "channel" in slots or "trigger" in slots) else "cannot have"
    trigger, wrapper = slots.get("trigger"), slots["wrapper"].name if "wrapper" in slots else "none"
    if wrapper != "none" and name not in AVERAGED:
        return "needs a rule that averages"
    if wrapper == "relay" and name == "rolora":
        return "exchanges 'active', which rule"
    if wrapper == "relay" and (trigger or "channel" in slots):
        return COPIES
    if trigger and wrapper in ONE_WAY | {"muffliato", "updates"}:
        return DATED
    if trigger and slots.get("wrapper", Choice("none")).params.get("member") in TWICE and name not in NO_SILENCE:
        return "exchanges twice in a round"
    if trigger and name in NO_SILENCE and (trigger.name in HELD or name == "fedex_choco"):
        return NO_SILENCE[name]
    if trigger and trigger.params.get("norm") == "product" and name not in PAIRS:
        return "needs messages of A and B as they are"
    if trigger and trigger.name == "eventgrad" and name not in AVERAGED:
        return "sends the tensors of a row one by one"
    if trigger and trigger.name == "late" and trigger.params.get("merge", True) and name in STATIC:
        return "needs the same W in every round"
    channel = slots.get("channel", Choice("perfect"))
    if channel.name != "perfect" and name == "fedex_choco":
        return COPIES
    if channel.name == "delay" and name in NO_SILENCE:
        return NO_SILENCE[name]
    if channel.name in ("over_the_air", "masked") and name not in AVERAGED:
        return "delivers sums of numbers"
    if channel.name == "zip_noise" and name not in AVERAGED and name != "fedex_choco":
        return "noise that cancels in the sums of one round alone"
    if channel.name == "over_the_air" and name == "rolora":
        return "exchanges another factor"
    if channel.params.get("aggregations", 1) != 1 and name not in AVERAGED:
        return "cannot mix more than once in a round"
    if "channel" in slots and wrapper in BALANCED:
        return CANCELS
    setting = next((setting for setting, choice in CODEC_SETTINGS.items() if choice == slots.get("codec")), None)
    if setting and codec_refusal(name, setting):
        return codec_refusal(name, setting)
    if "guard" in slots and name in WEIGHED | MANY_LENGTHS:
        return "not averaged with weights" if name in WEIGHED else "many lengths"
    if slots.get("guard", Choice("norm")).name in NUMBERS and name not in AVERAGED:
        return "does not average numbers as they are"
    return None


# What always runs: every method in a few settings, a few methods in every setting (one a kind: what travels, whether it is an
# average, whether messages may be late or lost), and every refusal. All other cells are for the night (tests/README.md).
ALWAYS = {"lora", "rolora", "decaf", "fedhl", "fed_sb"}
ALWAYS_IN = {"ahead", "event", "lossy", "segments, stale", "silent, int8, lossy", "delay", "top_k"}
SLOW = {"flora_na"}  # fits its coefficients anew in every mix


def cells(settings: dict[str, dict]) -> list:
    def always(name: str, setting: str) -> bool:
        settled = name in ALWAYS or setting in (ALWAYS_IN if name not in SLOW else {"event"})
        return settled or refusal(name, settings[setting]) is not None

    return [pytest.param(name, setting, id=f"{name}-{setting}", marks=[] if always(name, setting) else [pytest.mark.nightly])
            for name, setting in product(EVERY, settings)]


TOLD = {"lr": 0.01, "local_steps": 2}


def train(x: torch.Tensor, case: Case, t: int, heart) -> None:
    """A local phase of two steps that is a function of the row, the round and the peer; the first of them moves."""
    after_step = heart.after_step(t, **TOLD)
    for row, (peer, plan) in enumerate(zip(range(len(x)), heart.plans(t), strict=True)):
        moved = 0.1 * torch.randn(x.shape[1], generator=torch.Generator().manual_seed(97 * t + peer), dtype=x.dtype)
        correction = heart.corrections()[row]
        moved = moved if correction is None else moved - 0.01 * correction
        for k in range(2):
            for cut in case.layout.columns(plan.trains):
                if k == 0:
                    x[row, cut] += moved[cut] if plan.mask is None else moved[cut] * plan.mask[cut]
                if after_step and not plan.away:
                    x[row, cut] = after_step(row, x[row], k)[cut]


def run(case: Case, x: torch.Tensor, heart, first: int, last: int):
    reports = []
    for t in range(first, last):
        heart.begin(t, x, **TOLD)
        train(x, case, t, heart)
        reports.append(heart.round(t, x, **TOLD))
    return reports


def whole(name: str, slots: dict):
    case = Case(name, slots=slots)
    x = start_rows(case)
    heart = case.gossip(x)
    return x, heart, run(case, x, heart, 0, ROUNDS)


@cache
def plain_run(name: str):
    return whole(name, {})


@pytest.mark.parametrize("name, limit", cells(LIMITS))
def test_a_limit_case_is_the_run_without_it(name, limit):
    slots = LIMITS[limit]
    if refusal(name, slots):
        with pytest.raises(ValueError, match=refusal(name, slots)):
            Case(name, slots=slots)
        return
    plain, _, _ = plain_run(name)
    found, heart, reports = whole(name, slots)
    assert torch.equal(plain, found)
    assert name == "local" or sum(report.messages for report in reports) > 0


@pytest.mark.parametrize("name, setting", cells(REAL))
def test_a_real_setting_is_finite_and_resumes_to_the_same_bits(name, setting):
    slots = REAL[setting]
    if refusal(name, slots):
        with pytest.raises(ValueError, match=refusal(name, slots)):
            Case(name, slots=slots)
        return
    expected, heart, reports = whole(name, slots)
    assert expected.isfinite().all()
    plain, without, _ = plain_run(name)
    same = torch.equal(plain, expected) and (heart.residuals() is None or torch.equal(heart.residuals(), without.residuals()))
    # where rows sum to one as well, push-sum is the rule
    assert same == (name == "local" or setting == "push_sum")  # it does something
    case = Case(name, slots=slots)
    x = start_rows(case)
    before = case.gossip(x)
    run(case, x, before, 0, 3)
    saved = trees.flatten(trees.snapshot(before.state))
    again = Case(name, slots=slots).gossip(start_rows(case))
    again.restore(trees.unflatten({key: value.clone() for key, value in saved.items()}))
    run(case, x, again, 3, ROUNDS)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("setting", ["silent", "sparq", "eventgrad", "efhc", "random_gossip", "late", "tracking, int8",
                                     "silent, lossy", "zip_noise", "zip_noise, int8",
                                     "ahead", "ahead, int8", "ahead, silent", "ahead, sign",
                                     "silent, sign", "sparq, top_k", "periodic, sign", "tracking, top_k", *CODEC_SETTINGS,
                                     *MEAN_KEPT, *(f"silent, {name}" for name in MEAN_KEPT if name not in ONE_WAY)])
@pytest.mark.parametrize("name", ["lora", "adf", "ffa", "fed_sb"])
def test_the_network_mean_moves_by_the_mean_step_alone(name, setting):
    case = Case(name, slots=REAL.get(setting) or {"codec": CODEC_SETTINGS[setting]})
    x, moved = start_rows(case).double(), None
    heart = case.gossip(x)
    for t in range(20):
        before = x.mean(0)
        heart.begin(t, x, **TOLD)
        train(x, case, t, heart)
        moved = x.mean(0) - before if moved is None else moved + x.mean(0) - before
        heart.round(t, x, **TOLD)
    torch.testing.assert_close(x.mean(0), start_rows(case).double().mean(0) + moved, rtol=0, atol=1e-11)


@pytest.mark.parametrize("setting", [*sorted(DIFFERENCES), *sorted(PARTS)])
def test_codecs_that_leave_out_most_say_what_they_cannot_go_with(setting):
    codec, differences = CODEC_SETTINGS[setting], setting in DIFFERENCES
    with pytest.raises(ValueError, match="stay equal at both ends" if differences else "other numbers in every round"):
        Case("lora", slots={"codec": codec, **(LIMITS["lossy"] if differences else LIMITS["event"])})
    method, changing = Case("lora", slots={"codec": codec}).rule.method, topologies.build("edge_activation", 4, p=0.5)
    if differences:
        with pytest.raises(ValueError, match="copies have to stay equal at all of them"):
            Case("lora", slots={"codec": codec, **LIMITS["efhc"]})
        with pytest.raises(ValueError, match="'differences' needs a topology that is the same in every round"):
            methods.check_topology(method, changing)
    else:
        methods.check_topology(method, changing)


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


@pytest.mark.parametrize("name", sorted(BALANCED))
def test_what_has_to_cancel_is_not_broken_in_silence_by_a_guard(name):
    """One peer sends far too much: without a wrapper its message is left out, with one that conserves the round is refused."""
    def poisoned(slots):
        case = Case("lora", slots=slots)
        x = start_rows(case)
        x[1] *= 1e6
        return case.gossip(x), x

    heart, x = poisoned({})
    assert heart.round(0, x, **TOLD).rejected
    heart, x = poisoned({"wrapper": WRAPPED[name]})
    with pytest.raises(ValueError, match="rejected what peer 1 sent"):
        heart.round(0, x, **TOLD)
