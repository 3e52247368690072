"""The hosted peers: their rows, optimisers and data streams, and all that a stop may have to keep of them.

How they train is the local phase (`dfl.training.phase`), how they mix is gossip (`dfl.engine`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows, start_of
from dfl.adapters.batched import uploaded
from dfl.adapters.layout import empty_rows
from dfl.adapters.residuals import residual_rows
from dfl.config import TrainConfig
from dfl.config.optimizers import OPTIMIZERS
from dfl.training.factors import Factors
from dfl.training.optimizer import PeerOptimizer, learning_rate
from dfl.training.stream import DataStream, num_steps
from dfl.transport.base import FREE

# the first parts of the names of `state_tensors`; gossip has others
SLOTS = ("moments", "part", "generator", "part_start", "part_held")
Snapshot = tuple[Tensor, dict[str, Tensor]]  # rows (P, D), and moments by "peer.group.key"


@dataclass
class Part:
    """The local phase of a round while it lasts: all that it needs to go on after a stop between two steps.

    done: steps of each hosted peer. means, first: mean loss so far, and the first (P,). start: rows and moments at the
    round's start; held: the moments at the start that masks hold. generators: of the peers in the middle of their
    steps, by name.
    """

    done: list[int]
    means: Tensor
    first: Tensor
    start: Snapshot
    held: dict[str, Tensor]
    generators: list[dict[str, Tensor]]


def common_scale(adapted: Adapted, rows: Tensor, scale: Sequence[float] | None) -> Tensor:
    """A copy of rows (P, D) as if all adapters had the layout's scaling; scale: by how much each is scaled against it."""
    x = empty_rows(*rows.shape, device=rows.device)
    x.copy_(adapted.averageable(rows))
    if scale is not None:
        x[:, adapted.layout.groups["B"]] *= uploaded(scale, x, x.dtype)[:, None]
    return x


