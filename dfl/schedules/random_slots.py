"""Some slots of the adapters, drawn anew for every peer and round: the schedule of Fed-PLoRA.

Slot l is row l of A and column l of B: a module of rank 1.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfl.adapters.layout import Layout, a_view, b_view
from dfl.schedules.groups import Groups
from dfl.seeds import permutation
from dfl.slots import Schedule


def random_slots(groups: Groups, *, layout: Layout, slots: int | Sequence[int] | None = None, seed: int = 0, peers: int | None = None,
                 rank: int | None = None) -> Schedule:
    """Train and exchange a random part of the slots in every round.

    slots: how many a peer trains: a whole number from 1 to R, or a list with one a peer (unequal resources); none: half
    of R. Zhang, Hu, Xu 2026, arXiv 2602.16936 (Fed-PLoRA).
    """
    draws = draws_of(layout, slots, seed, peers, rank, "schedule.slots")
    plan = groups.plan(groups.factors, groups.factors)
    return Schedule(lambda t, peer: plan._replace(mask=draws.mask(t, peer)))


class Draws(NamedTuple):
    """Which of `num_slots` slots each peer trains in each round: a function of (seed, peer, t), the same in all layers.

    slots: how many, for every peer or by peer.
    """

    layout: Layout
    num_slots: int
    slots: int | Sequence[int]
    seed: int

    @property
    def counts(self) -> list[int]:
        """How many slots there may be in a message."""
        return [self.slots] if isinstance(self.slots, int) else sorted(set(self.slots))

    def chosen(self, t: int, peer: int) -> Tensor:
        """(R,) bool."""
        count = self.slots if isinstance(self.slots, int) else self.slots[peer]
        order = torch.from_numpy(permutation(self.num_slots, self.seed, "slots", peer, t))
        return torch.zeros(self.num_slots, dtype=torch.bool).index_fill_(0, order[:count], True)

    def mask(self, t: int, peer: int) -> Tensor:
        """The numbers of a row that the peer trains if their group is trained: (D,) bool, all of those that are no factor's."""
        mask, left_out = torch.ones(self.layout.size, dtype=torch.bool), ~self.chosen(t, peer)
        for pair in self.layout.pairs:
            a_view(mask, pair)[left_out] = False
            b_view(mask, pair)[:, left_out] = False
        return mask


def draws_of(layout: Layout, slots: int | Sequence[int] | None, seed: int, peers: int | None, rank: int | None,
             field: str) -> Draws:
    """ValueError for `slots`, given in `field`, that the layout, or the number of peers, does not allow."""
    num_slots = one_rank(layout, rank, field)
    check_slots(field, slots, num_slots, peers)
    return Draws(layout, num_slots, max(1, num_slots // 2) if slots is None else slots, seed)


def one_rank(layout: Layout, rank: int | None, field: str) -> int:
    """The rank R of all layers; `rank` for a layout without any, 0 where that is not given. ValueError where layers differ."""
    ranks = {pair.rank for pair in layout.pairs}
    if len(ranks) > 1:
        raise ValueError(f"{field} are the same in all layers, whose ranks are {sorted(ranks)}; allowed: one rank")
    return ranks.pop() if ranks else rank or 0


def check_slots(field: str, slots: Any, rank: int, peers: int | None) -> None:
    """ValueError unless `slots` is none, a whole number from 1 to `rank` (0: not known) or a list of them, one a peer."""
    if slots is None:
        return
    many = isinstance(slots, list | tuple)
    counts = list(slots) if many else [slots]
    whole = all(isinstance(count, int) and not isinstance(count, bool) and 1 <= count <= (rank or count) for count in counts)
    if not whole or not counts or (many and peers is not None and len(counts) != peers):
        raise ValueError(f"{field} = {slots!r} is not allowed; allowed: null (half of them), a whole number from 1 to "
                         f"{rank or 'lora.rank'}, or a list of {peers or 'them'}, one a peer")
