"""Who is away in a round: peers that join, leave and return, as a topology has them (`presence`)."""

from typing import Any

import torch

from dfl.adapters.layout import Layout
from dfl.slots import Plan, Schedule


def among_present(schedule: Schedule, layout: Layout, topology: Any) -> Schedule:
    """The schedule, and for a peer that the topology's `away(t, peer)` names a round in which it does nothing: it trains no
    number, takes no time, and says and hears nothing. A topology without `away`: the schedule as it is."""
    away = getattr(topology, "away", None)
    if away is None:
        return schedule
    nothing = torch.zeros(layout.size, dtype=torch.bool)

    def plan(t: int, peer: int) -> Plan:
        found = schedule.plan(t, peer)
        return found._replace(mask=nothing, stretch=None, seconds=0.0, away=True) if away(t, peer) else found

    return schedule._replace(plan=plan)
