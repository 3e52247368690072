"""Layers that a round trains at no peer: a backward pass ends where nothing below it is trained."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters.attach import Adapted, Site
from dfl.adapters.layout import a_view, b_view, head_view


def untrained(adapted: Adapted, masks: Sequence[Tensor | None], index: Sequence[int]) -> frozenset[int]:
    """The adapted layers, by number, of which masks leave out every number at all rows `index`."""
    if adapted.cores is not None or any(masks[row] is None for row in index):
        return frozenset()
    trained = torch.stack([mask for row in index if (mask := masks[row]) is not None]).any(0)

    def left_out(site: Site) -> bool:
        tensors = [a_view(trained, site.pair), b_view(trained, site.pair)]
        tensors += [] if site.magnitude is None else [head_view(trained, site.magnitude[1])]
        return not any(bool(tensor.any()) for tensor in tensors)

    return frozenset(number for number, site in enumerate(adapted.sites) if left_out(site))
