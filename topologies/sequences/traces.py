"""Graphs from recordings: who was near whom, round by round. A trace that has ended begins again."""

from __future__ import annotations

import numpy as np

from topologies.files import number, peer, words_of
from topologies.links import Links
from topologies.mixing import Rule
from topologies.registry import Entry, refuse
from topologies.topology import GraphTopology, Topology


def table(name: str, path, columns: tuple[str, ...], ids: tuple[str, ...], num_peers: int) -> np.ndarray:
    """(lines, columns) of finite numbers from a file of comma- or blank-separated values; a header line is optional."""
    lines = words_of(name, path)
    if lines and [word.lower() for word in lines[0][1]] == list(columns):
        lines = lines[1:]
    rows = [_row(words, f"{path}, line {line}", columns, ids, num_peers) for line, words in lines]
    if not rows:
        raise ValueError(f"{path}: no line with {', '.join(columns)}")
    return np.array(rows)


def _row(words, place: str, columns, ids, num_peers: int) -> list[float]:
    if len(words) != len(columns):
        raise ValueError(f"{place}: expected {', '.join(columns)}, got {' '.join(words)!r}")
    values = []
    for word, column in zip(words, columns, strict=True):
        least = -np.inf if column in ("x", "y") else 0.0
        values.append(peer(word, place) if column in ids else number(word, place, column, least))
        if column in ids and values[-1] >= num_peers:
            raise ValueError(f"{place}: peer {word} is not one of 0..{num_peers - 1}")
    return values


class Recorded(GraphTopology):
    """One graph for each round of a trace; rounds without a link are allowed."""

    def __init__(self, name: str, num_peers: int, rounds: list[Links], rule: Rule):
        super().__init__(name, num_peers, rule)
        self.rounds, self.period = rounds, len(rounds)

    def links(self, t):
        return self.rounds[t % self.period]


def clock(name: str, first: float, last: float, seconds: float) -> np.ndarray:
    """(rounds,) the instants at which the graph of each round is taken."""
    if not seconds > 0:
        raise refuse(name, "seconds (of a round) above 0", seconds)
    return first + seconds * np.arange(int((last - first) // seconds) + 1)


def contact_trace(num_peers: int, *, path: str, seconds: float = 1.0, rule) -> Topology:
    """Lines ``start end i j``: i and j are linked in the rounds whose span [begin, begin + seconds) meets [start, end)."""
    rows = table("contact_trace", path, ("start", "end", "i", "j"), ("i", "j"), num_peers)
    start, end, i, j = rows.T
    if (end < start).any() or (i == j).any():
        bad = int(np.flatnonzero((end < start) | (i == j))[0])
        raise ValueError(f"{path}: contact {bad + 1} ends before it starts or is of a peer with itself: {rows[bad].tolist()}")
    instants = clock("contact_trace", start.min(), max(end.max() - seconds, start.min()), seconds)
    met = [(start < t + seconds) & (end > t) for t in instants]
    rounds = [Links.from_arcs(num_peers, i[on].astype(int), j[on].astype(int)) for on in met]
    return Recorded("contact_trace", num_peers, rounds, rule)


def mobility_trace(num_peers: int, *, path: str, radius: float, seconds: float | None = None, rule) -> Topology:
    """Lines ``time node x y``: linked when nearer than ``radius`` at the positions last known. A round is one time
    stamp of the file, or ``seconds`` long. Who has no position yet has no link."""
    if not radius > 0:
        raise refuse("mobility_trace", "radius above 0", radius)
    rows = table("mobility_trace", path, ("time", "node", "x", "y"), ("node",), num_peers)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    times = np.unique(rows[:, 0])
    instants = times if seconds is None else clock("mobility_trace", times[0], times[-1], seconds)
    place, rounds, done = np.full((num_peers, 2), np.nan), [], 0
    for upto in np.searchsorted(rows[:, 0], instants, side="right"):
        for _, node, x, y in rows[done:upto]:
            place[int(node)] = x, y
        done = upto
        distance = np.linalg.norm(place[:, None] - place[None], axis=-1)
        rounds.append(Links.from_arcs(num_peers, *np.nonzero(distance < radius)))
    return Recorded("mobility_trace", num_peers, rounds, rule)


SEQUENCES: dict[str, Entry] = {
    "contact_trace": Entry(contact_trace, "recorded contacts, `start end i j` (path, seconds)"),
    "mobility_trace": Entry(mobility_trace, "recorded positions, `time node x y` (path, radius, seconds)"),
}
