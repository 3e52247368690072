"""The one peer of a script's process as a run's loop sees the peers that it hosts: its row, its rates, the scale of its adapter."""

from collections.abc import Collection

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows
from dfl.adapters.layout import empty_rows
from dfl.config import Config
from dfl.script.adapters import Parameter, read, write
from dfl.script.moments import Moments
from dfl.training.hosted import common_scale
from dfl.transport.base import FREE
from dfl.transport.shards import put_away, sharded


class ScriptPeer:
    """What `dfl.run.loop` asks of hosted peers, of one whose parameters and optimiser are the script's.

    x: its row (1, D), true between `read` and `write`. num_steps: of the round at work.
    """

    def __init__(self, rank: int, adapted: Adapted, parameters: list[Parameter], moments: Moments, config: Config,
                 device: torch.device):
        self.ids, self.adapted, self.layout, self.device = [rank], adapted, adapted.layout, device
        self.parameters, self.moments, self.train = parameters, moments, config.train
        self.num_steps = config.train.local_steps
        self.x = empty_rows(1, self.layout.size, device=device, before=FREE)
        self._views = [one.of(self.x[0]) for one in parameters]
        self._sharded = sharded(adapted.model)

    def read(self) -> None:
        read(self.parameters, self._views)

    def write(self) -> None:
        self.put_away()
        write(self.parameters, self._views)

    def put_away(self) -> None:
        """What a pass has put together of a model in parts goes."""
        put_away(self._sharded)

    @property
    def scale(self) -> tuple[float, ...] | None:
        ranks = self.adapted.ranks
        return None if len(set(ranks.scalings)) == 1 else (ranks.ratio(self.ids[0]),)

    def rows(self, residuals: Tensor | None = None) -> Rows:
        return Rows(self.x, residuals, self.scale)

    def common_scale(self) -> Tensor:
        return common_scale(self.adapted, self.x, self.scale)

    def steps(self, row: int) -> int:
        return self.num_steps

    def learning_rate(self, progress: float) -> float:
        """The largest of the groups' rates now: the schedule is the script's."""
        return max(self.moments.rates().values(), default=0.0)

    def rates(self, progress: float) -> dict[str, float]:
        return self.moments.rates()

    @property
    def turns_moments(self) -> bool:
        return self.train.state == "carried" and self.train.at_refactor == "rotate"

    def after_refactor(self, frames: Tensor | None, mixed: Collection[int]) -> None:
        """The factors have a new basis, where the peer mixed at all: train.at_refactor says what becomes of the moments."""
        if self.train.state == "fresh" or self.train.at_refactor == "reset":
            self.moments.reset(self.layout.groups if mixed else ())
        elif self.train.at_refactor == "rotate" and not torch.equal(frames[0], self.x[0]):
            self.moments.turn(frames[0], self.x[0])
