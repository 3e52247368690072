"""No message that is far too large: one peer's 1e30, or -100 times its factors, would else ruin all.

This keeps out accidents and crude attacks. It is not for subtle ones: a message of ordinary size with another sign or
direction passes.
"""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from dfl.slots import Guard


def norm(*, bound: float = 30.0) -> Guard:
    """Reject messages of which a part is not finite, or has more than `bound` times the norm of the receiver's own.

    Or of the median of that part over all messages that the receiver holds; and where that is still less, than the norm
    of its whole row: B, which begins at zero, stays smaller than A under gradient descent. Where all of these are zero
    there is nothing to compare with.
    """
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 1 < bound < math.inf:
        raise ValueError(f"guard.bound = {bound!r} is not allowed; allowed: a number above 1")

    def rejects(sizes: Mapping[int, Mapping[str, float]], peer: int, row: Tensor) -> list[int]:
        return too_large(peer, sizes, bound, row)

    return Guard(rejects)


def finite() -> Guard:
    """Reject messages that hold a number that is not finite, and no other."""
    def rejects(sizes: Mapping[int, Mapping[str, float]], peer: int, row: Tensor) -> list[int]:
        return [j for j in sizes if j != peer and not is_finite(sizes[j])]

    return Guard(rejects)


def is_finite(sizes: Mapping[str, float]) -> bool:
    return all(map(math.isfinite, sizes.values()))


def too_large(own: int, sizes: Mapping[int, Mapping[str, float]], bound: float, row: Tensor) -> list[int]:
    """The senders that peer `own`, with its row (D,), rejects by the norms of the parts, its own message's among them."""
    least = {name: bound * size for name, size in sizes[own].items()}  # of the limits below
    if all(size <= least.get(name, 0.0) < math.inf for one in sizes.values() for name, size in one.items()):
        return []
    good = [j for j in sizes if is_finite(sizes[j])]
    bad = [j for j in sizes if j != own and j not in good]
    if own not in good:
        return bad
    usual = {name: bound * max(mine, statistics.median(sizes[j][name] for j in good if name in sizes[j]))
             for name, mine in sizes[own].items()}
    large = [j for j in good if j != own and _beyond(sizes[j], usual)]
    if large:
        whole = float(torch.linalg.vector_norm(row))
        limits = {name: max(limit, whole) or math.inf for name, limit in usual.items()}
        bad += [j for j in large if _beyond(sizes[j], limits)]
    return sorted(bad)


def _beyond(sizes: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    return any(size > limits[name] for name, size in sizes.items())
