"""A topology among those that are there: W(t, alive), where the living change from one round on."""

from collections.abc import Collection
from typing import Any

import numpy as np

from dfl.engine.state import Tree, owner

# what `i` remembers of a neighbour under the key i/j, which means nothing to a neighbour that began anew
_OF_LINKS = ("received", "delivered", "outgoing", "channel")


class Living:
    """`topology` among the living of each round. A pure function of what it was told, so that a record of it gives the same W(t)."""

    def __init__(self, topology: Any):
        self.topology = topology
        self._changes: list[tuple[int, tuple[int, ...]]] = [(0, tuple(range(topology.num_peers)))]

    def change(self, t: int, alive: Collection[int]) -> None:
        """From round t on these are the living; what was said of later rounds is void."""
        self._changes = [one for one in self._changes if one[0] < t] + [(t, tuple(sorted(alive)))]

    @property
    def changes(self) -> list[tuple[int, tuple[int, ...]]]:
        """From which round on who is living, ascending."""
        return list(self._changes)

    def alive(self, t: int) -> tuple[int, ...]:
        """Ids, ascending."""
        return next(alive for since, alive in reversed(self._changes) if since <= t)

    def matrix(self, t: int) -> np.ndarray:
        return self.topology.matrix(t, self.alive(t))

    def neighbors(self, t: int, i: int) -> dict[int, float]:
        return self.topology.neighbors(t, i, self.alive(t))

    def receivers(self, t: int, j: int) -> list[int]:
        return self.topology.receivers(t, j, self.alive(t))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.topology, name)


def forget(state: Tree, peers: Collection[int]) -> Tree:
    """The state of a run in which `peers` begin anew: without what they remember themselves, but for their rule's, and without what
    others remember of them."""
    gone, found = set(peers), {}
    for slot, held in state.items():
        found[slot] = {key: values for key, values in held.items() if slot == "rule" or not _is_of(slot, key, gone)}
    for key, values in found.get("sent", {}).items():
        known = values["known"]
        found["sent"][key] = values | {"known": known[[int(j) not in gone for j in known]]}
    return found


def _is_of(slot: str, key: str, gone: set[int]) -> bool:
    other = key.partition("/")[2]
    return owner(key) in gone or slot in _OF_LINKS and bool(other) and int(other) in gone
