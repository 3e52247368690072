"""Rounds of a combination without a model: the framework's own gossip, on the rows that a probe has left.

In place of local phases peers move as they did in the probe: each by what all moved together in its last rounds, and by what one of
them moved beside that, with a sign at random and a share phi of its last move (`dfl.plan.model`). Codec, trigger, channel, delay,
rule and network are those of a run, so that bytes, seconds on the simulated clock and the share of rounds in which a peer speaks are
counted and not computed; and the disagreement against that of the same rounds without codec, trigger, loss and delay says what
these add to it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfl.config import Config
from dfl.engine.gossip import Gossip
from dfl.plan.probe import Probe, centred, inner, vectors
from dfl.run import build
from dfl.seeds import derive
from dfl.training.hosted import common_scale
from dfl.transport import InProcess
from dfl.transport.ledger import Ledger, together, total

ROUNDS = 16  # at least
_LONGEST = 64  # of a period that is rehearsed whole


class Rehearsal(NamedTuple):
    """Bytes of all messages and simulated seconds of the first round, and of each later one on average; messages of later rounds over
    those that a run without trigger sends; Xi^2 in the second half."""

    first_bytes: float
    bytes: float
    first_seconds: float
    seconds: float
    share: float
    distance: float

    def bytes_until(self, rounds: float) -> float:
        return self.first_bytes + self.bytes * (rounds - 1)

    def seconds_until(self, rounds: float) -> float:
        return self.first_seconds + self.seconds * (rounds - 1)


def rehearse(config: Config, probed: Probe, topology: Any, phi: float, first: int = 0) -> Rehearsal:
    """Of rounds `first`, first + 1, ... of a run of `config`, at least ROUNDS and a whole period. ValueError where its slots do not go
    with the probe's model."""
    peers, adapted = probed.run.peers, probed.run.peers.adapted
    method = build.build_method(config, peers.layout, topology, adapted.ranks, adapted)
    x = peers.x.clone()
    if method.trigger.common_start:
        x[:] = x.mean(0)
    scale: Any = peers.scale
    gossip = Gossip(method, peers.layout, topology, InProcess(), peers.ids, x, seed=config.seed, scale=scale)
    rounds = max(ROUNDS, _longer(topology.period))
    moves, counts, distances = Moves(probed.updates, phi), [], []
    ledger: dict[int, Ledger] = {}
    told: dict[str, Any] = {"lr": peers.learning_rate(0.5), "rates": peers.rates(0.5), "local_steps": probed.local_steps}
    for t in range(first, first + rounds):
        gossip.begin(t, x, **told)
        x += moves.next()
        report = gossip.round(t, x, **told)
        ledger = together(ledger, report.ledger)
        sent = total(report.ledger)
        counts.append((report.message_bytes, total(ledger).seconds, report.messages, sent.due))
        if t - first >= rounds // 2:
            now = centred(vectors(adapted, common_scale(adapted, x, peers.scale), gossip.residuals(), method.rule.residual))
            distances.append(inner(now, now))
    sizes, clock, messages, due = zip(*counts, strict=True)
    return Rehearsal(sizes[0], sum(sizes[1:]) / (rounds - 1), clock[0], (clock[-1] - clock[0]) / (rounds - 1),
                     sum(messages[1:]) / max(1, sum(due[1:])), sum(distances) / len(distances))


def _longer(period: int | None) -> int:
    """ROUNDS, made up to whole periods."""
    return 0 if period is None or period > _LONGEST else -(-ROUNDS // period) * period


class Moves:
    """What peers change in a local phase, (P, D), from the updates (K, P, D) of measured ones: the same each time it is made."""

    def __init__(self, updates: Tensor, phi: float):
        self.common, self.phi = updates.mean((0, 1)), phi
        self.own = (updates - updates.mean(1, keepdim=True)).flatten(0, 1)
        self.num, self.draws = updates.shape[1], torch.Generator().manual_seed(derive(0, "moves"))
        self.last = self._drawn()

    def next(self) -> Tensor:
        self.last = self.phi * self.last + (1 - self.phi**2) ** 0.5 * self._drawn()
        return self.common + self.last

    def _drawn(self) -> Tensor:
        chosen = torch.randint(len(self.own), (self.num,), generator=self.draws)
        sign = 2 * torch.randint(2, (self.num, 1), generator=self.draws) - 1
        return self.own[chosen.to(self.own.device)] * sign.to(self.own)
