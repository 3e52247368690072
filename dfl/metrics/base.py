"""What a metric is: numbers that add up over examples, and what becomes of their sums.

A metric knows no peer, process or group of examples. Whoever evaluates adds its numbers up over batches, in their order,
and over processes; by group of examples as well, for the peers' own distributions (`dfl.metrics.own`).

Shapes: B examples of a batch, T items of an example (one, or its tokens), G equal blocks of rows, S numbers of a metric.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # a label that no loss counts: padding and prompt tokens
# what a task may predict of an item: a class, the next token, a real number, which of two responses is preferred; a task from outside
# may have a word of its own
PREDICTS = ("class", "token", "number", "preference")


@dataclass(frozen=True)
class Outcome:
    """What a task says of a batch.

    losses (B, T) float32, 0 where an item does not count. counted (B, T) bool. targets (B, T): int64, or of a number float32.
    predict() -> (B, T) as the targets, -1 for a class or token where the output is not a number; asked only where a metric needs it.
    margins (B, T), of a preference: by how much the better one is preferred.
    """

    losses: Tensor
    counted: Tensor
    targets: Tensor
    predict: Callable[[], Tensor]
    margins: Tensor | None = None

    @cached_property
    def predictions(self) -> Tensor:
        return self.predict()

    @cached_property
    def correct(self) -> Tensor:
        """(B, T) bool: what counts and is predicted exactly."""
        return (self.predictions == self.targets) & self.counted


class Metric(NamedTuple):
    """A metric as pure functions.

    sums(outcome, G) -> (G, S): what each of G equal blocks of rows adds, in the type in which a batch is to be added up; over
    batches it is float64. value(sums (S,) float64) -> float, NaN where there is none; it must not mind sums with weights,
    which need not be whole numbers. size: S. suits: words of PREDICTS, what a task has to predict; None: anything.

    per_example: for what no sums give, such as ranks. sums(outcome, B) -> (B, S) is then kept of every example, in a fixed place
    that the other processes leave 0, and value gets all of it: value(kept (n, S), weights (n,)) -> float.
    """

    sums: Callable[[Outcome, int], Tensor]
    value: Callable[..., float]
    size: int
    higher_is_better: bool = True
    suits: tuple[str, ...] | None = None
    per_example: bool = False


def blocks(values: Tensor, num_blocks: int) -> Tensor:
    """(B, ...) as (G, everything of the block's rows)."""
    if len(values) % num_blocks:
        raise AssertionError(f"{len(values)} rows are not {num_blocks} equal blocks")
    return values.reshape(num_blocks, -1)


def block_sums(num_blocks: int, *values: Tensor) -> Tensor:
    """(G, S) of S tensors (B, ...): float32 sums of each block, or float64 where the values are."""
    found = [blocks(value, num_blocks).sum(1) for value in values]
    wide = any(one.dtype == torch.float64 for one in found)
    return torch.stack([one.to(torch.float64 if wide else torch.float32) for one in found], 1)


def ratio(sums: Tensor) -> float:
    """The first of two sums over the second; NaN of nothing."""
    part, whole = sums.tolist()
    return part / (whole or float("nan"))
