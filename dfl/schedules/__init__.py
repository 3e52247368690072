"""What trains and what is exchanged, round by round: `SCHEDULES[name](groups, **parameters) -> Schedule`."""

from collections.abc import Callable

from dfl.schedules.alternating import alternate, automatic
from dfl.schedules.fixed import alone, both, frozen_a, own_a, share_a
from dfl.schedules.random_slots import random_slots
from dfl.schedules.stragglers import stragglers
from dfl.slots import Schedule

SCHEDULES: dict[str, Callable[..., Schedule]] = {"both": both, "frozen_a": frozen_a, "share_a": share_a, "own_a": own_a,
                                                 "alternate": alternate, "automatic": automatic, "random_slots": random_slots,
                                                 "stragglers": stragglers, "alone": alone}
