"""Optimiser moments of a peer whose factors got a new basis."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, stack_a, stack_b, write_pairs
from dfl.adapters.lowrank import align

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def rotate(states: Mapping[str, dict], layout: Layout, old: Tensor, new: Tensor) -> None:
    """Turn the moments of A and B, in place, from the frame of row old (D,) to that of row new (D,).

    states: the optimiser's state of each group. R brings the old pair closest to the new one: first moments become R^T m_A and
    m_B R. Second moments turn with the squares of R, which is what they are for uncorrelated entries; zeros would make the next
    steps 1 / sqrt(1 - beta2) too long, as the step counter goes on.
    """
    held = [(layout.groups[group], states[group]) for group in ("A", "B") if group in states]
    rows = {key: torch.zeros_like(new) for key in _MOMENTS if any(state.get(key) is not None for _, state in held)}
    for cut, state in held:
        for key in rows:
            if state.get(key) is not None:
                rows[key][cut] = state[key]
    for pairs in layout.shapes():
        *_, turn = align(*(stack(x, pairs) for x in (old, new) for stack in (stack_a, stack_b)))
        for key, row in rows.items():
            r = turn.square() if key == "exp_avg_sq" else turn
            write_pairs(row, pairs, r.mT @ stack_a(row, pairs), stack_b(row, pairs) @ r)
    for cut, state in held:
        for key in rows:
            if state.get(key) is not None:
                state[key].copy_(rows[key][cut])
