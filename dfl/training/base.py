"""The local phase as a protocol: what comes before a round of gossip, whoever does it.

`dfl train` fills it with `dfl.training.phase.ModelTrainer`, `dfl.simulate` with the caller's own step, and a loop of
one's own with any object that has `run`. Nothing here knows a model.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dfl.slots import Plan

AfterStep = Callable[[int, Tensor, int], Tensor]  # (row, x_D, step) -> x_D behind that step
Halt = Callable[[int], bool]  # asked between two steps, with the number of those left: whether to stop there


def all_finite(*tensors: Tensor) -> bool:
    """Whether all numbers of tensors on one device are finite. A sum is only where all that it adds up are, and takes a tenth of the
    time of a look at each, which is left for sums that are not."""
    together = torch.stack([tensor.sum() for tensor in tensors]).sum()
    return bool(together.isfinite()) or all(bool(tensor.isfinite().all()) for tensor in tensors)


class LocalTrainer(Protocol):
    """Trains the hosted peers' rows in place for a round."""

    def run(self, x: Tensor, plans: Sequence[Plan], corrections: Sequence[Tensor | None], t: int, *,
            residuals: Tensor | None = None, after_step: AfterStep | None = None, halt: Halt | None = None) -> Tensor | None:
        """Change the rows x (P, D) as the plans of round t say: the mean loss of each peer (P,), NaN where it is not known.

        plans: one a row, of equal groups; what a plan does not train, by group or by mask, keeps its value.
        corrections: (D,) a row, added to its gradient in every step; None: none. residuals: the low-rank products
        (P, D_E) that the rule keeps and the model adds. after_step: what the rule makes of the trained numbers of a row
        behind each of its steps. halt: where it says so `run` gives None, and goes on with the next call.
        DivergenceError names the first peer whose loss is not finite.
        """


class DivergenceError(FloatingPointError):
    """The loss or the factors of peer `peer` are not finite; `at_start`: already those it began the round with."""

    def __init__(self, message: str, peer: int = -1, at_start: bool = False):
        super().__init__(message)
        self.peer, self.at_start = peer, at_start
