"""Any method on any topology with the caller's own local step: no model, no processes, the round that a run takes."""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from dfl import extensions, methods
from dfl.adapters.layout import Layout, pack, unpack
from dfl.engine.gossip import Gossip
from dfl.engine.ways import Graph
from dfl.methods import Choice, Context, Method
from dfl.metrics.measures import measure, seen
from dfl.slots import Mixing, Plan
from dfl.training.base import AfterStep, Halt
from dfl.training.masks import Held, stacked, stretch
from dfl.transport import InProcess
from dfl.transport.ledger import Ledger, together, total

Factors = Mapping[str, tuple[Tensor, Tensor]]
LocalStep = Callable[..., None]


class Simulation(NamedTuple):
    """The factors after the last round, in the shape they came in, and a dict of measures for each measured round; what
    each peer has sent in all rounds."""

    factors: dict[str, tuple[Tensor, Tensor]]
    measures: list[dict[str, float]]
    ledger: dict[int, Ledger]


def simulate(method: str, topology: Mixing, factors: Factors, local_step: LocalStep, rounds: int, *,
             schedule: str | Choice | None = None, rule: str | Choice | None = None, trigger: str | Choice = "always",
             codec: str | Choice = "none", channel: str | Choice = "perfect", guard: str | Choice = "finite",
             wrapper: str | Choice = "none", network: str | Choice = "none", delay: int = 0,
             measure_every: int = 1, measure_from: int = 0, ranks: Sequence[int] | None = None, lr: float = 0.0,
             local_steps: int = 0, seed: int = 0, **params: Any) -> Simulation:
    """Run `rounds` rounds of `method` over `topology` with the caller's own local training.

    factors: {layer: (A (N, R, I), B (N, O, R))}, of any floating type; left as they are.
    local_step(factors, t, trains): trains all peers' factors in place for round t. They are views of the running state;
        whatever it does to a factor outside `trains` (a set of "A", "B") is undone, and so is, when it returns, what it
        does to slots that the schedule does not train at a peer (`plora`). Where the method changes rows after every local
        step (most wrappers) it is local_step(factors, t, trains, after_step), and calls after_step() behind each of its
        `local_steps` steps.
    schedule, rule, trigger, codec, channel, guard, wrapper, network: what fills these slots, a name or
        `dfl.methods.Choice(name, parameters)`; schedule or rule None: the method's own.
    delay: 1: each round mixes what the peers had before it, with what `local_step` changed meanwhile.
    params: the method's own, as in a recipe (`T=5`, `split="left"`).
    measure_every: rounds between measures, 0: none; measure_from: the first round that may be measured.
    ranks: the rank of every peer where they differ; the slots beyond it must be zero in `factors`.
    lr, local_steps: what `local_step` uses, for methods that have to know. What a rule would add to the gradients of
        local steps (the penalty of `hetlora`) it does not see.

    ValueError where method, parameter, topology and factors do not fit each other; TypeError where peers hold different
    values of a factor that the method takes for common (FFA's A).
    """
    layout, x = pack(factors)
    if len(x) != topology.num_peers:
        raise ValueError(f"factors hold {len(x)} peers, the topology {topology.num_peers}; they must be equal")
    extensions.load()
    given = {"schedule": schedule, "rule": rule, "trigger": trigger, "codec": codec, "channel": channel, "guard": guard,
             "wrapper": wrapper, "network": network}
    slots = {slot: Choice(choice) if isinstance(choice, str) else choice for slot, choice in given.items() if choice is not None}
    context = Context(layout, ranks=None if ranks is None else tuple(ranks), peers=len(x), topology=topology, rounds=rounds)
    built = methods.build(method, context, params, slots, delay)
    methods.check_topology(built, topology, slots)
    _check_local_step(built, local_step, slots)
    graph = cast(Graph, topology) if hasattr(topology, "receivers") else Rows(topology, columns=built.rule.columns)
    transport = InProcess()
    gossip = Gossip(built, layout, graph, transport, range(len(x)), x, seed=seed)
    trainer = OwnStep(layout, local_step)
    history: list[dict[str, float]] = []
    ledger: dict[int, Ledger] = {}
    for t in range(rounds):
        gossip.begin(t, x, lr=lr, local_steps=local_steps)
        trainer.run(x, gossip.plans(t), gossip.corrections(), t, after_step=gossip.after_step(t, lr=lr, local_steps=local_steps))
        measured = measure_every and t >= measure_from and (t + 1) % measure_every == 0
        before = x.clone() if measured else x
        report = gossip.round(t, x, lr=lr, local_steps=local_steps)
        ledger = together(ledger, report.ledger)
        if measured:
            history.append({"round": t, "edges": report.messages, "message_bytes": report.message_bytes,
                            "broadcasts": report.broadcasts, "lost": report.lost, "rejected": len(report.rejected),
                            "sent_bytes": total(ledger).total_bytes, "seconds": total(ledger).seconds,
                            "aggregations": report.aggregations,
                            **measure(transport, seen(before, x, _averaging(gossip, t), range(len(x)), layout), len(x))})
    return Simulation(unpack(x, layout), history, ledger)


