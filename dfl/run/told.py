"""What a member of a run that goes on without those it loses tells of itself when all settle, and what follows for all of them.

It decides to which round everybody goes back, so it is read as a stranger's: who tells what no member tells is named, and the others
settle without it. Pure: no clock, no connection, no disk.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from dfl.transport.members import FaultError


class Told(NamedTuple):
    """progress: rounds concluded, None of one that is not at work. checkpoints: those that it holds, in rounds, each
    once. came: how it came into the round at work, if it did ("round", "turn", "from", "of"). changes: from which round
    on who is living, ascending."""

    progress: int | None
    checkpoints: list[int]
    came: dict[str, Any] | None
    changes: list[tuple[int, tuple[int, ...]]]


class Plan(NamedTuple):
    """What follows from what all members have told: the round that all begin with, the processes that come to it with a state from
    elsewhere, and whether nobody was at work before."""

    round: int
    coming: list[int]
    start: bool


def read(infos: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, Collection[int]], rounds: int) -> dict[int, Told]:
    """By process, of a run of so many rounds with these peers at each. FaultError names the first that told nonsense."""
    found = {}
    for process, info in sorted(infos.items()):
        try:
            found[process] = _told(info, hosts[process], sum(map(len, hosts.values())), rounds)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FaultError(process, f"told nonsense of itself: {' '.join(str(error).split())[:200]}") from None
    return found


def _told(info: Mapping[str, Any], mine: Collection[int], num_peers: int, rounds: int) -> Told:
    progress = None if info["progress"] is None else _number("progress", info["progress"], rounds)
    checkpoints = sorted({_number("checkpoints", one, rounds) for one in info["checkpoints"]})
    came = None if info["came"] is None else _came(info["came"], mine, num_peers, rounds)
    changes = [(_number("changes", t, rounds), tuple(_number("changes", peer, num_peers - 1) for peer in alive))
               for t, alive in info["changes"]]
    if changes != sorted(changes) or not all(alive for _, alive in changes):
        raise ValueError("changes that are out of order, or a round in which nobody lives")
    return Told(progress, checkpoints, came, changes)


def _came(came: Mapping[str, Any], mine: Collection[int], num_peers: int, rounds: int) -> dict[str, Any]:
    t, turn, of = _number("came.round", came["round"], rounds), _number("came.turn", came["turn"], 2**31), came["of"]
    if came["from"] == "checkpoint":
        return {"round": t, "turn": turn, "from": "checkpoint", "of": _number("came.of", of, rounds)}
    if came["from"] != "neighbours" or sorted(of) != sorted(map(str, mine)):
        raise ValueError(f"came from {str(came['from'])[:40]} of {str(list(of))[:80]}")
    for row in of.values():
        for j, weight in row.items():
            _number("came.of", int(j), num_peers - 1)
            if not isinstance(weight, float) or not math.isfinite(weight) or weight <= 0:
                raise ValueError(f"came.of has the weight {str(weight)[:40]}")
    return {"round": t, "turn": turn, "from": "neighbours", "of": of}


def _number(name: str, value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} = {str(value)[:40]}; allowed: 0 to {most}")
    return value


def plan_of(told: Mapping[int, Told], me: int) -> Plan:
    """A pure function of what the members told, so that all come to the same. FaultError names one that cannot be where it says it is.

    Those at work go on with the least of their rounds. Where nobody is, all begin with the checkpoint that most of them have, the
    newest of those.
    """
    going = {process: one.progress for process, one in told.items() if one.progress is not None}
    if going:
        _check_together(going, me)
        return Plan(min(going.values()), [q for q in told if q not in going], False)
    held = [rounds for one in told.values() for rounds in one.checkpoints]
    first = max(held, key=lambda rounds: (held.count(rounds), rounds), default=0)
    return Plan(first, [q for q, one in told.items() if first and first not in one.checkpoints], True)


def _check_together(going: Mapping[int, int], me: int) -> None:
    """A round ends with an agreement, so that those at work are at one round or at two that follow each other: who is further back
    would take all others to where they cannot go. Counted from the highest round that half of them are at, or one behind."""
    top = max(t for t in going.values() if 2 * sum(other >= t - 1 for other in going.values()) >= len(going))
    for process, t in sorted(going.items()):
        if t < top - 1 and process != me:
            raise FaultError(process, f"told that it is at round {t}, where the others are at round {top}")


def came_before(plan: Plan, told: Mapping[int, Told]) -> dict[int, dict[str, Any]]:
    """How those members came that did so in this round already, before those that come now."""
    return {process: one.came for process, one in told.items()
            if process not in plan.coming and one.came is not None and one.came["round"] == plan.round}


def next_turn(before: Mapping[int, Mapping[str, Any]]) -> int:
    return 1 + max((came["turn"] for came in before.values()), default=-1)
