"""A few rounds of a recipe, watched: how the consensus and the peers get better, how far peers drift, what a step takes.

They are rounds as any run has them (`dfl.run.loop`), of all peers in this process, without codec, trigger, loss or delay, so that what
is seen is training and the graph alone. Nothing is written.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted
from dfl.adapters.layout import scalings, stack_a, stack_b
from dfl.config import Config, from_dict
from dfl.metrics.measures import with_residual
from dfl.plan.model import Moments
from dfl.run import build
from dfl.run.loop import Hooks, Run, run_rounds
from dfl.run.runtime import start
from dfl.seeds import derive

EVALUATIONS = 12  # of a probe, about
PUSHES = 4  # the last rounds whose updates are kept
_DIRECTIONS = 16
# what a probe has in these slots, whatever is planned
PLAIN = {"codec": "none", "trigger": "always", "channel": "perfect", "network": "none", "delay": 0}


class Probe(NamedTuple):
    """steps, consensus, peers, distances: of each evaluation the local steps until then, the metric of the consensus, its mean over
    peers, and Xi^2. all_distances: Xi^2 after each round. moments: of each round. step_seconds: of one peer here. updates (K, P, D):
    what the last local phases changed; rms: the root mean square of their numbers. run: as the rounds left it."""

    metric: str
    higher: bool
    local_steps: int
    steps: list[int]
    consensus: list[float]
    peers: list[float]
    distances: list[float]
    all_distances: list[float]
    moments: list[Moments]
    step_seconds: float
    updates: Tensor
    run: Run

    @property
    def rms(self) -> float:
        return float(self.updates.double().square().mean().sqrt())


def probe(config: Config, rounds: int, examples: build.Examples) -> Probe:
    """Train `rounds` rounds of a configuration of which everything else is as in a whole run. DivergenceError as of a run."""
    config = _plain(config, rounds)
    topology, runtime = build.check(config), start(config)
    run = build.assemble(config, runtime, build.load(config, runtime.device, examples), topology)
    watched = Watched(run)
    run.gossip = watched  # type: ignore[assignment]  # all that a loop asks of gossip
    lines: list[dict[str, Any]] = []
    run_rounds(run, Hooks(lines.append, lambda: None, lambda: run.completed + 1 >= rounds))
    run.gossip = watched.gossip
    return _read(run, watched, lines, config)


def _plain(config: Config, rounds: int) -> Config:
    tree = config.to_dict() | PLAIN | {"callbacks": [], "report_to": [], "baseline": None, "membership": {}, "processes_per_peer": 1}
    tree["eval"] |= {"every": math.ceil(rounds / EVALUATIONS), "consensus": True, "patience": None}
    tree["eval"]["generate"] |= {"examples": 0}
    tree["measure"] |= {"every": 0, "layers": 0}
    tree["train"]["rounds"] = max(rounds, config.train.rounds)  # rates follow the length of a whole run
    return from_dict(tree)


def _read(run: Run, watched: "Watched", lines: list[dict[str, Any]], config: Config) -> Probe:
    evaluated = [line for line in lines if "eval" in line]
    metric, rounds = run.evaluator.primary, [line["round"] for line in evaluated]
    distances = [0.0, *watched.distances]
    steps = config.train.local_steps
    assert steps is not None  # plans count them
    seconds = [line["seconds"]["local"] / (steps * config.peers) for line in lines if line["round"]]
    return Probe(metric, run.evaluator.better()[metric] == "higher", steps, [steps * t for t in rounds],
                 [line["eval"]["consensus"][metric] for line in evaluated], [line["eval"][metric]["mean"] for line in evaluated],
                 [distances[t] for t in rounds], watched.distances, watched.moments,
                 statistics.median(seconds[1:] or seconds), torch.stack(watched.updates), run)


class Watched:
    """Gossip of all peers with a look at their products before and after each local phase, and after each mix."""

    def __init__(self, run: Run):
        self.run, self.gossip = run, run.gossip
        self.moments: list[Moments] = []
        self.distances: list[float] = []
        self.updates: list[Tensor] = []
        self._before = self._drift = centred(products(run))
        self._rows = run.peers.x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gossip, name)

    def begin(self, t: int, x: Tensor, **told: Any) -> None:
        self._before, self._rows = centred(products(self.run)), x.clone()
        self.gossip.begin(t, x, **told)

    def round(self, t: int, x: Tensor, **told: Any) -> Any:
        drift = centred(products(self.run)) - self._before
        before, earlier = self._before, self._drift if self.moments else torch.zeros_like(drift)
        self.moments.append(Moments(*(inner(a, b) for a, b in ((drift, drift), (drift, earlier), (drift, before),
                                                               (earlier, earlier), (earlier, before), (before, before)))))
        self._drift = drift
        self.updates = [*self.updates, x - self._rows][-PUSHES:]
        report = self.gossip.round(t, x, **told)
        after = centred(products(self.run))
        self.distances.append(inner(after, after))
        return report


def products(run: Run) -> Tensor:
    """What the model reads of all peers, as vectors (P, S)."""
    return vectors(run.peers.adapted, run.peers.common_scale(), run.gossip.residuals(), run.rule.residual)


def vectors(adapted: Adapted, rows: Tensor, kept: Tensor | None = None, residual: Any = None) -> Tensor:
    """Rows (P, D) as vectors (P, S) float64 in which distances are, on average over draws, those of products and of what is trained
    beside them. No change of basis of the factors shows.

    Of each layer scaling B A Q with a normal Q (I, 16) of which E Q Q' = I, the same always (Johnson-Lindenstrauss): linear in the
    product, and as long as B for a rank of 16.
    """
    x, layout = with_residual(adapted.factors(rows), adapted.lora, kept, residual)
    found = [rows[:, cut].double() for cut in (adapted.layout.groups.get(group) for group in ("M", "head")) if cut is not None]
    for pairs in layout.shapes():
        seen = stack_a(x, pairs).double() @ _draws(pairs[0].d_in).to(x.device)
        found.append((stack_b(x, pairs).double() @ seen * scalings(pairs, x)[:, None, None]).flatten(1))
    return torch.cat(found, 1)


def _draws(length: int) -> Tensor:
    if length <= _DIRECTIONS:
        return torch.eye(length, dtype=torch.float64)
    generator = torch.Generator().manual_seed(derive(0, "plan", length))
    return torch.randn(length, _DIRECTIONS, dtype=torch.float64, generator=generator) / _DIRECTIONS**0.5


def centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def inner(one: Tensor, other: Tensor) -> float:
    """The mean over peers of inner products."""
    return float((one * other).sum() / len(one))


def gains(values: Sequence[float], higher: bool) -> list[float]:
    """With more being better."""
    return [value if higher else -value for value in values]
