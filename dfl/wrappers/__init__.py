"""Optimisers across peers, as wrappers around a rule: a table from name to factory, `WRAPPERS[name](rule, **parameters) -> Rule`."""

from collections.abc import Callable

from dfl.slots import Rule
from dfl.wrappers.gradient_tracking import gradient_tracking, momentum_tracking
from dfl.wrappers.none import none

WRAPPERS: dict[str, Callable[..., Rule]] = {"none": none, "gradient_tracking": gradient_tracking,
                                            "momentum_tracking": momentum_tracking}
