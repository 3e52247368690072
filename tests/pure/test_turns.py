"""Who comes into a run that goes on, and in which turn of its round: what records say and a replay follows."""

from dfl.run.replay import _in_order
from dfl.run.told import Plan, Told, came_before, next_turn


def told(*came: tuple[int, int] | None) -> dict[int, Told]:
    """Of processes 0, 1, ...: nothing, or (round, turn) in which each came."""
    return {process: Told(5, [], {"round": one[0], "turn": one[1], "from": "neighbours", "of": {}} if one else None, [])
            for process, one in enumerate(came)}


def plan_at(t: int, *coming: int) -> Plan:
    return Plan(**{"round": t, "coming": list(coming), "start": False})


def test_who_comes_after_others_did_in_the_same_round_has_the_next_turn():
    assert next_turn(came_before(plan_at(5, 2), told(None, None, None))) == 0
    assert next_turn(came_before(plan_at(5, 2), told(None, (5, 0), None))) == 1
    assert next_turn(came_before(plan_at(5, 2), told(None, (4, 3), None))) == 0  # that was another round
    assert next_turn(came_before(plan_at(5, 1), told(None, (5, 0), (5, 1)))) == 2  # lost again, and back


def test_a_replay_follows_the_turns_also_where_two_took_rows_of_each_other():
    """1 came and took the row of 2, which was lost in the same round, came back and took that of 1."""
    came = {1: {"turn": 0, "from": "neighbours", "of": {"0": 0.5, "2": 0.5}}, 2: {"turn": 1, "from": "neighbours", "of": {"1": 1.0}}}
    assert _in_order(came) == [1, 2]
    came[1]["turn"], came[2]["turn"] = 2, 1
    assert _in_order(came) == [2, 1]
