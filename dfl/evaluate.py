"""Evaluation of every peer's own model, and of the consensus model, on the same examples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters import Adapted, Rows
from dfl.beside import residual_rows
from dfl.executors import Executor
from dfl.factors import Layout, stack_a, stack_b, write_pairs
from dfl.lowrank import refactor, truncate, weighted_sum
from dfl.rules.residual import largest_rank, split_model

SUMS = ("loss_sum", "correct", "count")


def in_batches(split, batch_size: int) -> list[list[int]]:
    """All examples of a split in batches of similar length."""
    order = sorted(range(len(split)), key=lambda i: _length(split.features[i]))
    return [order[k:k + batch_size] for k in range(0, len(order), batch_size)]


class Evaluator:
    """Examples in batches of similar length, collated once and kept on the device."""

    def __init__(self, adapted: Adapted, task, split, batch_size: int, device: torch.device, autocast: bool = False):
        self.adapted, self.task, self.device, self.autocast = adapted, task, device, autocast
        self.batches = [self._to_device(task.collate([split.features[i] for i in chunk])) for chunk in in_batches(split, batch_size)]

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}

    @torch.no_grad()
    def sums(self, rows: Rows, executor: Executor) -> Tensor:
        """Loss sum, correct and count of each of P rows: (P, 3) float64 on the CPU."""
        self.adapted.model.eval()
        totals = torch.zeros(len(rows.x), len(SUMS), dtype=torch.float64, device=self.device)
        for index in executor.groups(len(rows.x)):
            with executor.bound(self.adapted, rows, None, index) as forward:
                for batch in self.batches:
                    repeated = _for_each(index, batch)
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                        output = forward(self.task.inputs(repeated), index)
                    scores = self.task.score(output, repeated, len(index))
                    totals[index] += torch.stack([scores[name].double() for name in SUMS], 1)
        return totals.cpu()

    def metrics(self, sums: Tensor) -> list[dict[str, float]]:
        """The task's metrics of each row of sums (P, 3)."""
        return [self.task.metrics(dict(zip(SUMS, row, strict=True))) for row in sums.tolist()]


def _for_each(rows: Sequence[int], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if len(rows) == 1:
        return batch
    return {key: value.repeat(len(rows), *[1] * (value.dim() - 1)) for key, value in batch.items()}


def _length(features: dict) -> int:
    value = features.get("input_ids")
    return len(value) if value is not None else 0


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def consensus_rows(adapted: Adapted, x: Tensor, kept: Tensor | None, product: bool, residual: Layout | None) -> Rows:
    """The consensus model of trained rows x (N, D), scaled alike (`HostedPeers.alike`), and of the rules' residuals `kept` (N, D_E)
    in the layout `residual`."""
    if adapted.cores:
        return Rows(adapted.factors(x.mean(0)[None]))
    if kept is None:
        return Rows(consensus(x, adapted.layout, product)[None], residual_rows(adapted, None, 1))
    row, rest = consensus_with_residual(x, adapted.layout, kept, residual)
    return Rows(row[None], residual_rows(adapted, rest[None], 1))


def consensus(x: Tensor, layout: Layout, product: bool) -> Tensor:
    """The consensus model of rows x (N, D): the mean of the factors, or the best rank-R part of the mean product.

    The head, and what else there is, is the mean in both cases.
    """
    mean = x.mean(0)
    if product:
        weights = torch.full((len(x),), 1 / len(x), dtype=torch.float64, device=x.device)
        for pairs in layout.shapes():
            own = stack_a(mean, pairs)
            svd = truncate(*weighted_sum(weights, stack_a(x, pairs), stack_b(x, pairs)), pairs[0].rank)
            write_pairs(mean, pairs, *refactor(svd, own, "balanced"))
    return mean


def consensus_with_residual(x: Tensor, layout: Layout, kept: Tensor, residual: Layout) -> tuple[Tensor, Tensor]:
    """The mean of E_i + B_i A_i of rows x (N, D) and kept (N, D_E), as a row and its residual: what both ranks together can hold."""
    mean = x.mean(0)
    weights = torch.full((len(x),), 1 / len(x), dtype=torch.float64, device=x.device)

    def products(pairs):
        others = residual.like(pairs)
        return [weighted_sum(weights, stack_a(x, pairs), stack_b(x, pairs)),
                weighted_sum(weights, stack_a(kept, others), stack_b(kept, others))]

    state = split_model(mean, layout, residual, largest_rank(layout), products, "balanced")
    return mean, state["residual"]
