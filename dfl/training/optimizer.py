"""The optimiser of the hosted peers: rates, steps, and moments across rounds. It knows rows, and no model."""

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dfl.adapters.layout import GROUPS, Layout
from dfl.config import TrainConfig
from dfl.config.optimizers import OPTIMIZERS, SCHEDULES
from dfl.training.moments import rotate

_PLAIN = "!"


def learning_rate(train: TrainConfig, progress: float) -> float:
    """train.lr at `progress` in [0, 1] of the run: linear warm-up, then the schedule."""
    if progress < train.warmup:
        return train.lr * progress / train.warmup
    rest = (progress - train.warmup) / (1 - train.warmup)
    return train.lr * SCHEDULES[train.schedule.name](**train.schedule.params)(rest, train.warmup)


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
        made = make_torch(self.train, flat, self.params[0])
        self._shared = {key: group for key, group in zip(shared, made.param_groups, strict=True)}
        self._steps = list(steps)
        return made

    def ratio(self, group: str) -> float:
        """The rate of a group of trained numbers over `learning_rate`."""
        return getattr(self.train.lr_ratio, group)

    def rates(self, progress: float) -> dict[str, float]:
        """The rate of every group of a row at `progress` of the run."""
        return {group: learning_rate(self.train, progress) * self.ratio(group) for group in self.layout.groups
                if self.layout.has(group)}

    def step(self, t: int, k: int, active: Collection[int], trains: frozenset[str]) -> None:
        """Step k of round t of the rows `active`; others, and groups that are not in `trains`, stay as they are."""
        for shared in self.torch.param_groups:
            shared["params"] = []  # a step looks at these alone, however many are hosted
            progress = (t + min(k / shared["steps"], 1)) / self.train.rounds
            shared["lr"] = shared["ratio"] * learning_rate(self.train, progress)
        for row in sorted(active):
            for group, parameter in self.params[row].items():
                parameter.grad = self.grads[row][group] if group in trains else None
                self._shared[self._steps[row], self.ratio(group)]["params"].append(parameter)
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
        return self.train.state == "carried" and self.train.at_refactor == "rotate" and OPTIMIZERS[self.train.optimizer].turns

    def after_refactor(self, old: Tensor | None, new: Tensor, mixed: Collection[int]) -> None:
        """The factors of the peers `mixed` have a new basis: apply train.at_refactor to their moments.

        new: the rows (P, D); old: before, for rotate.
        """
        turns = OPTIMIZERS[self.train.optimizer].turns
        if self.train.state == "fresh" or self.train.at_refactor == "reset" or (self.train.at_refactor == "rotate" and not turns):
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
                for group, p in params.items() for key, value in _as_tensors(self.torch.state.get(p, {})).items()}

    def load(self, saved: dict[str, Tensor], last_trained: frozenset[str] | None = None) -> None:
        """Put back what `moments` gave, for the peers hosted here.

        last_trained: by the round that they are from; None: by the one at work.
        """
        rows = {peer: row for row, peer in enumerate(self.ids)}
        for name, value in saved.items():
            peer, group, key = name.split(".")
            if int(peer) in rows:
                parameter = self.params[rows[int(peer)]][group]
                state = self.torch.state.setdefault(parameter, {})
                if key.endswith(_PLAIN):
                    state[key.removesuffix(_PLAIN)] = value.item()
                else:
                    state[key] = value.to(parameter.device).clone()
        self._active = self._active if last_trained is None else last_trained


def make_torch(train: TrainConfig, flat: list[dict], example: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """train.optimizer over parameter groups. ValueError for a paged one without a GPU."""
    chosen = OPTIMIZERS[train.optimizer]
    if chosen.paged and not any(parameter.is_cuda for parameter in example.values()):
        raise ValueError(f"train.optimizer = {train.optimizer!r} moves moments between a GPU and the machine; allowed on a CPU: "
                         f"{train.optimizer.removeprefix('paged_')}")
    package, _, name = chosen.source.rpartition(".")
    make = getattr(import_module(package), name)
    offered = {"momentum": train.momentum, "weight_decay": train.weight_decay, "betas": (train.betas[0], train.betas[1]),
               "eps": train.eps, "fused": True}
    takes = dict(inspect.signature(make).parameters)
    if not package.startswith("torch") or train.optimizer in ("nadam", "radam", "rmsprop"):
        takes.pop("fused", None)
    more = {"decoupled_weight_decay": True} if "decoupled_weight_decay" in takes else {}
    return make(flat, lr=train.lr, **{key: value for key, value in offered.items() if key in takes}, **more)


def _as_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter; a plain number, such as the step counter of some, under a name that says so."""
    found = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return found | {f"{key}{_PLAIN}": torch.tensor(value) for key, value in state.items() if isinstance(value, (int, float))}


def _by_group(row: Tensor, layout: Layout) -> dict[str, Tensor]:
    return {name: row[cut] for name, cut in layout.groups.items() if layout.has(name)}
