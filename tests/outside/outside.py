"""A package that is none of ours: one plug-in of every kind, as CONTRIBUTING.md shows them."""

import torch

from dfl.metrics.base import Metric
from dfl.rules.average import average
from dfl.schedules import SCHEDULES
from dfl.slots import Channel, Codec, Guard, Schedule, Trigger
from dfl.tasks import TASKS


def slow_average(layout, *, pace: float = 0.5):
    """Go only a part of the way to the average: x_i <- (1 - pace) x_i + pace sum_j w_ij x_j."""
    plain = average(layout)

    def mix(x, inbox, state, round):
        mixed, state = plain.mix(x, inbox, state, round)
        return x + pace * (mixed - x), state

    return plain._replace(mix=mix)


def every_other(groups):
    """Train both factors, exchange them in even rounds alone."""
    both, alone = SCHEDULES["both"](groups), SCHEDULES["alone"](groups)
    return Schedule(lambda t, peer: (alone if t % 2 else both).plan(t, peer))


def by_turns():
    """Peer i speaks in rounds in which t + i is even."""
    return Trigger(lambda message: {}, lambda message, state, round: (round.t == 0 or (round.t + round.peer) % 2 == 0, state))


def halves():
    """Send every number as two: 8 bytes an element, exact."""
    def encode(parts, state, key):
        return {name: torch.cat([part / 2, part / 2]).view(torch.uint8) for name, part in parts.items()}, state

    return Codec(lambda parts: {}, encode, lambda name, data, numel, dtype: data.view(dtype).view(2, numel).sum(0), exact=True)


def from_peer_0_alone():
    """Lose what peer 0 is told."""
    return Channel(lambda: {}, lambda message, state, link: (message if link.receiver else None, state))


def only_small(*, most: float = 100.0):
    """Reject messages of a norm above `most`."""
    return Guard(lambda norms, peer, row: [j for j in norms if j != peer and max(norms[j].values()) > most])


def damped(rule):
    """Halve what mixing changes."""
    def mix(x, inbox, state, round):
        mixed, state = rule.mix(x, inbox, state, round)
        return (x + mixed) / 2, state

    return rule._replace(mix=mix)


def two_rings(num_peers: int):
    """Even peers in one ring, odd ones in another, joined between 0 and 1."""
    import networkx as nx
    rings = [list(range(start, num_peers, 2)) for start in (0, 1)]
    graph = nx.Graph([(0, 1)])
    for ring in rings:
        graph.add_edges_from(zip(ring, ring[1:] + ring[:1], strict=True))
    from topologies.links import Links
    return Links.from_networkx(graph)


def worst_recall(num_classes: int, *, above: float = 0.0):
    """Recall of the class that is found most rarely, of those with more than this share of the examples."""
    def sums(outcome, num_blocks):
        of_class = torch.nn.functional.one_hot(outcome.targets, num_classes)
        rows = torch.cat([of_class * outcome.correct[..., None], of_class], -1)
        return rows.view(num_blocks, -1, 2 * num_classes).sum(1)

    def value(sums):
        found, there = sums.view(2, -1)
        counted = there / there.sum() > above
        return float((found / there)[counted].min()) if counted.any() else float("nan")

    return Metric(sums, value, size=2 * num_classes, suits=("class",))


class Grading(TASKS["sequence_classification"]):
    """Classification by another name."""

    name = "grading"
