"""When TAD switches its factor by itself: phases that end as soon as the frozen factor has come together on the run's own graphs.

While a factor is frozen it is only mixed: after the rounds s .. t its disagreement is (I - J) W(t) ... W(s) times what it was. All
of it follows from the topology and its seed, so that every process finds the same phases alone, and no message is needed. Not for
intervals that a recipe gives (`dfl.schedules.alternating`); nothing here looks at a model.
"""

from collections.abc import Sequence

import numpy as np

from dfl.seeds import derive
from dfl.slots import Mixing

# up to so many peers the product of all W is formed; beyond, what it does to PROBES random vectors
EXACT_PEERS, PROBES = 512, 64


class Phases:
    """The factor trained in round t: phases(t) is "B" or "A", a function of (W, ends, theta, cap) alone.

    A phase begins in round s and ends with the first t at which c = ||(I - J) W(t) ... W(s)||_F² / (n - 1) <= theta: the share of
    its squared disagreement that a frozen factor keeps, on average over what it may be (the largest share, the spectral norm, would
    wait for the one peer that nobody has met, and needs an SVD a round). After `cap` rounds it ends in any case. B comes first. The
    last phase is one of A, as late and as long as it takes B to come together by the end.

    mixing: what has num_peers and matrix(t). ends: the number of rounds of the run; before it those of the shorter runs that it
    goes on from, whose phases it keeps: each stretch is divided by itself, and ends in A; beyond the last more of its length
    follow. cap: None for a quarter of a stretch, so
    that both factors have two phases. One n x n product a round up to 512 peers; beyond, 64 random vectors of signs stand for it,
    with a relative error of c of about sqrt(2 / 64) or less.
    """

    def __init__(self, mixing: Mixing, ends: Sequence[int], theta: float, cap: int | None = None):
        self._mixing, self._theta, self._cap = mixing, theta, cap
        self._stretches = [self._stretch(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]

    def _stretch(self, start: int, stop: int) -> "_Stretch":
        return _Stretch(self._mixing, start, stop, self._theta, self._cap or max(1, (stop - start) // 4))

    def __call__(self, t: int) -> str:
        while t >= (last := self._stretches[-1]).stop:  # a loop of somebody's own, whose end nobody knew
            self._stretches.append(self._stretch(last.stop, 2 * last.stop - last.start))
        return next(s for s in self._stretches if t < s.stop).factor(t)


class _Stretch:
    """The phases of the rounds start .. stop - 1, found as they are asked for."""

    def __init__(self, mixing: Mixing, start: int, stop: int, theta: float, cap: int):
        self.mixing, self.start, self.stop, self.theta, self.cap = mixing, start, stop, theta, cap
        self._found: list[str] = []
        self._last: int | None = None
        self._phase, self._length, self._rest = "B", 0, probes(mixing.num_peers)
        self._whole = squared(self._rest)

    def factor(self, t: int) -> str:
        if t >= self.stop - self.cap and t >= self._start_of_last():
            return "A"
        while len(self._found) <= t - self.start:
            self._extend()
        return self._found[t - self.start]

    def _extend(self) -> None:
        """One more round, and whether the next one begins a phase."""
        self._rest = times(self.mixing, self.start + len(self._found), self._rest)
        self._rest -= self._rest.mean(0)
        self._found.append(self._phase)
        self._length += 1
        if self._length >= self.cap or squared(self._rest) <= self.theta * self._whole:
            self._phase, self._length, self._rest = "A" if self._phase == "B" else "B", 0, probes(self.mixing.num_peers)

    def _start_of_last(self) -> int:
        """The latest s from which what is frozen comes together by the end; at most `cap` rounds before it, and after the first."""
        if self._last is None:
            rest, s = probes(self.mixing.num_peers), self.stop
            first = max(self.start + 1, self.stop - self.cap)
            while s > first and (s == self.stop or squared(rest) > self.theta * self._whole):
                s -= 1
                rest = times(self.mixing, s, rest, transposed=True)
            self._last = s
        return self._last


def probes(num_peers: int) -> np.ndarray:
    """(n, K) with columns that sum to zero: I - J, or 64 vectors of random signs less their means."""
    columns = np.eye(num_peers)
    if num_peers > EXACT_PEERS:
        generator = np.random.Generator(np.random.Philox(derive(0, "probes", num_peers)))
        columns = generator.choice([-1.0, 1.0], size=(num_peers, PROBES))
    return columns - columns.mean(0)


def squared(x: np.ndarray) -> float:
    return float(np.square(x).sum())


def times(mixing: Mixing, t: int, x: np.ndarray, transposed: bool = False) -> np.ndarray:
    """W(t) x, or its transpose times x, for x (n, K); sparse where there are many peers and the topology has its W so."""
    if mixing.num_peers > EXACT_PEERS and hasattr(mixing, "entries"):
        entries = mixing.entries(t)
        return entries.apply_transposed(x) if transposed else entries.apply(x)
    w = mixing.matrix(t)
    return (w.T if transposed else w) @ x
