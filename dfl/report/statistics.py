"""Means with 95 % intervals over seeds, and differences of pairs."""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over `num` values; `half`: half the width of its 95 % interval (Student's t), None with fewer than two values."""

    mean: float
    half: float | None
    num: int

    def text(self, digits: int = 4) -> str:
        return f"{self.mean:.{digits}f}" + (f" ± {self.half:.{digits}f}" if self.half is not None else "")


def quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t. ValueError where scipy is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise ValueError("intervals over several seeds need scipy: pip install 'dfl[report]'") from None
    return float(stats.t.ppf(0.975, degrees))


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and 95 % interval mean ± t(0.975, n - 1) s / sqrt(n); None without a value. None among the values is left out."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1)
    return Estimate(mean, quantile(len(known) - 1) * math.sqrt(variance / len(known)), len(known))


def paired(values: Mapping[Hashable, float | None], baseline: Mapping[Hashable, float | None]) -> Estimate | None:
    """The mean of value - baseline over the keys that both have."""
    return estimate([values[key] - baseline[key] for key in values
                     if values[key] is not None and baseline.get(key) is not None])
