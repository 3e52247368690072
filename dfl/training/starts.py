"""Frozen bases at the first gradient: the leading singular directions of dL/dW0, found without ever forming it.

G (O, I) is the gradient of the mean loss over a few examples with respect to an adapted layer's weight. Hooks catch the layer's input
X (T, I) and the gradient dY (T, O) of its output, T tokens a batch; G V = sum dY^T (X V) and G^T U = sum X^T (dY U) are all that a
randomised range finder asks for. Ponkshe et al. 2024, arXiv 2411.19557 (LoRA-SB) and 2025, arXiv 2502.15436 (Fed-SB); Halko,
Martinsson, Tropp 2009, arXiv 0909.4061.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfl.adapters.attach import Adapted, Rows
from dfl.adapters.layout import a_view, b_view, head_view
from dfl.adapters.lowrank import column_signs
from dfl.training.executors import Sequential
from dfl.training.reference import with_reference

# directions sought beyond the rank, and how often they are turned towards the leading ones: two more passes over the examples each
OVERSAMPLING, POWER_PASSES = 8, 1

# Products with the G of every layer, float64 on the CPU: of (V (I, s), False) G V (O, s), of (U (O, s), True) G^T U (I, s)
Products = Callable[[Sequence[Tensor], bool], list[Tensor]]


class Directions(NamedTuple):
    """Leading singular directions of a layer's gradient: G is about u diag(s) v^T. float64, on the CPU."""

    u: Tensor  # (O, R), orthonormal columns
    s: Tensor  # (R,), descending
    v: Tensor  # (I, R), orthonormal columns


def leading_directions(products: Products, sizes: Sequence[tuple[int, int]], rank: int, seed: int, *,
                       oversampling: int = OVERSAMPLING, power_passes: int = POWER_PASSES) -> list[Directions]:
    """The `rank` leading singular directions of the gradients of layers with sizes (O, I), rank <= min(O, I).

    Exact up to rounding where G has at most rank + oversampling non-zero singular values. Signs are fixed (the largest entry of each
    right direction is positive). 2 + 2 power_passes calls of `products`.
    """
    generator = torch.Generator().manual_seed(seed)
    right = [torch.randn(i, min(rank + oversampling, o, i), generator=generator, dtype=torch.float64) for o, i in sizes]
    for _ in range(1 + power_passes):
        left = [_orthonormal(y) for y in products([_orthonormal(z) for z in right], False)]
        right = products(left, True)
    return [_singular(q, z, rank) for q, z in zip(left, right, strict=True)]


def _orthonormal(y: Tensor) -> Tensor:
    return torch.linalg.qr(y).Q


def _singular(q: Tensor, z: Tensor, rank: int) -> Directions:
    """The singular directions of q z^T, for orthonormal columns q (O, s) and z (I, s)."""
    v, s, wh = torch.linalg.svd(z, full_matrices=False)
    v, u = v[:, :rank], (q @ wh.mT)[:, :rank]
    sign = column_signs(v)
    return Directions(u * sign, s[:rank], v * sign)


def gradient_products(adapted: Adapted, task, batches: Sequence[tuple[float, dict[str, Tensor]]]) -> Products:
    """Products with the gradients of sum_b share_b L_b, for batches (share, batch) on the model's device.

    The model is the one that training starts from, without dropout and without autocast: activations in its own type, products in
    float32, sums over batches in float64.
    """
    device = adapted.sites[0].weight.device
    rows = Rows(adapted.factors(adapted.start[None].to(device)))

    def products(thin: Sequence[Tensor], transposed: bool) -> list[Tensor]:
        adapted.model.eval()
        sums = [torch.zeros(site.pair.d_in if transposed else site.pair.d_out, t.shape[1], dtype=torch.float64, device=device)
                for site, t in zip(adapted.sites, thin, strict=True)]
        given = [t.float().to(device) for t in thin]
        with torch.enable_grad(), Sequential().bound(adapted, rows, None, [0]) as forward, _caught(adapted, given, transposed, sums):
            for share, batch in batches:
                batch = with_reference(task, adapted, batch)
                (share * task.losses(forward(task.inputs(batch), [0]), batch, 1).sum()).backward()
        for site, total in zip(adapted.sites, sums, strict=True):
            if not total.isfinite().all():
                raise ValueError(f"lora.start = 'gradient': the first gradient of layer {site.pair.name!r} is not finite; allowed: a "
                                 "model and examples with finite losses")
        return [total.cpu() for total in sums]

    return products


@contextmanager
def _caught(adapted: Adapted, thin: Sequence[Tensor], transposed: bool, sums: Sequence[Tensor]) -> Iterator[None]:
    """Every backward pass adds its part of the products to `sums`."""
    handles = [site.module.get_base_layer().register_forward_hook(partial(_catch, t, transposed, total))
               for site, t, total in zip(adapted.sites, thin, sums, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _catch(thin: Tensor, transposed: bool, total: Tensor, module: nn.Module, args, output: Tensor) -> None:
    x = args[0].detach()
    if not output.requires_grad:  # the first adapted layer: nothing below it is trained
        output.requires_grad_()

    def add(gradient: Tensor) -> None:
        x_flat, dy = x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float()
        total.add_(x_flat.mT @ (dy @ thin) if transposed else dy.mT @ (x_flat @ thin))

    output.register_hook(add)


def at_first_gradient(adapted: Adapted, task, batches: Sequence[tuple[float, dict[str, Tensor]]], *, seed: int,
                      step: float = 0.0) -> Adapted:
    """Cores between the leading directions of the first gradient, B = U_r and A = V_r^T, in place of seeded ones.

    step: the core starts where a step of gradient descent of this rate takes W0, cut to rank r: scaling B R A = -step U_r S_r V_r^T;
    with 0 at zero, and the model is the base model. Of several heads each has the next directions in order. ValueError names a layer
    whose gradient is zero or not finite.
    """
    made, start = adapted.cores, adapted.start.clone()
    sizes = [(pair.d_out, pair.d_in) for pair in made.lora.pairs]
    found = leading_directions(gradient_products(adapted, task, batches), sizes, made.lora.pairs[0].rank, seed)
    bases = torch.zeros_like(made.bases)
    for index, (pair, (u, s, v)) in enumerate(zip(made.lora.pairs, found, strict=True)):
        if s[0] == 0:
            raise ValueError(f"lora.start = 'gradient': the first gradient of layer {pair.name!r} is zero; allowed: lora.targets that "
                             "the loss depends on")
        a_view(bases, pair).copy_(v.mT)
        b_view(bases, pair).copy_(u)
        core = head_view(start, made.tensors(index)["core"])
        core.copy_(torch.diag_embed((-step / pair.scaling * s).view(core.shape[:2])))
    return adapted._replace(cores=made._replace(bases=bases), start=start)
