"""Means with 95 % intervals over seeds, and differences of pairs."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

# two values give an interval too, but their spread says next to nothing: t(0.975, 1) is 12.7, and equal ones would give width zero
LEAST_VALUES = 3
# values that differ by less than this share of their size are equal but for rounding
_ROUNDING = 1e-12


class Estimate(NamedTuple):
    """A mean over `num` values; `half`: half the width of its 95 % interval (Student's t).

    None with fewer than LEAST_VALUES values, or where all are equal, which is no evidence that a further one would be.
    """

    mean: float
    half: float | None
    num: int

    def text(self, digits: int = 4) -> str:
        """`0.5000 ± 0.0100 (4)`, with the number of values, or why there is no interval in its place."""
        mean = f"{self.mean:.{digits}f}"
        return f"{mean} ({self.missing})" if self.half is None else f"{mean} ± {self.half:.{digits}f} ({self.num})"

    @property
    def missing(self) -> str:
        """Why there is no interval."""
        return f"n = {self.num}{', all equal' if self.num >= LEAST_VALUES else ''}: no interval"


def quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t. ValueError where scipy is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise ValueError("intervals over several seeds need scipy: pip install 'dfl[report]'") from None
    return float(stats.t.ppf(0.975, degrees))


def estimate(values: Sequence[float | None], scale: float | None = None) -> Estimate | None:
    """Mean and 95 % interval mean ± t(0.975, n - 1) s / sqrt(n); None without a value. None among the values is left out.

    scale: the size of the numbers that the values were computed from, for what is rounding; None: their own.
    """
    known = [v for v in values if v is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    size = max(map(abs, known)) if scale is None else scale
    if len(known) < LEAST_VALUES or max(known) - min(known) <= _ROUNDING * size:
        return Estimate(mean, None, len(known))
    variance = math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1)
    return Estimate(mean, quantile(len(known) - 1) * math.sqrt(variance / len(known)), len(known))


def paired(values: Mapping[Hashable, float | None], baseline: Mapping[Hashable, float | None]) -> Estimate | None:
    """The mean of value - baseline over the keys that both have."""
    pairs = [(values[key], baseline[key]) for key in values if values[key] is not None and baseline.get(key) is not None]
    return estimate([a - b for a, b in pairs], scale=max((abs(v) for pair in pairs for v in pair), default=None))
