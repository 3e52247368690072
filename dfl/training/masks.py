"""Training a part of a group: what a mask leaves out keeps its value and its moments."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import Layout


def stacked(masks: Sequence[Tensor | None], size: int) -> Tensor | None:
    """Masks (D,) of rows as (P, D), all of a row where it has none; None where no row has one."""
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones(size, dtype=torch.bool) if mask is None else mask for mask in masks])


def stretch(row: Tensor, begun: Tensor, factors: Tensor | None) -> None:
    """In place, a row (D,) whose change in the local phase, from where it begun, is multiplied by factors (D,) (`Plan.stretch`)."""
    if factors is not None:
        row += (factors.to(row) - 1) * (row - begun)


class Held:
    """The numbers of the rows x (P, D) that masks (P, D) leave out, and their moments.

    A gradient of zero is not enough: carried moments, momentum and weight decay move a number without one.
    x, moments: copies, the values to keep; moments by "peer.group.key", none where they do not outlive the round.
    """

    def __init__(self, masks: Tensor, x: Tensor, moments: Mapping[str, Tensor] = {}):
        self.out, self.x, self.moments = ~masks.to(x.device), x, moments

    def clear(self, g: Tensor) -> None:
        """Zero in the gradients (P, D) of what is left out."""
        g.masked_fill_(self.out, 0.0)

    def put_back(self, x: Tensor) -> None:
        torch.where(self.out, self.x, x, out=x)

    def put_back_moments(self, moments: Mapping[str, Tensor], ids: Sequence[int], layout: Layout) -> None:
        """In place, for the hosted peers `ids`; zero where there were none before. The step counter is that of the whole
        group, and waits where all of it is left out."""
        for name, value in moments.items():
            peer, group, key = name.split(".")
            out, before = self.out[ids.index(int(peer)), layout.groups[group]], self.moments.get(name, torch.zeros_like(value))
            if key != "step":
                value.copy_(torch.where(out, before, value))
            elif bool(out.all()):
                value.copy_(before)
