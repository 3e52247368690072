"""Rules that train one factor at a time, with unequal phases and patterns; sharing A alone."""

import pytest
import torch
from one_round import build
from test_rules import LAYOUT, activation, assert_same, mix_once, random_rows, ring, simulated

import topologies
from dfl.schedules.alternating import phase


def trained(name: str, rounds: int, **params) -> str:
    rule = build(name, LAYOUT, **params)
    return "".join("".join(sorted(rule.trains(t))) for t in range(rounds))


def test_unequal_phases_and_patterns():
    assert "".join(phase(t, [3, 1]) for t in range(9)) == "BBBABBBAB"
    assert "".join(phase(t, pattern="BBA") for t in range(7)) == "BBABBAB"
    for name in ("adf", "tad", "rolora"):
        assert trained(name, 9, T=[5, 2]) == "BBBBBAABB"
        assert trained(name, 7, pattern="BAA") == "BAABAAB"
        assert trained(name, 6, T=2) == "BBAABB"


def test_only_the_trained_factor_of_rolora_travels():
    rule = build("rolora", LAYOUT, pattern="BBA")
    assert [rule.sends(t) for t in range(3)] == [{"B"}, {"B"}, {"A"}]
    assert build("adf", LAYOUT, pattern="BBA").sends(0) == {"A", "B"}


def test_the_choice_is_in_the_log():
    assert build("adf", LAYOUT, T=[5, 2]).facts == {"T": [5, 2]}
    assert build("tad", LAYOUT, pattern="BBA").facts == {"pattern": "BBA", "reason": "given in the recipe"}
    assert build("adf", LAYOUT).facts == {"T": 5} and build("rolora", LAYOUT).facts == {"T": 1}


def test_equal_intervals_and_their_pattern_are_one_schedule():
    assert_same(simulated("adf", activation(), T=[2, 2]), simulated("adf", activation(), T=2), atol=0)
    assert_same(simulated("rolora", activation(), pattern="BA"), simulated("rolora", activation()), atol=0)
    assert_same(simulated("tad", activation(), pattern="BBA"), simulated("adf", activation(), T=[2, 1]), atol=0)


@pytest.mark.parametrize("params, message", [
    ({"T": [5]}, r"method.T = \[5\] is not allowed"), ({"T": [5, 0]}, r"method.T = \[5, 0\]"),
    ({"T": [1, 2, 3]}, r"method.T = \[1, 2, 3\]"),
    ({"pattern": "BBC"}, "method.pattern = 'BBC'"), ({"pattern": "BBB"}, "both in it"), ({"pattern": ""}, "method.pattern = ''"),
    ({"pattern": 5}, "method.pattern = 5"), ({"pattern": "BBA", "T": 3}, "exclude each other")])
@pytest.mark.parametrize("name", ["adf", "tad", "rolora"])
def test_what_is_no_schedule_is_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        build(name, LAYOUT, **params)


def test_in_a_phase_of_b_mixing_still_moves_a():
    rule = build("adf", LAYOUT, pattern="BBA")
    x = random_rows()
    mixed = mix_once("adf", x, ring(), t=0, T=5)
    assert rule.trains(0) == {"B"} and not torch.equal(mixed[:, LAYOUT.groups["A"]], x[:, LAYOUT.groups["A"]])


class TestShareA:
    def test_b_is_personal(self):
        x = random_rows()
        mixed = mix_once("share_a", x, ring())
        a, b = LAYOUT.groups["A"], LAYOUT.groups["B"]
        assert torch.equal(mixed[:, b], x[:, b])
        torch.testing.assert_close(mixed[:, a], torch.from_numpy(ring()) @ x[:, a], rtol=0, atol=1e-14)
        rule = build("share_a", LAYOUT)
        assert rule.trains(0) == {"A", "B"} and rule.length(0) == a.stop - a.start

    def test_full_averaging_makes_a_common_and_keeps_b_apart(self):
        last = simulated("share_a", topologies.build("complete", 10), rounds=3).measures[-1]
        assert last["consensus_distance_A"] < 1e-13 < 0.1 < last["consensus_distance_B"]
