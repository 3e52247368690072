"""What may enter a receiver's mix, and how much of it: a table from name to factory, `GUARDS[name](**parameters) -> Guard`."""

from collections.abc import Callable

from dfl.guards.norm import finite, norm
from dfl.guards.numbers import bridge, median, trimmed_mean
from dfl.guards.weights import clipped, geometric_median, krum
from dfl.slots import Guard

GUARDS: dict[str, Callable[..., Guard]] = {"norm": norm, "finite": finite, "clipped": clipped, "trimmed_mean": trimmed_mean,
                                           "median": median, "krum": krum, "geometric_median": geometric_median, "bridge": bridge}
