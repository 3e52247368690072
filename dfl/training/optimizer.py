"""The optimiser of the hosted peers: rates, steps, and moments across rounds. It knows rows, and no model."""

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import GROUPS, Layout
from dfl.config import TrainConfig
from dfl.training.moments import rotate


def learning_rate(train: TrainConfig, progress: float) -> float:
    """train.lr at `progress` in [0, 1] of the run: linear warm-up, then the schedule."""
    if progress < train.warmup:
        return train.lr * progress / train.warmup
    rest = (progress - train.warmup) / (1 - train.warmup)
    factor = {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[train.schedule]
    return train.lr * factor


class PeerOptimizer:
    """One optimiser of torch over the rows x (P, D) of the peers `ids`: a parameter for every row and group.

    steps: of each row in a round. The gradients are those in the rows g (P, D).
    """

    def __init__(self, ids: Sequence[int], x: Tensor, g: Tensor, layout: Layout, train: TrainConfig, steps: Sequence[int]):
        self.ids, self.layout, self.train = ids, layout, train
        self.params = [_by_group(row, layout) for row in x]
        self.grads = [_by_group(row, layout) for row in g]
        self.torch = self._make(steps)
        self._active: frozenset[str] = frozenset()  # the groups that the round trains

    def _make(self, steps: Sequence[int]) -> torch.optim.Optimizer:
        # what has equally many steps and the same ratio shares a parameter group, and with it the rate of a step
        shared: dict[tuple[int, float], list[Tensor]] = {}
        for row, params in enumerate(self.params):
            for group, parameter in params.items():
                shared.setdefault((steps[row], self.ratio(group)), []).append(parameter)
        flat = [{"params": params, "steps": steps, "ratio": ratio} for (steps, ratio), params in shared.items()]
        train = self.train
        if train.optimizer == "sgd":
            return torch.optim.SGD(flat, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay, fused=True)
        return torch.optim.AdamW(flat, lr=train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps,
                                 weight_decay=train.weight_decay, fused=True)

    def ratio(self, group: str) -> float:
        """The rate of a group of trained numbers over `learning_rate`."""
        return getattr(self.train.lr_ratio, group)

    def rates(self, progress: float) -> dict[str, float]:
        """The rate of every group of a row at `progress` of the run."""
        return {group: learning_rate(self.train, progress) * self.ratio(group) for group in self.layout.groups
                if self.layout.has(group)}

    def step(self, t: int, k: int, active: Collection[int], trains: frozenset[str]) -> None:
        """Step k of round t of the rows `active`; others, and groups that are not in `trains`, stay as they are."""
        for row, (params, grads) in enumerate(zip(self.params, self.grads, strict=True)):
            for group, parameter in params.items():
                parameter.grad = grads[group] if row in active and group in trains else None
        for shared in self.torch.param_groups:
            progress = (t + min(k / shared["steps"], 1)) / self.train.rounds
            shared["lr"] = shared["ratio"] * learning_rate(self.train, progress)
        self.torch.step()

    def begin_round(self, trains: frozenset[str]) -> None:
        """Apply the policy for moments across rounds and at a switch of the trained factor."""
        if self.train.state == "fresh":
            self.reset()
        elif self.train.at_switch == "fresh":
            self.reset(trains - self._active)
        self._active = trains

    def reset(self, groups: Iterable[str] = GROUPS, rows: Sequence[int] | None = None) -> None:
        """Forget the moments of all hosted peers, or of those in `rows`."""
        for params in self.params if rows is None else [self.params[row] for row in rows]:
            for group in set(groups) & set(params):
                self.torch.state.pop(params[group], None)

    @property
    def turns_moments(self) -> bool:
        return self.train.state == "carried" and self.train.at_refactor == "rotate"

    def after_refactor(self, old: Tensor | None, new: Tensor, mixed: Collection[int]) -> None:
        """The factors of the peers `mixed` have a new basis: apply train.at_refactor to their moments.

        new: the rows (P, D); old: before, for rotate.
        """
        if self.train.state == "fresh" or self.train.at_refactor == "reset":
            self.reset(rows=[row for row, peer in enumerate(self.ids) if peer in mixed])
        elif self.train.at_refactor == "rotate":
            for row, (before, after) in enumerate(zip(old, new, strict=True)):
                if not torch.equal(before, after):
                    states = {group: self.torch.state.get(p, {}) for group, p in self.params[row].items()}
                    rotate(states, self.layout, before, after)

    def moments(self) -> dict[str, Tensor]:
        """Those that survive a round, by "peer.group.key"; none where none do."""
        return {} if self.train.state == "fresh" else self.all_moments()

    def all_moments(self) -> dict[str, Tensor]:
        """As they are in the middle of a round."""
        return {f"{self.ids[row]}.{group}.{key}": value for row, params in enumerate(self.params)
                for group, p in params.items() for key, value in self.torch.state.get(p, {}).items()
                if isinstance(value, Tensor)}

    def load(self, saved: dict[str, Tensor], last_trained: frozenset[str] | None = None) -> None:
        """Put back what `moments` gave, for the peers hosted here.

        last_trained: by the round that they are from; None: by the one at work.
        """
        rows = {peer: row for row, peer in enumerate(self.ids)}
        for name, value in saved.items():
            peer, group, key = name.split(".")
            if int(peer) in rows:
                parameter = self.params[rows[int(peer)]][group]
                self.torch.state.setdefault(parameter, {})[key] = value.to(parameter.device).clone()
        self._active = self._active if last_trained is None else last_trained


def _by_group(row: Tensor, layout: Layout) -> dict[str, Tensor]:
    return {name: row[cut] for name, cut in layout.groups.items() if layout.has(name)}
