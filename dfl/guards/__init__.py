"""What may enter a receiver's mix: a table from name to factory, `GUARDS[name](**parameters) -> Guard`."""

from collections.abc import Callable

from dfl.guards.norm import finite, norm
from dfl.slots import Guard

GUARDS: dict[str, Callable[..., Guard]] = {"norm": norm, "finite": finite}
