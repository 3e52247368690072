"""Evaluation of every peer's model, and of the consensus model, on the same examples; sums by group tell the rest."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows
from dfl.adapters.layout import Layout, stack_a, stack_b, write_pairs
from dfl.adapters.lowrank import refactor, truncate, weighted_sum
from dfl.adapters.residuals import residual_rows
from dfl.metrics.own import Own, own_metrics
from dfl.rules.residual import largest_rank, split_model
from dfl.training.executors import Executor

SUMS = ("loss_sum", "correct", "count")


def in_batches(split, batch_size: int) -> list[list[int]]:
    """All examples of a split in batches of similar length."""
    order = sorted(range(len(split)), key=lambda i: _length(split.features[i]))
    return [order[k:k + batch_size] for k in range(0, len(order), batch_size)]


class GivenUp(Exception):  # noqa: N818  # it is no error
    """An evaluation was broken off between two batches."""


class Evaluator:
    """Examples in batches of similar length, collated once and kept on the device.

    own: the peers' own distributions, for which sums are kept by group; None: there are none.
    """

    def __init__(self, adapted: Adapted, task, split, batch_size: int, device: torch.device, autocast: bool = False,
                 own: Own | None = None):
        self.adapted, self.task, self.device, self.autocast, self.own = adapted, task, device, autocast, own
        chunks = in_batches(split, batch_size)
        self.batches = [self._to_device(task.collate([split.features[i] for i in chunk])) for chunk in chunks]
        self.groups = [own.groups[chunk].to(device) for chunk in chunks] if own else [None] * len(chunks)

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}

    @torch.no_grad()
    def sums(self, rows: Rows, executor: Executor, halted: Callable[[], bool] = lambda: False) -> Tensor:
        """Loss sum, correct and count of each of P rows: (P, 3) float64 on the CPU; behind them the same of each of C
        groups, (P, 3 + 3 C), where there are any. GivenUp when `halted()` between two batches."""
        self.adapted.model.eval()
        num_groups = self.own.num_groups if self.own else 0
        totals = torch.zeros(len(rows.x), 1 + num_groups, len(SUMS), dtype=torch.float64, device=self.device)
        for index in executor.groups(len(rows.x)):
            with executor.bound(self.adapted, rows, None, index) as forward:
                for batch, groups in zip(self.batches, self.groups, strict=True):
                    if halted():
                        raise GivenUp
                    repeated = _for_each(index, batch)
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                        output = forward(self.task.inputs(repeated), index)
                    totals[index] += self._scored(output, repeated, len(index), groups)
        return totals.flatten(1).cpu()

    def _scored(self, output, batch: dict[str, Tensor], num: int, groups: Tensor | None) -> Tensor:
        """(num, 1 + C, 3) float64: what a batch adds, in all and by group."""
        if groups is None:
            scores = self.task.score(output, batch, num)
            return torch.stack([scores[name].double() for name in SUMS], 1)[:, None]
        scores = self.task.score(output, batch, num * len(groups))  # of every example
        found = [scores[name].view(num, -1) for name in SUMS]
        by_group = torch.zeros(num, self.own.num_groups, len(SUMS), dtype=torch.float64, device=self.device)
        by_group.index_add_(1, groups, torch.stack(found, 2).double())
        return torch.cat([torch.stack([value.sum(1) for value in found], 1)[:, None].double(), by_group], 1)

    def metrics(self, sums: Tensor) -> list[dict[str, float]]:
        """The task's metrics of each row of what `sums` gave."""
        return [self.task.metrics(dict(zip(SUMS, row, strict=True))) for row in sums[:, :len(SUMS)].tolist()]

    def record(self, sums: Tensor, consensus: Tensor | None) -> dict:
        """What a round's record says, from the sums of all peers' models (N, ...) and those of the consensus (1, ...).

        `own`: the metrics on each peer's own distribution, `gap` how much they are above those on all examples, and the
        consensus model's on each of them.
        """
        on_all = self.metrics(sums)
        found = over_peers(on_all) | ({} if consensus is None else {"consensus": self.metrics(consensus)[0]})
        if self.own is None:
            return found
        on_own = self.on_own(sums)
        gaps = [{name: own[name] - both[name] for name in own} for own, both in zip(on_own, on_all, strict=True)]
        found["own"] = over_peers(on_own) | {"gap": over_peers(gaps)}
        if consensus is not None:
            found["own"]["consensus"] = over_peers(self.on_own(consensus))
        return found

    def on_own(self, sums: Tensor) -> list[dict[str, float]]:
        """The task's metrics of each peer's model on its own distribution; of sums (1, ...) one model's on all of them."""
        by_group = sums[:, len(SUMS):].reshape(len(sums), -1, len(SUMS))
        return own_metrics(self.task, SUMS, by_group, self.own.weights)


def _for_each(rows: Sequence[int], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if len(rows) == 1:
        return batch
    return {key: value.repeat(len(rows), *[1] * (value.dim() - 1)) for key, value in batch.items()}


def _length(features: dict) -> int:
    value = features.get("input_ids")
    return len(value) if value is not None else 0


def over_peers(peers: Sequence[dict[str, float]]) -> dict:
    """Metrics of all peers as a record has them: {mean, min, max} of each, and under `peers` the values."""
    values = {name: [peer[name] for peer in peers] for name in peers[0]}
    return {name: summary(of_peers) for name, of_peers in values.items()} | {"peers": values}


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