class HostedPeers:
    """The peers of this process: rows x_PD, gradient rows g_PD, optimiser state per peer and factor group."""

    def __init__(self, ids: Sequence[int], adapted: Adapted, streams: Sequence[DataStream], train: TrainConfig, *,
                 seed: int, device: torch.device):
        self.ids, self.adapted, self.streams, self.train = list(ids), adapted, list(streams), train
        self.seed, self.device, self.layout = seed, device, adapted.layout
        self.x = empty_rows(len(self.ids), self.layout.size, device=device, before=FREE)
        for row, peer in enumerate(self.ids):
            self.x[row] = start_of(adapted, peer).to(device)
        self.g = empty_rows(len(self.ids), self.layout.size, device=device)
        self.factors = Factors(adapted, self.x, self.g)
        steps = [self.steps(row) for row in range(len(self.ids))]
        self.optimizer = PeerOptimizer(self.ids, self.x, self.g, self.layout, train, steps)
        self.part: Part | None = None  # of a local phase that was stopped before its end
        self._start: Snapshot | None = None

    @property
    def scale(self) -> tuple[float, ...] | None:
        """By how much each peer's adapter is scaled against the layout's; None: all alike."""
        ratios = tuple(self.adapted.ranks.ratio(peer) for peer in self.ids)
        return None if all(ratio == 1.0 for ratio in ratios) else ratios

    def rows(self, residuals: Tensor | None = None) -> Rows:
        """What the model reads of the hosted peers now, with the residuals (P, D_E) that their rule keeps."""
        return Rows(self.factors.refresh(), residual_rows(self.adapted, residuals, self.x), self.scale)

    def common_scale(self) -> Tensor:
        """A copy of the rows (P, D) as if all adapters had one scaling, in which they can be compared and averaged."""
        return common_scale(self.adapted, self.x, self.scale)

    def steps(self, row: int) -> int:
        """Optimiser steps of a round."""
        return num_steps(self.train, self.streams[row].batches_per_epoch)

    def learning_rate(self, progress: float) -> float:
        """train.lr at `progress` in [0, 1] of the run."""
        return learning_rate(self.train, progress)

    def rates(self, progress: float) -> dict[str, float]:
        """The rate of every group of a row at `progress` of the run."""
        return self.optimizer.rates(progress)

    @property
    def turns_moments(self) -> bool:
        return self.optimizer.turns_moments

    def after_refactor(self, frames: Tensor | None, mixed: Collection[int]) -> None:
        """The factors of the peers `mixed` have a new basis, and the moments follow. frames: the rows (P, D) before."""
        self.optimizer.after_refactor(frames, self.x, mixed)

    def begin_phase(self, trains: frozenset[str], masked: bool) -> Part:
        """The part of the phase that was stopped, or of one that begins now."""
        if masked and not OPTIMIZERS[self.train.optimizer].masks:
            able = [name for name, one in OPTIMIZERS.items() if one.masks]
            raise ValueError(f"train.optimizer = {self.train.optimizer!r} cannot leave out single numbers, as this run's schedule "
                             f"does; allowed: {', '.join(able)}")
        if self.part is None:
            start, self._start = self.round_start(), None
            self.optimizer.begin_round(trains)
            means, first = torch.zeros(2, len(self.ids), device=self.device)
            held = {name: value.clone() for name, value in self.optimizer.moments().items()} if masked else {}
            self.part = Part([0] * len(self.ids), means, first, start, held, [{} for _ in self.ids])
        return self.part

    def end_phase(self) -> None:
        """The local phase is done on all processes, and what it began from is no longer needed."""
        self.part = None

    def give_up_phase(self) -> None:
        """The local phase is not gone on with, as of a round that begins again."""
        self.part = self._start = None
        self.adapted.model.eval()

    def round_start(self) -> Snapshot:
        """A snapshot from the start of the round at work, or of the one that begins now."""
        if self.part:
            return self.part.start
        self._start = self._start or self.snapshot()
        return self._start

    def snapshot(self) -> Snapshot:
        """Copies of rows and moments as they are now, for what may have to be taken back."""
        return self.x.clone(), {name: value.clone() for name, value in self.optimizer.moments().items()}

    def restore(self, snapshot: Snapshot) -> None:
        self.x.copy_(snapshot[0])
        self.optimizer.reset()
        self.optimizer.load(snapshot[1])

    def state_tensors(self) -> dict[str, Tensor]:
        """What goes on after a stop needs beside the rows: moments, and of a stopped local phase its part, by peer."""
        if self.part is None:
            return {f"moments.{name}": value for name, value in self.optimizer.moments().items()}
        part, found = self.part, {f"moments.{name}": value for name, value in self.optimizer.all_moments().items()}
        for row, peer in enumerate(self.ids):
            found |= {f"part.{peer}.done": torch.tensor([part.done[row]]), f"part.{peer}.start": part.start[0][row],
                      f"part.{peer}.losses": torch.stack([part.means[row], part.first[row]])}
            found |= {f"generator.{peer}.{name}": value for name, value in part.generators[row].items()}
        found |= {f"part_start.{name}": value for name, value in part.start[1].items()}
        return found | {f"part_held.{name}": value for name, value in part.held.items()}

    def load_state(self, saved: dict[str, Tensor], last_trained: frozenset[str]) -> None:
        """Put back what `state_tensors` gave, for the peers hosted here; `last_trained` of a part: by its round."""
        slots: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.items():
            slot, _, rest = name.partition(".")
            slots.setdefault(slot, {})[rest] = value
        self.optimizer.load(slots.get("moments", {}), last_trained)
        if f"{self.ids[0]}.done" in slots.get("part", {}):
            self.part = self._part_of(slots)

    def _part_of(self, slots: dict[str, dict[str, Tensor]]) -> Part:
        parts = slots["part"]
        losses = torch.stack([parts[f"{peer}.losses"] for peer in self.ids]).to(self.device)
        start = empty_rows(*self.x.shape, device=self.device)
        for row, peer in enumerate(self.ids):
            start[row] = parts[f"{peer}.start"].to(self.device)
        generators = [{name.partition(".")[2]: value for name, value in slots.get("generator", {}).items()
                       if name.partition(".")[0] == str(peer)} for peer in self.ids]
        begun, held = ({name: value.to(self.device) for name, value in slots.get(slot, {}).items()} for slot in SLOTS[-2:])
        return Part([int(parts[f"{peer}.done"]) for peer in self.ids], losses[:, 0].clone(), losses[:, 1].clone(),
                    (start, begun), held, generators)
