"""Cyclic shifts over time: one-peer exponential and EquiTopo."""

from __future__ import annotations

import math

import numpy as np

from topologies.circulant import Shifts, StaticShifts
from topologies.randomness import generator
from topologies.registry import Entry, refuse
from topologies.sequences.matchings import Matching
from topologies.topology import Topology


class OnePeerExponential(Shifts):
    """In round t, i sends to (i + 2^(t mod tau)) mod n with weight 1/2, tau = ceil(log2 n).

    Any tau consecutive W multiply to J iff n = 2^tau (Ying et al. 2021, arXiv 2110.13363; Assran et al. 2019).
    """

    def __init__(self, num_peers: int):
        super().__init__("one_peer_exponential", num_peers)
        self.period = max(1, (num_peers - 1).bit_length())

    def shifts(self, t):
        return [(2 ** (t % self.period), 0.5)]


def random_shifts(num_peers: int, count: int, seed: int) -> list[int]:
    """``count`` uniform offsets in 1..n-1, redrawn until the graph they make is strongly connected."""
    for attempt in range(1000):
        offsets = generator(seed, attempt, "shift").integers(1, num_peers, size=count).tolist()
        if math.gcd(num_peers, *offsets) == 1:
            return offsets
    raise refuse("equistatic", "num_shifts that connect the peers", f"num_shifts={count}, num_peers={num_peers}")


def equistatic(num_peers: int, *, directed: bool, num_shifts: int | None, seed: int) -> Topology:
    """Mean of M random shifts A_a, each (n-1)/n on the shift and 1/n on the diagonal; undirected: with transposes.

    M in proportion to log n makes the rate independent of n (Song et al. 2022, arXiv 2210.07881).
    """
    count = max(1, (num_peers - 1).bit_length()) if num_shifts is None else num_shifts
    if not 1 <= count <= 100_000:
        raise refuse("equistatic", "num_shifts from 1 to 100,000", count)
    offsets = random_shifts(num_peers, count, seed) if num_peers > 1 else []
    if not directed:
        offsets = offsets + [num_peers - offset for offset in offsets]
    weight = (num_peers - 1) / num_peers / max(1, len(offsets))
    topology = StaticShifts("equistatic", num_peers, [(offset, weight) for offset in offsets])
    topology.symmetric = not directed
    return topology


class DirectedEquiDyn(Shifts):
    """One uniform shift a each round: W = (1 - eta) I + eta A_a; contraction (n-1) / (2n) at eta = 1/2."""

    def __init__(self, num_peers: int, eta: float, seed: int):
        super().__init__("equidyn", num_peers)
        self.weight, self.seed = eta * (num_peers - 1) / num_peers, seed

    def shifts(self, t):
        if self.num_peers == 1:
            return []
        return [(int(generator(self.seed, t, "shift").integers(1, self.num_peers)), self.weight)]

    def invariant_contraction(self):
        n, c = self.num_peers, self.weight
        return 1.0 - 2 * c * (1 - c) * n / (n - 1) if n > 1 else 0.0


class UndirectedEquiDyn(Matching):
    """A uniform shift a and start s each round; walking from s, i is matched with i + a if both are free.

    The walk pairs blocks: the first a peers with the next a, and so on, so a peer finds its partner by arithmetic.
    """

    def __init__(self, num_peers: int, eta: float, seed: int):
        super().__init__("equidyn", num_peers, eta * (num_peers - 1) / num_peers)
        self.seed = seed

    def partner(self, t, ids):
        if self.num_peers == 1:
            return ids
        offset, start = generator(self.seed, t, "shift").integers((1, 0), self.num_peers).tolist()
        place = pair_blocks((ids - start) % self.num_peers, min(offset, self.num_peers - offset), self.num_peers)
        return (place + start) % self.num_peers

    def second_moment(self):
        """I - 2 w (1 - w) E[L of the matched pairs]: an edge of offset a is matched with probability pairs(a) / n."""
        n, first = self.num_peers, np.zeros(self.num_peers)
        for offset in range(1, n):
            place = pair_blocks(np.arange(n), min(offset, n - offset), n)
            matched = (place != np.arange(n)).sum() / (2 * n * (n - 1))
            np.subtract.at(first, [offset, n - offset], matched)
        first[0] = -first.sum()
        shift = np.subtract.outer(np.arange(n), np.arange(n)) % n
        return np.eye(n) - 2 * self.weight * (1 - self.weight) * first[shift]


def pair_blocks(place: np.ndarray, offset: int, n: int) -> np.ndarray:
    """Partner of each place 0..n-1 when blocks of ``offset`` <= n / 2 are paired one with the next; itself if left over."""
    first = place // offset % 2 == 0
    other = np.where(first, place + offset, place - offset)
    return np.where(other < n, other, place)


def equidyn(num_peers: int, *, directed: bool, eta: float, seed: int) -> Topology:
    """EquiTopo's one-peer sequences (Song et al. 2022, arXiv 2210.07881). eta = 1 hardly mixes when n is large."""
    if not 0 < eta <= 1:
        raise refuse("equidyn", "eta in (0, 1]", eta)
    return (DirectedEquiDyn if directed else UndirectedEquiDyn)(num_peers, eta, seed)


def one_peer_exponential(num_peers: int) -> Topology:
    """Shift by 2^(t mod tau) with weight 1/2, tau = ceil(log2 n); exact after tau rounds iff n = 2^tau (arXiv 2110.13363)."""
    return OnePeerExponential(num_peers)


def d_equistatic(num_peers: int, *, num_shifts: int | None = None, seed: int = 0) -> Topology:
    """D-EquiStatic: the mean of ``num_shifts`` random shifts, ceil(log2 n) by default (Song et al. 2022, arXiv 2210.07881)."""
    return equistatic(num_peers, directed=True, num_shifts=num_shifts, seed=seed)


def u_equistatic(num_peers: int, *, num_shifts: int | None = None, seed: int = 0) -> Topology:
    """U-EquiStatic: as D-EquiStatic, with every shift's transpose; symmetric (Song et al. 2022, arXiv 2210.07881)."""
    return equistatic(num_peers, directed=False, num_shifts=num_shifts, seed=seed)


def od_equidyn(num_peers: int, *, eta: float = 0.5, seed: int = 0) -> Topology:
    """OD-EquiDyn: W = (1 - eta) I + eta A_a for one random shift a a round (Song et al. 2022, arXiv 2210.07881)."""
    return equidyn(num_peers, directed=True, eta=eta, seed=seed)


def ou_equidyn(num_peers: int, *, eta: float = 0.5, seed: int = 0) -> Topology:
    """OU-EquiDyn: pairs (i, i + a) for a random shift a a round; symmetric (Song et al. 2022, arXiv 2210.07881)."""
    return equidyn(num_peers, directed=False, eta=eta, seed=seed)


SEQUENCES: dict[str, Entry] = {
    "one_peer_exponential": Entry(one_peer_exponential, "round t: i sends to i + 2^(t mod log2 n); exact for n = 2^k"),
    "d_equistatic": Entry(d_equistatic, "EquiTopo, static directed: the mean of random shifts (num_shifts)"),
    "u_equistatic": Entry(u_equistatic, "EquiTopo, static undirected: random shifts and their transposes (num_shifts)"),
    "od_equidyn": Entry(od_equidyn, "EquiTopo, one random directed shift a round (eta)"),
    "ou_equidyn": Entry(ou_equidyn, "EquiTopo, one matching by a random shift a round (eta)"),
}
