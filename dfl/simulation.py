"""Any rule on any topology with the caller's own local step: no model, no processes, the loop's own rule code."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dfl import codecs, rules
from dfl.factors import Layout, pack, unpack
from dfl.gossip import digest_of_common, gossip
from dfl.masks import Held
from dfl.measures import measure
from dfl.rules.alternating import automatic_phases
from dfl.rules.base import Rule
from dfl.topology import check_averages
from dfl.transport import InProcess
from topologies import spectrum

Factors = Mapping[str, tuple[Tensor, Tensor]]
LocalStep = Callable[[Factors, int, frozenset[str]], None]


class MixingSequence(Protocol):
    """What the simulator asks of a topology; `topologies.build` gives one."""

    num_peers: int

    def matrix(self, t: int, alive=None) -> np.ndarray: ...


class Simulation(NamedTuple):
    """The factors after the last round, in the shape they came in, and a dict of measures for each measured round."""

    factors: dict[str, tuple[Tensor, Tensor]]
    measures: list[dict[str, float]]


def simulate(rule: str, topology: MixingSequence, factors: Factors, local_step: LocalStep, rounds: int, *,
             codec: str = "none", guard: float | None = None, measure_every: int = 1, measure_from: int = 0,
             ranks: Sequence[int] | None = None, **params) -> Simulation:
    """Run `rounds` rounds of `rule` over `topology` with the caller's own local training.

    factors: {layer: (A (N, R, I), B (N, O, R))}, of any floating type; left as they are.
    local_step(factors, t, trains): trains all peers' factors in place for round t. They are views of the running state;
        whatever it does to a factor outside `trains` (a set of "A", "B") is undone, and so is, when it returns, what it does to
        slots that the rule does not train at a peer (`plora`).
    guard: as guard.norm in a recipe; none unless given, and then `rejected` counts among the measures.
    params: the rule's own, as in a recipe (`T=5`, `split="left"`).
    measure_every: rounds between measures, 0: none; measure_from: the first round that may be measured.
    ranks: the rank of every peer where they differ; the slots beyond it must be zero in `factors`.

    ValueError where rule, parameter, topology and factors do not fit each other; TypeError where peers hold different values of
    a factor that the rule takes for common (FFA's A).
    """
    layout, x = pack(factors)
    if len(x) != topology.num_peers:
        raise ValueError(f"factors hold {len(x)} peers, the topology {topology.num_peers}; they must be equal")
    check_averages(topology)
    plan = rules.build(rule, layout, ranks=ranks, peers=len(x), **with_mixing(rule, params, topology, rounds))
    rules.check_topology(rule, plan, topology)
    tag = digest_of_common(plan, layout, x)
    wire = codecs.build(codec)
    states = [plan.init(row) for row in x]
    history = []
    for t in range(rounds):
        _train(x, layout, local_step, t, plan)
        w = rows_that_average(topology, t)
        measured = measure_every and t >= measure_from and (t + 1) % measure_every == 0
        before = x.clone() if measured else x
        traffic = gossip(plan, wire, InProcess(), x, range(len(x)), states, w, t, tag=tag, guard=guard)
        if measured:
            history.append({"round": t, "edges": traffic.edges, "message_bytes": traffic.message_bytes,
                            **({} if guard is None else {"rejected": len(traffic.rejected)}),
                            **measure(before, x, w, layout)})
    return Simulation(unpack(x, layout), history)


def rows_that_average(topology: MixingSequence, t: int) -> np.ndarray:
    """W(t). ValueError where its rows do not sum to one: a sequence from outside may say nothing of itself."""
    w = topology.matrix(t)
    sums = w.sum(1)
    if not np.allclose(sums, 1, rtol=0, atol=1e-6):
        peer = int(np.abs(sums - 1).argmax())
        raise ValueError(f"row {peer} of W in round {t} sums to {sums[peer]:.6g}: receivers would not average; "
                         "allowed: rows that sum to one")
    return w


def with_mixing(rule: str, params: Mapping[str, object], topology: MixingSequence, rounds: int) -> dict[str, object]:
    """The rule's parameters, with the topology and the number of rounds for a rule that chooses its phases by them.

    ValueError for a topology that never brings peers together.
    """
    if not automatic_phases(rule, params):
        return dict(params)
    gap = 1.0 - _contraction(topology)
    if gap < 1e-9:
        raise ValueError(f"rule.T = 'auto' needs a topology that mixes, but its spectral gap is {gap:.1e}; "
                         "give a whole number from 1, or another topology")
    return {**params, "mixing": topology, "rounds": rounds}


@lru_cache(maxsize=8)
def _contraction(topology: MixingSequence) -> float:
    return spectrum.contraction(topology)


def _train(x: Tensor, layout: Layout, local_step: LocalStep, t: int, rule: Rule) -> None:
    trains = rule.trains(t)
    trained = torch.zeros(x.shape, dtype=torch.bool)
    for cut in layout.columns(trains):
        trained[:, cut] = True
    if rule.masks is not None:
        trained &= torch.stack([rule.masks(t, peer) for peer in range(len(x))])
    held = Held(trained, x.clone())
    local_step(unpack(x, layout), t, trains)
    held.put_back(x)
