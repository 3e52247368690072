"""A deadline for every round: who is late trains the last blocks alone (SALF)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.plugins import check_choice, check_number
from dfl.schedules.depths import Depths
from dfl.schedules.groups import Groups
from dfl.slots import Plan, Schedule

ESTIMATORS = ("step", "none", "paper", "code")


def stragglers(groups: Groups, *, layout: Layout, speed: str = "uniform", deadline: float | None = None,
               seconds: float | Sequence[float] = 1.0, share: float = 1.0, late: str = "blocks", estimator: str = "step",
               largest: float = 5.0, seed: int = 0, peers: int | None = None) -> Schedule:
    """Train the blocks that a peer's backward pass reaches before the deadline (SALF).

    Peer i reaches the last D_i(t) of L blocks, a block what a layer's name has up to its first number; the others
    receive no gradient (none is computed), and keep their values and moments. With estimator step, what the local phase
    did to block l is multiplied by min(1 / q_l, largest), q_l how likely i reaches it, so that its mean is the full
    step: of the update and not of the gradient, which Adam would undo. speed, deadline, seconds, share: where D comes
    from (`dfl.schedules.depths`); late drop leaves out everything of who misses a block, the baseline. On a simulated
    network, who is stopped is so at the deadline. The rule `salf` sends only those blocks; another sends all. Lang,
    Cohen, Shlezinger 2024, arXiv 2403.18375; Poisson depths: ADEL-FL, arXiv 2505.23973; the step is ours.
    """
    check_choice("schedule.estimator", estimator, ESTIMATORS)
    check_number("schedule.largest", largest, least=1.0)
    depths = Depths(layout, speed=speed, deadline=deadline, seconds=seconds, share=share, late=late, seed=seed, peers=peers)
    plan, masks = groups.plan(groups.factors, groups.factors), dict[int, Tensor]()

    def of_round(t: int, peer: int) -> Plan:
        depth = depths.depth(t, peer)
        if depth not in masks:
            masks[depth] = depths.reached(depth)
        late_by = deadline if depth < depths.num_blocks else None
        stretch = stretched(depths, peer, largest) if estimator == "step" else None
        return plan._replace(mask=masks[depth], stretch=stretch, seconds=late_by)

    facts = {"blocks": len(depths.names), "speed": depths.speed, "late": late, "estimator": estimator}
    return Schedule(of_round, groups.kind, facts=facts)


def stretched(depths: Depths, peer: int, largest: float) -> Tensor | None:
    """min(1 / q_l, largest) of every number of a row (D,); None where all of them are 1."""
    factors = [min(1 / share, largest) if share else 1.0 for share in depths.reach(peer)]
    return None if set(factors) == {1.0} else torch.tensor([1.0, *factors])[depths.block_of]