def _averaging(gossip: Gossip, t: int) -> np.ndarray:
    """W(t) as means, (N, N)."""
    w = np.zeros((len(gossip.peers), len(gossip.peers)))
    for i in gossip.peers:
        for j, weight in gossip.averaging(t, i).items():
            w[i, j] = weight
    return w


class Rows:
    """Rows and columns of a sequence that gives matrices alone. The last one is kept.

    ValueError where the rows of W(t), or its columns for a method that divides by a mass, do not sum to one: a sequence
    from outside may say nothing of itself.
    """

    def __init__(self, sequence: Mixing, columns: bool = False):
        self.sequence, self.columns, self._last = sequence, columns, (-1, np.zeros((0, 0)))
        self.num_peers = sequence.num_peers

    def matrix(self, t: int) -> np.ndarray:
        if self._last[0] != t:
            self._last = (t, np.asarray(self.sequence.matrix(t)))
            sums = self._last[1].sum(0 if self.columns else 1)
            if not np.allclose(sums, 1, rtol=0, atol=1e-6):
                peer, what = int(np.abs(sums - 1).argmax()), "column" if self.columns else "row"
                meaning = "senders would not divide what they have" if self.columns else "receivers would not average"
                raise ValueError(f"{what} {peer} of W in round {t} sums to {sums[peer]:.6g}: {meaning}; allowed: {what}s that "
                                 "sum to one")
        return self._last[1]

    def neighbors(self, t: int, i: int) -> dict[int, float]:
        return {int(j): float(self.matrix(t)[i, j]) for j in np.flatnonzero(self.matrix(t)[i])}

    def receivers(self, t: int, j: int) -> list[int]:
        return [int(i) for i in np.flatnonzero(self.matrix(t)[:, j]) if i != j]


def _check_local_step(method: Method, local_step: LocalStep, slots: Mapping[str, Choice]) -> None:
    """ValueError for a local step that does not take what the method does behind each of its steps."""
    if method.rule.after_step is None:
        return
    try:
        inspect.signature(local_step).bind(None, None, None, None)
    except TypeError:
        raise ValueError(f"wrapper = {slots['wrapper'].name!r} changes the rows after every local step; local_step must take "
                         "(factors, t, trains, after_step), and call after_step() behind each of its steps") from None


class OwnStep:
    """The caller's own local training: a `dfl.training.base.LocalTrainer`.

    It gives no losses and does not stop. Gradients are the caller's, and so is what a rule would add to them
    (hetlora's penalty).
    """

    def __init__(self, layout: Layout, local_step: LocalStep):
        self.layout, self.local_step = layout, local_step

    def run(self, x: Tensor, plans: Sequence[Plan], corrections: Sequence[Tensor | None], t: int, *,
            residuals: Tensor | None = None, after_step: AfterStep | None = None, halt: Halt | None = None) -> Tensor | None:
        trains = plans[0].trains
        trained = torch.zeros(x.shape, dtype=torch.bool)
        for cut in self.layout.columns(trains):
            trained[:, cut] = True
        masks = stacked([plan.mask for plan in plans], x.shape[1])
        if masks is not None:
            trained &= masks
        held, steps = Held(trained, x.clone()), itertools.count()

        def behind_a_step(change: AfterStep) -> None:
            k = next(steps)
            x.copy_(torch.where(trained, torch.stack([change(row, x[row], k) for row in range(len(x))]), x))

        begun = x.clone()
        behind = [functools.partial(behind_a_step, after_step)] if after_step else []
        self.local_step(unpack(x, self.layout), t, trains, *behind)
        for row, plan in enumerate(plans):
            stretch(x[row], begun[row], plan.stretch)
        held.put_back(x)
        return torch.full((len(x),), torch.nan)
