"""A package that is none of ours: one plug-in of every kind, as CONTRIBUTING.md shows them."""

import torch

from dfl.adapters.cores import Core
from dfl.adapters.kinds import Kind
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


def frozen_normal(pair, generator):
    """a ~ N(0, 1 / I) and b ~ N(0, 1 / R), the same at every peer: no rank is too large for a layer."""
    return (torch.randn(pair.rank, pair.d_in, generator=generator) / pair.d_in ** 0.5,
            torch.randn(pair.d_out, pair.rank, generator=generator) / pair.rank ** 0.5)


def scales_of_frozen_factors(lora):
    """A = diag(d) a and B = diag(o) b of every layer: R + O trained numbers, d and o."""
    return Core(shapes=lambda pair: {"d": (pair.rank,), "o": (pair.d_out,)},
                factors=lambda core, a, b: (core["d"][..., None] * a, core["o"][..., None] * b),
                gradients=lambda core, a, b, grad_a, grad_b: {"d": (grad_a * a).sum(-1), "o": (grad_b * b).sum(-1)},
                bases=frozen_normal, start={"d": 0.1})


# Kopiczko, Blankevoort, Asano 2023, arXiv 2310.11454, but for a and b of every layer's own
vera = Kind("Trained scales of frozen random factors, diag(o) b diag(d) a (VeRA: arXiv 2310.11454).",
            core=scales_of_frozen_factors, methods=("lora", "local"))
