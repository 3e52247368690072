"""Peers that join, leave and return on a schedule: any topology, round by round among those who are there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from topologies.registry import Entry, refuse
from topologies.sequences.traces import table
from topologies.topology import Topology


class Presence(Topology):
    """W(t) of ``inner`` among the peers that are there; who is away has w_ii = 1 and is received by nobody.

    stays: (peer, first round away, first round back) each; every: rounds after which they begin anew, None: never.
    """

    def __init__(self, inner: Topology, stays: np.ndarray, every: int | None):
        super().__init__("presence", inner.num_peers)
        self.inner, self.every = inner, every
        self.peer, self.start, self.end = stays[:, 0].astype(int), stays[:, 1], stays[:, 2]
        self.sums, self.symmetric, self.nonnegative = inner.sums, inner.symmetric, inner.nonnegative
        self.period = math.lcm(inner.period, every) if inner.period and every else None

    def there(self, t: int) -> np.ndarray:
        """Who takes part in round t, a mask (n,)."""
        now = t % self.every if self.every else t
        mask = np.ones(self.num_peers, dtype=bool)
        mask[self.peer[(self.start <= now) & (now < self.end)]] = False
        return mask

    def away(self, t: int, peer: int) -> bool:
        """Whether a peer takes no part in round t: neither trains nor sends nor receives."""
        return not self.there(self.check_round(t))[self.check_peer(peer)]

    def _among(self, t: int, alive: np.ndarray | None) -> np.ndarray:
        return self.there(t) if alive is None else self.there(t) & alive

    def _entries(self, t, alive):
        return self.inner.entries(t, self._among(t, alive))

    def _row(self, t, i, alive):
        mask = self._among(t, alive)
        return self.inner._row(t, i, mask) if mask[i] else {i: 1.0}

    def _column(self, t, j, alive):
        mask = self._among(t, alive)
        return self.inner._column(t, j, mask) if mask[j] else []


def presence(num_peers: int, *, away: Sequence | str = (), base="ring", every: int | None = None, rule, build) -> Topology:
    """Any topology ``base`` among those who are there: peers that join, leave and return.

    ``away``: [peer, start, end] each: away in the rounds start <= t < end (without end: for good); who joins late is away
    from round 0. Or a file of lines ``peer start end``. ``every``: after so many rounds the schedule begins anew.
    """
    if every is not None and not every > 0:
        raise refuse("presence", "every (rounds) above 0, or none", every)
    stays = _from_file(away, num_peers) if isinstance(away, str) else np.array([_stay(one, num_peers) for one in away])
    return Presence(build(base, num_peers, rule), stays.reshape(-1, 3), every)


def _from_file(path: str, num_peers: int) -> np.ndarray:
    rows = table("presence", path, ("peer", "start", "end"), ("peer",), num_peers)
    for number, (_, start, end) in enumerate(rows, 1):
        if not start <= end:
            raise ValueError(f"{path}: stay {number} ends before it starts: {rows[number - 1].tolist()}")
    return rows


def _stay(given, num_peers: int) -> tuple[int, float, float]:
    good = isinstance(given, list | tuple) and len(given) in (2, 3) and all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in given)
    if not good or given[0] >= num_peers or (len(given) == 3 and given[1] > given[2]):
        raise refuse("presence", f"away = a list of [peer, start, end] with a peer from 0 to {num_peers - 1} and start <= end, "
                     "or a file of them", repr(given))
    return given[0], given[1], given[2] if len(given) == 3 else np.inf


SEQUENCES: dict[str, Entry] = {
    "presence": Entry(presence, "any base topology among those who are there: peers join, leave and return (away, base, every)",
                      {"away": [[0, 0, 2], [1, 1, 3], [0, 5]]}),
}
