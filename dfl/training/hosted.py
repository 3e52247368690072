"""The hosted peers: their rows, optimisers, data streams, and the local phase of a round."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dfl.adapters import cores
from dfl.adapters.attach import Adapted, Rows, start_of
from dfl.adapters.layout import GROUPS, Layout, empty_rows
from dfl.adapters.residuals import residual_rows
from dfl.config import TrainConfig
from dfl.seeds import derive, permutation
from dfl.slots import Plan
from dfl.training.dropout import PeerDropout
from dfl.training.executors import Executor, autocasts
from dfl.training.masks import Held
from dfl.training.moments import rotate


class DivergenceError(FloatingPointError):
    """The loss or the factors of peer `peer` are not finite; `at_start`: already those it began the round with."""

    def __init__(self, message: str, peer: int = -1, at_start: bool = False):
        super().__init__(message)
        self.peer, self.at_start = peer, at_start


class DataStream:
    """The batches of one peer, random access: batch number s is a function of (seed, peer, s) alone.

    Every pass over the shard is a new permutation; a batch that meets the end of one goes on in the next.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, peer: int):
        self.indices, self.batch_size, self.seed, self.peer = indices, batch_size, seed, peer
        self._epoch, self._order = -1, indices

    @property
    def batches_per_epoch(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def batch(self, number: int) -> np.ndarray:
        """Example indices (batch_size,) of batch `number`."""
        positions = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self.indices))
        return np.concatenate([self._shuffled(e)[offsets[epochs == e]] for e in np.unique(epochs)])

    def _shuffled(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._order = self.indices[permutation(len(self.indices), self.seed, "data", self.peer, epoch)]
            self._epoch = epoch
        return self._order


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
    start: tuple[Tensor, dict[str, Tensor]]
    held: dict[str, Tensor]
    generators: list[dict[str, Tensor]]


class HostedPeers:
    """The peers of this process: rows x_PD, gradient rows g_PD, optimiser state per peer and factor group."""

    def __init__(self, ids: Sequence[int], adapted: Adapted, streams: Sequence[DataStream], train: TrainConfig, *,
                 seed: int, device: torch.device):
        self.ids, self.adapted, self.streams, self.train = list(ids), adapted, list(streams), train
        self.seed, self.device, self.layout = seed, device, adapted.layout
        self.x = empty_rows(len(self.ids), self.layout.size, device=device)
        for row, peer in enumerate(self.ids):
            self.x[row] = start_of(adapted, peer).to(device)
        self.g = empty_rows(len(self.ids), self.layout.size, device=device)
        # what the model reads: the rows themselves, or the factors that their cores make
        self.factors, self.factor_gradients = self.x, self.g
        if adapted.cores:
            self.factors, self.factor_gradients = (empty_rows(len(self.ids), adapted.lora.size, device=device) for _ in range(2))
            self._bases = adapted.cores._replace(bases=adapted.cores.bases.to(device))
        ratios = tuple(adapted.ranks.ratio(peer) for peer in self.ids)
        self.scale = None if all(ratio == 1.0 for ratio in ratios) else ratios
        self.params = [_by_group(row, self.layout) for row in self.x]
        self.grads = [_by_group(row, self.layout) for row in self.g]
        self.optimizer = self._make_optimizer()
        self.generators = [torch.Generator(device) for _ in self.ids]
        self._active: frozenset[str] = frozenset()
        self._held: Held | None = None
        self.part: Part | None = None  # of a local phase that was stopped before its end
        self._start: tuple[Tensor, dict[str, Tensor]] | None = None

    def _make_optimizer(self) -> torch.optim.Optimizer:
        # what has equally many steps and the same ratio shares a parameter group, and with it the rate of a step
        shared: dict[tuple[int, float], list[Tensor]] = {}
        for row, params in enumerate(self.params):
            for group, parameter in params.items():
                shared.setdefault((self.steps(row), self.ratio(group)), []).append(parameter)
        flat = [{"params": params, "steps": steps, "ratio": ratio} for (steps, ratio), params in shared.items()]
        train = self.train
        if train.optimizer == "sgd":
            return torch.optim.SGD(flat, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=True)
        return torch.optim.AdamW(flat, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay,
                                 fused=True)

    def rows(self, residuals: Tensor | None = None) -> Rows:
        """What the model reads of the hosted peers now, with the residuals (P, D_E) that their rule keeps."""
        self._expand()
        return Rows(self.factors, residual_rows(self.adapted, residuals, len(self.ids)), self.scale)

    def common_scale(self) -> Tensor:
        """A copy of the rows (P, D) as if all adapters had one scaling, in which they can be compared and averaged."""
        x = empty_rows(*self.x.shape, device=self.device)
        x.copy_(self.adapted.averageable(self.x))
        if self.scale is not None:
            x[:, self.layout.groups["B"]] *= x.new_tensor(self.scale)[:, None]
        return x

    @property
    def turns_moments(self) -> bool:
        return self.train.state == "carried" and self.train.at_refactor == "rotate"

    def after_refactor(self, frames: Tensor | None, mixed: Collection[int]) -> None:
        """The factors of the peers `mixed` have a new basis: apply train.at_refactor to the moments. frames: the rows
        (P, D) before, for rotate."""
        if self.train.state == "fresh" or self.train.at_refactor == "reset":
            self.reset_moments(rows=[row for row, peer in enumerate(self.ids) if peer in mixed])
        elif self.train.at_refactor == "rotate":
            for row, (old, new) in enumerate(zip(frames, self.x, strict=True)):
                if not torch.equal(old, new):
                    states = {group: self.optimizer.state.get(p, {}) for group, p in self.params[row].items()}
                    rotate(states, self.layout, old, new)

    def _expand(self) -> None:
        if self.adapted.cores:
            cores.expand(self._bases, self.x, self.factors)

    def steps(self, row: int) -> int:
        """Optimiser steps of a round."""
        if self.train.local_steps is not None:
            return self.train.local_steps
        return max(1, math.ceil(self.train.local_epochs * self.streams[row].batches_per_epoch / self.train.accumulation))

    def learning_rate(self, progress: float) -> float:
        """train.lr at `progress` in [0, 1] of the run: linear warm-up, then the schedule."""
        train = self.train
        if progress < train.warmup:
            return train.lr * progress / train.warmup
        rest = (progress - train.warmup) / (1 - train.warmup)
        factor = {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[train.schedule]
        return train.lr * factor

    def ratio(self, group: str) -> float:
        """The rate of a group of trained numbers over `learning_rate`."""
        return getattr(self.train.lr_ratio, group)

    def rates(self, progress: float) -> dict[str, float]:
        """The rate of every group of a row at `progress` of the run."""
        return {group: self.learning_rate(progress) * self.ratio(group) for group in self.layout.groups
                if self.layout.has(group)}

    def reset_moments(self, groups=GROUPS, rows: Sequence[int] | None = None) -> None:
        """Of all hosted peers, or of those in `rows`."""
        for params in self.params if rows is None else [self.params[row] for row in rows]:
            for group in set(groups) & set(params):
                self.optimizer.state.pop(params[group], None)

    def begin_round(self, trains: frozenset[str]) -> None:
        """Apply the policy for optimiser moments across rounds and at a switch of the trained factor."""
        if self.train.state == "fresh":
            self.reset_moments()
        elif self.train.at_switch == "fresh":
            self.reset_moments(trains - self._active)
        self._active = trains

    def local_phase(self, t: int, plans: Sequence[Plan], task, split, executor: Executor, corrections: Sequence[Tensor | None],
                    residuals: Tensor | None = None, halt: Callable[[int], bool] | None = None,
                    after_step: Callable[[int, Tensor, int], Tensor] | None = None) -> Tensor | None:
        """Every hosted peer takes its local steps of round t as its plan says: the mean loss of each peer (P,).

        What a plan's mask leaves out keeps its value and its moments. residuals: those (P, D_E) that the rule keeps. after_step(row,
        x_D, k) -> x_D: what the rule makes of the trained numbers of a row after the optimiser's step k.
        halt: asked before every step, with the number of steps that are left; where it says so the phase stops, gives
        None and goes on with the next call, or, from what `state_tensors` gave, in another process. Who gives `halt`
        has to call `end_phase`: until then a phase that is done can be saved as well, as another process may have
        stopped in its own. DivergenceError names the first peer whose loss is not finite.
        """
        trains, masks, rows = plans[0].trains, [plan.mask for plan in plans], self.rows(residuals)
        self.part = self.part or self._begin(trains, masks[0] is not None)
        # what is left out has the values of the start still
        self._held = None if masks[0] is None else Held(torch.stack(masks), self.x.clone(), self.part.held)
        self.adapted.model.train()
        for index in executor.groups(len(self.ids)):
            if not self._train(t, rows, index, trains, task, split, executor, corrections, halt, after_step):
                self._check_finite(t)
                return None
        if self._held:
            self._held.put_back_moments(self.moments(), self.ids, self.layout)
        self.adapted.model.eval()
        self._check_finite(t)
        means = self.part.means
        if halt is None:
            self.end_phase()
        return means

    def end_phase(self) -> None:
        """The local phase is done on all processes, and what it began from is no longer needed."""
        self.part = None

    def _begin(self, trains: frozenset[str], masked: bool) -> Part:
        start, self._start = self.round_start(), None
        self.begin_round(trains)
        means, first = torch.zeros(2, len(self.ids), device=self.device)
        held = {} if not masked else {name: value.clone() for name, value in self.moments().items()}
        return Part([0] * len(self.ids), means, first, start, held, [{} for _ in self.ids])

    def round_start(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A snapshot from the start of the round at work, or of the one that begins now."""
        if self.part:
            return self.part.start
        self._start = self._start or self.snapshot()
        return self._start

    def _train(self, t, rows: Rows, index: list[int], trains, task, split, executor, corrections, halt, after_step) -> bool:
        """The steps of the rows `index`, which go through the model together; False when halted before the last."""
        part = self.part
        unfinished = [row for row in index if part.done[row] < self.steps(row)]
        if not unfinished:
            return True
        self._seed(t, index)
        with executor.bound(self.adapted, rows, self.factor_gradients, index, self.adapted.reads(trains)) as forward:
            # peers that come from several processes may have stopped at different steps: those behind catch up first
            for k in range(min(part.done[row] for row in unfinished), max(map(self.steps, index))):
                active = [row for row in index if part.done[row] <= k < self.steps(row)]
                if halt and halt(sum(self.steps(row) - done for row, done in enumerate(part.done))):
                    self._keep_generators(index)
                    return False
                losses = self._step(t, k, active, trains, task, split, forward, corrections)
                self._after_step(k, active, trains, after_step)
                part.means[active] += losses / torch.tensor([self.steps(r) for r in active], device=self.device)
                if k == 0:
                    part.first[active] = losses
                for row in active:
                    part.done[row] = k + 1
        return True

    def _seed(self, t: int, rows: list[int]) -> None:
        """The generators for the steps of these rows: from the seed, or as they were when the rows stopped."""
        for row in rows:
            self.generators[row].manual_seed(derive(self.seed, "local", self.ids[row], t))
        # what draws from the global generator (stochastic depth) must not depend on the hosting either
        _seed_global(derive(self.seed, "global", self.ids[rows[0]], t), self.device)
        for row in rows:
            kept = self.part.generators[row]
            if kept:
                self.generators[row].set_state(kept["own"])
                torch.set_rng_state(kept["global"])
                if "device" in kept:
                    torch.cuda.set_rng_state(kept["device"], self.device)
            self.part.generators[row] = {}

    def _keep_generators(self, rows: list[int]) -> None:
        for row in rows:
            if 0 < self.part.done[row] < self.steps(row):
                on_device = {"device": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
                self.part.generators[row] = {"own": self.generators[row].get_state(), "global": torch.get_rng_state(), **on_device}

    def _step(self, t, k, active, trains, task, split, forward, corrections) -> Tensor:
        self._zero_gradients(active)
        self._expand()
        total = torch.zeros(len(active), device=self.device)
        for micro in range(self.train.accumulation):
            numbers = [(t * self.steps(row) + k) * self.train.accumulation + micro for row in active]
            batch = self._collate(task, split, active, numbers)
            with self._autocast(), PeerDropout([self.generators[row] for row in active]):
                output = forward(task.inputs(batch), active)
            losses = task.losses(output, batch, len(active))
            (losses.sum() / self.train.accumulation).backward()
            total += losses.detach() / self.train.accumulation
        if self.adapted.cores:
            cores.pull_back(self._bases, self.x, self.factor_gradients, self.g)
        self._correct_and_clip(active, trains, corrections)
        self._set_gradients(active, trains)
        for group in self.optimizer.param_groups:
            group["lr"] = group["ratio"] * self.learning_rate((t + min(k / group["steps"], 1)) / self.train.rounds)
        self.optimizer.step()
        return total

    def _after_step(self, k: int, active: list[int], trains, after_step) -> None:
        for row in active if after_step else ():
            changed = after_step(row, self.x[row], k)
            for cut in self.layout.columns(trains):
                self.x[row, cut] = changed[cut]
        if self._held:
            self._held.put_back(self.x)

    def _collate(self, task, split, active, numbers) -> dict[str, Tensor]:
        chosen = np.concatenate([self.streams[row].batch(number) for row, number in zip(active, numbers, strict=True)])
        batch = task.collate([split.features[i] for i in chosen])
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=autocasts(self.train.autocast, self.device))

    def _zero_gradients(self, active: list[int]) -> None:
        # in place: the gradients are views that autograd accumulates into
        for g in (self.g,) if self.factor_gradients is self.g else (self.g, self.factor_gradients):
            if len(active) == len(g):
                g.zero_()
            else:
                for row in active:
                    g[row].zero_()

    def _correct_and_clip(self, active, trains, corrections) -> None:
        for row in active:
            if corrections[row] is not None:
                self.g[row] += corrections[row]
        if self._held:  # what is not trained does not count for the norm
            self._held.clear(self.g)
        if self.train.clip is None:
            return
        g = self.g if len(active) == len(self.g) else self.g[active]
        squares = sum(g[:, cut].square().sum(1) for cut in self.layout.columns(trains))
        factor = (self.train.clip / (squares.sqrt() + 1e-6)).clamp_max(1.0)
        if len(active) == len(self.g):
            self.g.mul_(factor[:, None])
        else:
            for row, value in zip(active, factor, strict=True):
                self.g[row].mul_(value)

    def _set_gradients(self, active, trains) -> None:
        """Only active peers and trained groups take the optimiser's step."""
        for row, (params, grads) in enumerate(zip(self.params, self.grads, strict=True)):
            for group, parameter in params.items():
                parameter.grad = grads[group] if row in active and group in trains else None

    def _check_finite(self, t: int) -> None:
        means, first = self.part.means, self.part.first
        bad = (~(torch.isfinite(means) & torch.isfinite(self.x).all(1))).nonzero().flatten().tolist()
        if bad:
            peer, at_start = self.ids[bad[0]], not bool(torch.isfinite(first).all())
            self.part = None
            raise DivergenceError(f"peer {peer} diverged in round {t + 1}: mean training loss {float(means[bad[0]])}", peer, at_start)

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state as named tensors, to be saved; empty when moments do not survive a round."""
        return {} if self.train.state == "fresh" else self._all_moments()

    def _all_moments(self) -> dict[str, Tensor]:
        return {f"{self.ids[row]}.{group}.{key}": value for row, params in enumerate(self.params)
                for group, p in params.items() for key, value in self.optimizer.state.get(p, {}).items()
                if isinstance(value, Tensor)}

    def state_tensors(self) -> dict[str, Tensor]:
        """What goes on after a stop needs beside the rows: moments, and of a local phase that was stopped, its part, by peer."""
        if self.part is None:
            return {f"moments.{name}": value for name, value in self.moments().items()}
        part, found = self.part, {f"moments.{name}": value for name, value in self._all_moments().items()}
        for row, peer in enumerate(self.ids):
            found |= {f"part.{peer}.done": torch.tensor([part.done[row]]), f"part.{peer}.losses": torch.stack([part.means[row],
                      part.first[row]]), f"part.{peer}.start": part.start[0][row]}
            found |= {f"generator.{peer}.{name}": value for name, value in part.generators[row].items()}
        found |= {f"start.{name}": value for name, value in part.start[1].items()}
        return found | {f"held.{name}": value for name, value in part.held.items()}

    def load_state(self, saved: dict[str, Tensor], last_trained: frozenset[str]) -> None:
        """Put back what `state_tensors` gave, for the peers hosted here; `last_trained` of a part is what its round trains."""
        kinds: dict[str, dict[str, Tensor]] = {}
        for name, value in saved.items():
            kind, _, rest = name.partition(".")
            kinds.setdefault(kind, {})[rest] = value
        self.load_moments(kinds.get("moments", {}), last_trained)
        parts = kinds.get("part", {})
        if f"{self.ids[0]}.done" not in parts:
            return
        losses = torch.stack([parts[f"{peer}.losses"] for peer in self.ids]).to(self.device)
        start = empty_rows(*self.x.shape, device=self.device)
        for row, peer in enumerate(self.ids):
            start[row] = parts[f"{peer}.start"].to(self.device)
        generators = [{name.partition(".")[2]: value for name, value in kinds.get("generator", {}).items()
                       if name.partition(".")[0] == str(peer)} for peer in self.ids]
        begun, held = ({name: value.to(self.device) for name, value in kinds.get(kind, {}).items()} for kind in ("start", "held"))
        self.part = Part([int(parts[f"{peer}.done"]) for peer in self.ids], losses[:, 0].clone(), losses[:, 1].clone(),
                         (start, begun), held, generators)

    def snapshot(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Copies of rows and moments as they are now, for what may have to be taken back."""
        return self.x.clone(), {name: value.clone() for name, value in self.moments().items()}

    def restore(self, snapshot: tuple[Tensor, dict[str, Tensor]]) -> None:
        self.x.copy_(snapshot[0])
        self.reset_moments()
        self.load_moments(snapshot[1], self._active)

    def load_moments(self, saved: dict[str, Tensor], last_trained: frozenset[str]) -> None:
        """Put back what `moments` gave, for the peers hosted here."""
        rows = {peer: row for row, peer in enumerate(self.ids)}
        for name, value in saved.items():
            peer, group, key = name.split(".")
            if int(peer) in rows:
                parameter = self.params[rows[int(peer)]][group]
                self.optimizer.state.setdefault(parameter, {})[key] = value.to(self.device).clone()
        self._active = last_trained


def _seed_global(seed: int, device: torch.device) -> None:
    """torch.manual_seed; on the CPU without the seeds of all other kinds of device, each of which keeps a trace of its caller."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _by_group(row: Tensor, layout: Layout) -> dict[str, Tensor]:
    return {name: row[cut] for name, cut in layout.groups.items() if layout.has(name)}
