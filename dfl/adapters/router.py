"""A bank of adapters at inference: each input takes those in whose subspace it lies (an implicit mixture of experts)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfl.adapters.attach import Adapted, bind
from dfl.adapters.layout import a_view, b_view


@contextmanager
def routed(adapted: Adapted, bank: Tensor, temperature: float | None = None) -> Iterator[nn.Module]:
    """The model with all adapters of the bank, rows (N, D) of A_j and B_j, weighed by each input.

    y = W0 h + s sum_j pi_j B_j A_j h,  pi = softmax_j(||A^_j h|| / (temperature ||h||)), A^_j with rows of length one:
    the share of an input h (I,) that lies in the subspace of task j, token by token, without a parameter. It is made
    equally large for all inputs, so that one temperature serves all layers. temperature None: pi_j = 1, the plain sum.
    The head and what else a row has are those of the first row. ValueError for a temperature that is not positive. Yang
    et al. 2026, arXiv 2602.20492; its router inverts a rank-one matrix, so that this is ours.
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature = {temperature!r} is not allowed; allowed: a number above 0, or None for the plain sum")
    bind(adapted, bank[0].clone())
    layers: list[Any] = [site.module for site in adapted.sites]
    handles = [layer.get_base_layer().register_forward_hook(
        partial(_add, a_view(bank, site.pair), b_view(bank, site.pair), site.pair.scaling, temperature))
        for layer, site in zip(layers, adapted.sites, strict=True)]
    for site in adapted.sites:
        torch.zero_(site.b.data)  # the bank has it
    try:
        yield adapted.model
    finally:
        for handle in handles:
            handle.remove()


def _add(a: Tensor, b: Tensor, scaling: float, temperature: float | None, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    h = args[0].to(a.dtype)
    inner = torch.einsum("nri,...i->...nr", a, h)
    if temperature is not None:
        inner = inner * shares(a, h, temperature)[..., None]
    return output + (scaling * torch.einsum("nor,...nr->...o", b, inner)).to(output.dtype)


def shares(a: Tensor, h: Tensor, temperature: float) -> Tensor:
    """pi (..., N) of inputs h (..., I) for frames a (N, R, I): non-negative, and they sum to one."""
    unit = a / a.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    code = torch.einsum("nri,...i->...nr", unit, h).norm(dim=-1)
    return (code / (temperature * h.norm(dim=-1, keepdim=True).clamp_min(1e-12))).softmax(-1)


def forgetting(alone: Tensor, together: Tensor) -> Tensor:
    """How much worse each task is done once others were learnt, (T,): accuracy of its own adapter alone less that with all."""
    return alone - together
