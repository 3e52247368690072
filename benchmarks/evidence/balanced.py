"""A plug-in rule for one ablation: plain averaging in DeCAF's frame, without its product mixing. Not a method of its
own.

DeCAF leaves A and B of equal norm after every mix, and mixes products. This rule does the first alone, so that the two
can be told apart.
"""

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, stack_a, stack_b, write_pairs
from dfl.adapters.lowrank import align, refactor, truncate
from dfl.rules import RULES
from dfl.rules.base import weighted_mean
from dfl.rules.pairs import Received, pair_gossip
from dfl.slots import Rule, State


def balanced_average(layout: Layout) -> Rule:
    """Average factors, then split the own product evenly: B A of `average`, with B^T B = A A^T, in the peer's own
    frame.
    """
    num_factors = layout.groups["B"].stop

    def combine(out: Tensor, received: Received, state: State) -> State:
        own = out.clone()
        out[:num_factors] = weighted_mean(dict(zip(received.peers, received.rows, strict=True)), received.round.weights)
        for pairs in layout.shapes():
            a, b = stack_a(out, pairs), stack_b(out, pairs)
            svd = truncate(b, a, pairs[0].rank)
            new_a, new_b = refactor(svd, a, "balanced")
            new_a, new_b, _ = align(new_a, new_b, stack_a(own, pairs), stack_b(own, pairs))
            alive = (svd.spectrum[:, 0] > 0)[:, None, None]  # a product of zero has no factors to balance
            write_pairs(out, pairs, torch.where(alive, new_a, a), torch.where(alive, new_b, b))
        return state

    return pair_gossip(layout, combine)


RULES["balanced_average"] = balanced_average
