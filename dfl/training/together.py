"""Passes through a base model that a team holds in parts: each process takes its examples of a batch, and what they find is added up.

The first process trains as if it were alone (dfl/training/phase.py, dfl/metrics/evaluator.py) and asks for passes here; the others
serve it. To all of them a pass needs the same layers at the same time, whatever its examples. Losses are weighed by examples, or by
tokens where a task counts those, so that their sum over the team is the loss of the whole batch; dropout draws the mask of the whole
batch from the peer's generator, of which a process uses its rows. So the sums are those of one process, up to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows
from dfl.adapters.layout import empty_rows
from dfl.training.dropout import Cut, PeerDropout
from dfl.training.executors import Sequential
from dfl.training.reference import with_reference
from dfl.transport.team import Team

Batch = dict[str, Tensor]
Forward = Callable[[Any, Sequence[int]], Any]
_STEP, _SCORE, _REFERENCE, _END = "step", "score", "reference", "end"


class Part(NamedTuple):
    """The examples of a batch that one process of a team takes, from `first` on, of `whole`; of none it takes the first example, which
    counts nothing: all pass through the layers alike."""

    first: int
    number: int
    whole: int

    @property
    def counts(self) -> bool:
        return self.number > 0

    def rows(self, num_rows: int) -> slice:
        """Of a batch whose examples have equally many rows each."""
        each = num_rows // self.whole
        return slice(self.first * each, (self.first + max(self.number, 1)) * each)

    def of(self, batch: Batch) -> Batch:
        num_rows = len(next(iter(batch.values())))
        return {key: value[self.rows(num_rows)] if value.dim() and len(value) == num_rows else value for key, value in batch.items()}


def part_of(rank: int, size: int, examples: int) -> Part:
    """Of process `rank` of `size`: as even as possible, the first ones one more."""
    base, more = divmod(examples, size)
    number = base + (rank < more)
    return Part(rank * base + min(rank, more) if number else 0, number, examples)


class Together:
    """What the processes of a team do with the model that they hold in parts. autocasts: forward passes run in bfloat16.

    On the first process `gradients`, `outcome` and `reference` ask all of them for a pass, inside of the executor's `bound` whose rows
    are given; `serve` is the life of the others. asked: whether a process was told to stop; the first learns it with each pass.
    """

    def __init__(self, team: Team, adapted: Adapted, task: Any, autocasts: bool, asked: Callable[[], bool] = lambda: False):
        self.team, self.adapted, self.task, self.autocasts, self._asked = team, adapted, task, autocasts, asked
        self.told_to_stop = False

    # the first process

    def gradients(self, rows: Rows, row: int, g: Tensor, forward: Forward, batches: Sequence[Batch], shares: Sequence[float],
                  examples: int, generator: torch.Generator, trains: frozenset[str], skips: frozenset[int]) -> Tensor:
        """The loss of `batches` of one row, each with its share of it, `examples` in each. Its gradient is added to g (D,), which is
        zero before: the gradients of the parameters that the executor has bound are views of it."""
        self._tell(_STEP, rows, row, {f"{k}.{key}": value for k, batch in enumerate(batches) for key, value in batch.items()},
                   {"generator": generator.get_state(), **_global_state(self.team.device)}, shares=list(shares), examples=examples,
                   trains=sorted(trains), skips=sorted(skips))
        total = self._pass(forward, row, batches, shares, examples, generator)
        self.team.add(g)
        return self._added(total)[0]

    def outcome(self, rows: Rows, row: int, forward: Forward, batch: Batch, examples: int) -> Any:
        """What the task says of a batch that lies whole on this process: its `dfl.metrics.base.Outcome`."""
        self._tell(_SCORE, rows, row, batch, examples=examples)
        table, mine = self._outcome(forward, row, batch, examples)
        self._added(table)
        losses, counted, targets, predictions, margins = table.unbind()
        return replace(mine, losses=losses.to(mine.losses.dtype), counted=counted.bool(), targets=targets.to(mine.targets.dtype),
                       predict=lambda: predictions.to(mine.predictions.dtype),
                       margins=None if mine.margins is None else margins.to(mine.margins.dtype))

    def reference(self, batch: Batch, examples: int) -> Batch:
        """`dfl.training.reference.with_reference` of a batch that lies whole on this process."""
        if not getattr(self.task, "needs_reference", False) or "reference" in batch:
            return batch
        self.team.tell({"op": _REFERENCE, "examples": examples}, batch)
        return {**batch, "reference": self._added(self._reference(batch, examples))}

    @staticmethod
    def end(team: Team, status: int) -> None:
        """The others need not serve any longer; the exit status that is to be theirs as well."""
        team.tell({"op": _END, "status": status})

    def _tell(self, op: str, rows: Rows, row: int, batch: Batch, states: Batch | None = None, **about: Any) -> None:
        one, states = rows.row(row), states or {}
        self.team.tell({"op": op, "keys": list(batch), "scale": None if one.scale is None else one.scale[0],
                        "residual": one.residual is not None, **about}, {**batch, **{f"state.{k}": v for k, v in states.items()}})
        for tensor in (one.x, one.residual):
            if tensor is not None:
                self.team.copy(tensor.contiguous())

    # the others

    def serve(self) -> int:
        """Take part in all passes that the first process asks for, until it ends; the exit status that it told."""
        x, g, residual = self._rows()
        while True:
            about, tensors = self.team.hear()
            if about["op"] == _END:
                return int(about["status"])
            with torch.set_grad_enabled(about["op"] == _STEP):
                self._serve(about, {key: value.to(self.team.device) if not key.startswith("state.") else value
                                    for key, value in tensors.items()}, x, g, residual)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        adapted, device = self.adapted, self.team.device
        extra = None if adapted.residual is None else empty_rows(1, adapted.residual.size, device=device)
        return empty_rows(1, adapted.lora.size, device=device), empty_rows(1, adapted.lora.size, device=device), extra

    def _serve(self, about: dict[str, Any], tensors: Batch, x: Tensor, g: Tensor, residual: Tensor | None) -> None:
        op, examples = about["op"], about["examples"]
        if op == _REFERENCE:
            self._added(self._reference(tensors, examples))
            return
        for tensor in (x, residual if about["residual"] else None):
            if tensor is not None:
                self.team.copy(tensor)
        rows = Rows(x, residual if about["residual"] else None, None if about["scale"] is None else (about["scale"],))
        batch = {key: tensors[key] for key in about["keys"]}
        if op == _SCORE:
            self.adapted.model.eval()
            with Sequential().bound(self.adapted, rows, None, [0]) as forward:
                self._added(self._outcome(forward, 0, batch, examples)[0])
            return
        self.adapted.model.train()
        g.zero_()
        generator = torch.Generator(self.team.device)
        generator.set_state(tensors["state.generator"])
        _set_global_state({key.removeprefix("state."): value for key, value in tensors.items()}, self.team.device)
        batches = [{key.partition(".")[2]: value for key, value in batch.items() if key.partition(".")[0] == str(k)}
                   for k in range(len(about["shares"]))]
        with Sequential().bound(self.adapted, rows, g, [0], frozenset(about["trains"]), frozenset(about["skips"])) as forward:
            total = self._pass(forward, 0, batches, about["shares"], examples, generator)
        self.team.add(g[0])
        self._added(total)

    # all of them

    def _pass(self, forward: Forward, row: int, batches: Sequence[Batch], shares: Sequence[float], examples: int,
              generator: torch.Generator) -> Tensor:
        """Forward and backward of this process's part of every batch; its part of the loss (1,), float64."""
        part, total = part_of(self.team.rank, self.team.size, examples), torch.zeros(1, dtype=torch.float64, device=self.team.device)
        with self.team.steps():
            for batch, share in zip(batches, shares, strict=True):
                mine = with_reference(self.task, self.adapted, part.of(batch), self.autocasts)
                with self._autocast(), PeerDropout([generator], Cut(part.first, max(part.number, 1), part.whole)):
                    output = forward(self.task.inputs(mine), [row])
                losses = self.task.losses(output, mine, 1) * self._weight(part, mine, batch)
                if losses.requires_grad:
                    (share * losses.sum()).backward()
                total += share * losses.detach()
        return total

    def _weight(self, part: Part, mine: Batch, batch: Batch) -> Tensor | float:
        """How much the loss of a part counts in that of the batch."""
        if not part.counts:
            return 0.0
        if not hasattr(self.task, "weights"):
            return part.number / part.whole
        return self.task.weights(mine, 1) / self.task.weights(batch, 1).clamp(min=1)

    def _outcome(self, forward: Forward, row: int, batch: Batch, examples: int) -> tuple[Tensor, Any]:
        """(5, B, T) float64: losses, what counts, targets, predictions and margins of this process's rows, 0 elsewhere; their
        outcome."""
        part, num_rows = part_of(self.team.rank, self.team.size, examples), len(next(iter(batch.values())))
        mine = part.of(batch)
        with self.team.steps(), self._autocast():
            outcome = self.task.outcome(forward(self.task.inputs(mine), [row]), mine)
        margins = torch.zeros_like(outcome.losses) if outcome.margins is None else outcome.margins
        found = torch.stack([one.double() for one in (outcome.losses, outcome.counted, outcome.targets, outcome.predictions, margins)])
        each = found.shape[1] // max(part.number, 1)  # items of an example: rows, or pairs of them
        table = found.new_zeros(5, each * part.whole, found.shape[2])
        assert num_rows % part.whole == 0
        if part.counts:
            table[:, part.first * each:(part.first + part.number) * each] = found
        return table, outcome

    def _reference(self, batch: Batch, examples: int) -> Tensor:
        """(B,): the base model's scores of this process's rows, 0 elsewhere."""
        part, num_rows = part_of(self.team.rank, self.team.size, examples), len(next(iter(batch.values())))
        with self.team.steps():
            found = with_reference(self.task, self.adapted, part.of(batch), self.autocasts)["reference"]
        table = found.new_zeros(num_rows)
        if part.counts:
            table[part.rows(num_rows)] = found
        return table

    def _added(self, table: Tensor) -> Tensor:
        """The sum over the team, in place; the first process learns whether one was told to stop."""
        self.team.add(table)
        asked = torch.tensor([float(self._asked())], device=self.team.device)
        self.team.add(asked)
        self.told_to_stop = self.told_to_stop or bool(asked)
        return table

    def _autocast(self):
        return torch.autocast(self.team.device.type, torch.bfloat16, enabled=self.autocasts)


def _global_state(device: torch.device) -> Batch:
    """Of the generators that layers draw from by themselves: all processes skip the same ones."""
    return {"global": torch.get_rng_state()} | ({"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_global_state(states: Batch, device: torch.device) -> None:
    torch.set_rng_state(states["global"])
    if "device" in states:
        torch.cuda.set_rng_state(states["device"], device)
