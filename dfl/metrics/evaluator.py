"""Evaluation of every peer's model, and of the consensus model, on the same examples; sums by group tell the rest."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows
from dfl.adapters.batched import uploaded
from dfl.metrics.base import Metric, Outcome
from dfl.metrics.own import Own
from dfl.metrics.tally import Tally
from dfl.training.executors import Executor, logit_bytes
from dfl.training.reference import with_reference
from dfl.training.together import Together
from dfl.transport.base import Transport


def in_batches(split, batch_size: int) -> list[list[int]]:
    """All examples of a split in batches of similar length."""
    order = sorted(range(len(split)), key=lambda i: _length(split.features[i]))
    return [order[k:k + batch_size] for k in range(0, len(order), batch_size)]


class GivenUp(Exception):  # noqa: N818  # it is no error
    """An evaluation was broken off between two batches."""


class Evaluator:
    """Examples in batches of similar length, collated once and kept on the device.

    metrics: what is evaluated, by name; the first is the primary one. own: the peers' own distributions, for which sums are kept by
    group; None: there are none. together: with the other processes of a team that holds the base model in parts.

    A pass over models gives rows of sums (dfl/metrics/tally.py). Where processes divide the batches among them, the tables of
    `by_batch` add up, and `total` makes of their sum, to the bit, what `sums` of all batches is.
    """

    def __init__(self, adapted: Adapted, task, split, batch_size: int, device: torch.device, autocast: bool = False,
                 own: Own | None = None, *, metrics: Mapping[str, Metric], together: Together | None = None):
        self.adapted, self.task, self.device, self.autocast, self.together = adapted, task, device, autocast, together
        self.tally = Tally(metrics, len(split), own)
        chunks = in_batches(split, batch_size)
        self.batches = [self._to_device(task.collate([split.features[i] for i in chunk])) for chunk in chunks]
        self.examples = [torch.tensor(chunk, device=device) for chunk in chunks]
        self.groups = [own.groups[chunk].to(device) for chunk in chunks] if own else [None] * len(chunks)

    @property
    def primary(self) -> str:
        return next(iter(self.tally.metrics))

    def better(self) -> dict[str, str]:
        """Which way each metric gets better: higher or lower."""
        return {name: "higher" if metric.higher_is_better else "lower" for name, metric in self.tally.metrics.items()}

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}

    def sums(self, rows: Rows, executor: Executor, halted: Callable[[], bool] = lambda: False) -> Tensor:
        """The row of each of P models after all batches: (P, W + n K) float64 on the CPU. GivenUp when `halted()` between two
        batches."""
        added, kept = self._pass(rows, executor, halted, range(len(self.batches)), [0] * len(self.batches))
        return torch.cat([added[:, 0], kept], 1).cpu()

    def by_batch(self, rows: Rows, executor: Executor, batches: Iterable[int], halted: Callable[[], bool] = lambda: False) -> Tensor:
        """(P, num_batches W + n K) float64 on the CPU: what each of these batches adds, where it belongs; 0 elsewhere."""
        added, kept = self._pass(rows, executor, halted, batches, range(len(self.batches)))
        return torch.cat([added.flatten(1), kept], 1).cpu()

    def total(self, tables: Tensor) -> Tensor:
        """What `sums` gives, of the sum of the tables of `by_batch` of all processes, each batch in one of them."""
        width, num = self.tally.width, len(self.batches)
        total = torch.zeros(len(tables), width, dtype=torch.float64)
        for batch in tables[:, :num * width].view(len(tables), num, width).unbind(1):
            total += batch
        return torch.cat([total, tables[:, num * width:]], 1)

    @torch.no_grad()
    def _pass(self, rows: Rows, executor: Executor, halted: Callable[[], bool], batches: Iterable[int],
              slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(P, slots, W) sums, batch k added into slots[k], and (P, n K) of the examples."""
        self.adapted.model.eval()
        num, batches = len(rows.x), list(batches)
        added = torch.zeros(num, max(slots, default=0) + 1, self.tally.width, dtype=torch.float64, device=self.device)
        kept = torch.zeros(num, self.tally.num_examples, self.tally.kept_width, dtype=torch.float64, device=self.device)
        tokens = max((self.batches[k]["input_ids"].numel() for k in batches if "input_ids" in self.batches[k]), default=0)
        for index in executor.groups(num, logit_bytes(self.adapted.model, tokens)):
            places = uploaded(index, added, torch.int64)
            with executor.bound(self.adapted, rows, None, index) as forward:
                for k in batches:
                    if halted():
                        raise GivenUp
                    found, of_examples = self._found(rows, forward, index, k)
                    added[:, slots[k]].index_add_(0, places, found)
                    if of_examples is not None:
                        kept[places[:, None], self.examples[k]] = of_examples
        return added, kept.flatten(1)

    def _found(self, rows: Rows, forward: Callable, index: Sequence[int], k: int) -> tuple[Tensor, Tensor | None]:
        """What batch k adds to the rows of the models `index`, and what is kept of its examples; None: nothing."""
        outcome = self._outcome(rows, forward, index, k)
        of_examples = self.tally.of_examples(outcome, len(index)) if self.tally.kept else None
        return self.tally.of_batch(outcome, len(index), self.groups[k]), of_examples

    def _outcome(self, rows: Rows, forward: Callable, index: Sequence[int], k: int) -> Outcome:
        # what the base model says does not change: once for all models and evaluations
        if self.together is not None:
            num = len(self.examples[k])
            self.batches[k] = self.together.reference(self.batches[k], num)
            return self.together.outcome(rows, index[0], forward, self.batches[k], num)
        self.batches[k] = with_reference(self.task, self.adapted, self.batches[k], self.autocast)
        repeated = _for_each(index, self.batches[k])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = forward(self.task.inputs(repeated), index)
        return self.task.outcome(output, repeated)

    def record(self, sums: Tensor, consensus: Tensor | None, peers: Sequence[int]) -> dict:
        """What a round's record says, from the rows of the models of `peers` (P, ...) and that of the consensus (1, ...): values of
        these peers as `Each`, until `summarised` adds those of other processes.

        `own`: the metrics on each peer's own distribution, `gap` how much they are above those on all examples, and the
        consensus model's on each of them.
        """
        tally = self.tally
        on_all = tally.values(sums)
        found = over_peers(on_all) | ({} if consensus is None else {"consensus": tally.values(consensus)[0]})
        if tally.own is None:
            return found
        on_own = tally.on_own(sums, peers)
        gaps = [{name: own[name] - both[name] for name in own} for own, both in zip(on_own, on_all, strict=True)]
        found["own"] = over_peers(on_own) | {"gap": over_peers(gaps)}
        if consensus is not None:
            found["own"]["consensus"] = over_peers(tally.on_own(consensus, peers))
        return found


