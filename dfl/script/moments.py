"""What the optimiser of a script remembers of a row's parameters: forgotten, turned with the factors, or held where a mask leaves a
number out. The optimiser is the script's own, of any kind that keeps its moments by parameter, as torch's do."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.script.adapters import Parameter
from dfl.training.moments import rotate
from dfl.transport.shards import mine, part_like, whole

Kept = dict[tuple[int, str], Tensor]  # by the place of a parameter, and the key of its state


class Moments:
    """Of the parameters of one row (D,) in an optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Parameter], layout: Layout):
        self.optimizer, self.parameters, self.layout = optimizer, list(parameters), layout
        self._looked_at: list[int] = []
        self._holds: dict[str, dict] = {}  # the optimiser's group with the first parameter of A, B, ...

    def rates(self) -> dict[str, float]:
        """The learning rate of each group now, of the first of its parameters that the optimiser has."""
        groups = self.optimizer.param_groups
        if self._looked_at != (now := [id(group) for group in groups]):  # others, from a state that was loaded
            of = {id(p): group for group in groups for p in group["params"]}
            self._holds = {one.group: of[id(one.parameter)] for one in reversed(self.parameters) if id(one.parameter) in of}
            self._looked_at = now
        return {name: float(group["lr"]) for name, group in self._holds.items()}

    def reset(self, groups: Iterable[str]) -> None:
        """Forget the moments of these groups: the next step makes new ones."""
        wanted = set(groups)
        for one in self.parameters:
            if one.group in wanted:
                self.optimizer.state.pop(one.parameter, None)

    def turn(self, before: Tensor, after: Tensor) -> None:
        """The factors got a new basis: from that of row before (D,) to that of row after (D,)."""
        states: dict[str, dict] = {}
        for one in self.parameters:
            for key, value in self._of(one).items():
                rows = states.setdefault(one.group, {})
                if key not in rows:
                    rows[key] = torch.zeros_like(after)
                one.of(rows[key]).copy_(whole(value))
        groups = {group: {key: row[self.layout.groups[group]] for key, row in rows.items()} for group, rows in states.items()}
        rotate(groups, self.layout, before, after)
        for one in self.parameters:
            for key, value in self._of(one).items():
                mine(value).copy_(part_like(one.of(states[one.group][key]), value))

    def _of(self, one: Parameter) -> dict[str, Tensor]:
        """Its moments: floating-point tensors of its shape."""
        state: Mapping = self.optimizer.state.get(one.parameter, {})
        return {key: value for key, value in state.items()
                if isinstance(value, Tensor) and value.shape == one.parameter.shape and value.is_floating_point()}

    def keep(self) -> Kept:
        """Copies of all of them, whole."""
        return {(k, key): whole(value).clone() for k, one in enumerate(self.parameters) for key, value in self._of(one).items()}

    def put_back(self, out: Tensor, kept: Kept) -> None:
        """Where out (D,) is true, those of `kept`; zero where there were none."""
        for k, one in enumerate(self.parameters):
            mask = part_like(one.of(out), one.parameter)
            for key, value in self._of(one).items():
                part, before = mine(value), kept.get((k, key))
                part.copy_(torch.where(mask, torch.zeros_like(part) if before is None else part_like(before, value), part))
