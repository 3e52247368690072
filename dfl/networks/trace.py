"""Links as a trace has recorded them."""

import csv
from bisect import bisect_right
from collections.abc import Sequence

from dfl.networks.links import SMALLEST
from dfl.plugins import by_peer, check_number
from dfl.slots import Link, Network

COLUMNS = ("round", "sender", "receiver", "bandwidth", "latency")


def trace(*, path: str, compute: float | Sequence[float] = 0.0, repeat: bool = False, peers: int | None = None) -> Network:
    """Take bandwidth and latency of every link and round from a recorded trace.

    A file of comma-separated rows with a heading: round, sender, receiver, bandwidth (bytes a second), latency
    (seconds), with peers and rounds from 0. A row holds from its round on, until the next one of its link; repeat: from
    the start again behind the last round. A message over a link that has no row yet is a ValueError. Time passes as in
    `links`.
    """
    if not isinstance(repeat, bool):
        raise ValueError(f"network.repeat = {repeat!r} is not allowed; allowed: true, false")
    table, steps = _read(path, peers), by_peer("network.compute", compute, peers)
    period = 1 + max(rounds[-1][0] for rounds in table.values())

    def seconds(link: Link, num_bytes: int) -> float:
        rows, t = table.get((link.sender, link.receiver), []), link.t % period if repeat else link.t
        place = bisect_right(rows, t, key=lambda row: row[0]) - 1
        if place < 0:
            raise ValueError(f"network.path = {path!r} has no row for the link from peer {link.sender} to {link.receiver} in "
                             f"round {t}")
        _, bandwidth, latency = rows[place]
        return latency + num_bytes / bandwidth

    return Network(seconds, lambda t, peer, local_steps: local_steps * steps(peer), timed=True, facts={"network_links": len(table)})


def _read(path: str, peers: int | None) -> dict[tuple[int, int], list[tuple[int, float, float]]]:
    """(round, bandwidth, latency) of each link, by round."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"network.path = {path!r} cannot be read: {error.strerror}") from None
    found: dict[tuple[int, int], list[tuple[int, float, float]]] = {}
    for number, row in enumerate(rows, 2):
        try:
            t, sender, receiver = (int(row[name]) for name in COLUMNS[:3])
            bandwidth, latency = (float(row[name]) for name in COLUMNS[3:])
            check_number("bandwidth", bandwidth, SMALLEST)
            check_number("latency", latency)
            if t < 0 or not all(0 <= peer < (peers or peer + 1) for peer in (sender, receiver)):
                raise ValueError("a round or a peer that is none")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"network.path = {path!r}, line {number}: {error}; allowed: numbers for {', '.join(COLUMNS)}") from None
        found.setdefault((sender, receiver), []).append((t, bandwidth, latency))
    if not found:
        raise ValueError(f"network.path = {path!r} has no rows; allowed: a heading {','.join(COLUMNS)} and a row for each link")
    return {link: sorted(rows) for link, rows in found.items()}