def _for_each(rows: Sequence[int], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if len(rows) == 1:
        return batch
    return {key: value.repeat(len(rows), *[1] * (value.dim() - 1)) for key, value in batch.items()}


def _length(features: dict) -> int:
    value = features.get("input_ids")
    return len(value) if value is not None else 0


class Each(list):
    """A value of each hosted peer, to be summarised over all peers."""


def over_peers(peers: Sequence[dict[str, float]]) -> dict:
    """Metrics of the hosted peers as a record has them: `Each` of its values, and under `peers` the values."""
    values = {name: [peer[name] for peer in peers] for name in peers[0]}
    return {name: Each(of_peers) for name, of_peers in values.items()} | {"peers": values}


def summarised(tree: dict, transport: Transport, num_peers: int) -> dict:
    """A record with {mean, min, max} over the peers of all processes in place of each `Each`; the same bits on all of them."""
    found: list[Each] = []
    _replaced(tree, lambda each: found.append(each))
    if not found:
        return tree
    table = torch.tensor(found, dtype=torch.float64)  # (values, P)
    means = (transport.total(table.T) / num_peers).tolist()
    _, least, most = transport.summary(torch.stack([table.sum(1), table.amin(1), table.amax(1)])).tolist()
    summaries = iter([{"mean": mean, "min": low, "max": high} for mean, low, high in zip(means, least, most, strict=True)])
    return _replaced(tree, lambda each: next(summaries))


def _replaced(tree, replace: Callable[[Each], object]):
    if isinstance(tree, Each):
        return replace(tree)
    return {key: _replaced(value, replace) for key, value in tree.items()} if isinstance(tree, dict) else tree
