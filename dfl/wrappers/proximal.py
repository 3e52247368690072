"""Shared penalties without a gradient at zero, by their proximal maps: l1, and one norm for each rank-one component."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, Pair, a_view, b_view
from dfl.plugins import check_choice
from dfl.slots import Round
from dfl.wrappers.base import rate

PENALTIES = ("none", "l1", "group")
Prox = Callable[[Tensor, Round, Collection[str]], None]  # of the groups of a row, in place


def make_prox(layout: Layout, penalty: str, strength: float) -> Prox | None:
    """x <- argmin_u strength r(u) + ||u - x||^2 / (2 lr), for the groups given of row x (D,), in place.

    l1: r = sum |u|, soft thresholds. group: r = sum over layers and components k of ||(A[k, :], B[:, k])||, of what of
    both is given; a component then vanishes as a whole, and with it a rank. None: no penalty.
    """
    check_choice("wrapper.penalty", penalty, PENALTIES)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < float("inf"):
        raise ValueError(f"wrapper.strength = {strength!r} is not allowed; allowed: zero or a positive number")
    if penalty == "none" or strength == 0:
        return None

    def soft(x: Tensor, round: Round, groups: Collection[str]) -> None:
        for group in groups:
            cut = layout.groups[group]
            x[cut] = x[cut].sign() * (x[cut].abs() - strength * rate(round, group)).clamp_min(0)

    def by_component(x: Tensor, round: Round, groups: Collection[str]) -> None:
        factors = [group for group in ("A", "B") if group in groups]
        rates = {rate(round, group) for group in factors}
        if len(rates) > 1:
            raise ValueError(f"wrapper.penalty = 'group' needs one learning rate for A and B, got {sorted(rates)}; allowed: equal "
                             "train.lr_ratio.A and train.lr_ratio.B")
        for pair in layout.pairs if factors else ():
            shrink(x, pair, factors, strength * rates.copy().pop())

    return soft if penalty == "l1" else by_component


def shrink(x: Tensor, pair: Pair, factors: Collection[str], threshold: float) -> None:
    """Every component of a layer nearer to zero by `threshold` of its norm, or at zero; in place."""
    views = ([a_view(x, pair)] if "A" in factors else []) + ([b_view(x, pair).mT] if "B" in factors else [])  # (R, I), (R, O)
    norms = torch.stack([view.square().sum(1) for view in views]).sum(0).sqrt()
    keep = (1 - threshold / norms.clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(0)
    for view in views:
        view.mul_(keep[:, None])
