"""Guards that go number by number: trimmed mean, median, and BRIDGE's four screens.

Messages that `norm` rejects are left out before. What comes out takes the place of the mean: every neighbour's message
becomes it, and the own weight zero. W counts for nothing beside who is a neighbour, no mean is kept over the network,
and (B R, R^-1 A) comes out otherwise than (B, A).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.guards.distances import inner_products, squared_distances
from dfl.guards.norm import norm
from dfl.guards.weights import checked, closest
from dfl.plugins import check_choice
from dfl.slots import Guard, Inbox, Message, Round

SCREENS = ("trimmed", "median", "krum", "bulyan")


def trimmed_mean(*, tolerate: int = 1) -> Guard:
    """Number by number, leave out the largest and the smallest and average the rest (trimmed mean).

    x_i <- the mean of what is left of the n messages that i holds, its own among them, without the f largest and f smallest of
    each number, f = tolerate; with fewer than 2 f + 1 messages i keeps to itself. Yin, Chen, Ramchandran, Bartlett 2018, arXiv
    1803.01498.
    """
    checked(tolerate, "factors", None)
    return _numbers(lambda rows, own, distances: trimmed(rows, tolerate))


def median() -> Guard:
    """Number by number, take the median of the messages (coordinate median).

    x_i <- the median of the n messages that i holds, its own among them; of an even number the mean of the two in the middle. Yin,
    Chen, Ramchandran, Bartlett 2018, arXiv 1803.01498.
    """
    return _numbers(lambda rows, own, distances: middle(rows))


def bridge(*, screen: str = "trimmed", tolerate: int = 1, layout: Layout | None = None) -> Guard:
    """Screen the neighbours before averaging: trimmed mean, median, Krum or Bulyan (BRIDGE-T, -M, -K, -B).

    trimmed: of the neighbours alone, without the b largest and b smallest of each number, b = tolerate; the own number is
    always part of the mean. median: of all, the own among them. krum: the message closest to most others. bulyan: theta
    = n - 2 b messages chosen by Krum one after the other, then of each number the mean of the theta - 2 b closest to
    their median. With too few messages (2 b + 1 neighbours, 2 b + 3 or 4 b + 3 messages) i keeps to itself. The paper
    adds a gradient step at the row before the screening, here local steps come first. Fang, Yang, Bajwa 2022, arXiv
    1908.08098.
    """
    check_choice("guard.screen", screen, SCREENS)
    layout = checked(tolerate, "factors", layout)

    def of_neighbours(rows: Tensor, own: int, distances: Tensor) -> Tensor | None:
        others = torch.cat([rows[:own], rows[own + 1:]])
        if len(others) < 2 * tolerate + 1:
            return None
        kept = others.sort(0).values[tolerate:len(others) - tolerate]
        return (kept.sum(0) + rows[own]) / (len(kept) + 1)

    def by_krum(rows: Tensor, own: int, distances: Tensor) -> Tensor | None:
        found = closest(distances, tolerate)
        return rows[found[0]] if found else None

    def by_bulyan(rows: Tensor, own: int, distances: Tensor) -> Tensor | None:
        left = list(range(len(rows)))
        chosen: list[int] = []
        if len(rows) < 4 * tolerate + 3:
            return None
        while len(chosen) < len(rows) - 2 * tolerate:
            best = closest(distances[left][:, left], min(tolerate, (len(left) - 3) // 2)) if len(left) > 2 else [0]
            chosen.append(left.pop(best[0]))
        rows = rows[chosen]
        near = (rows - middle(rows)).abs().argsort(dim=0, stable=True)[:len(chosen) - 2 * tolerate]
        return rows.gather(0, near).mean(0)

    screens = {"trimmed": of_neighbours, "median": lambda rows, own, distances: middle(rows), "krum": by_krum, "bulyan": by_bulyan}
    return _numbers(screens[screen])


def trimmed(rows: Tensor, tolerate: int) -> Tensor | None:
    """(M,) of rows (J, M)."""
    if len(rows) < 2 * tolerate + 1:
        return None
    return rows.sort(0).values[tolerate:len(rows) - tolerate].mean(0)


def middle(rows: Tensor) -> Tensor:
    """The median (M,) of rows (J, M)."""
    ordered, half = rows.sort(0).values, len(rows) // 2
    return ordered[half] if len(rows) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _numbers(combine: Callable[[Tensor, int, Tensor], Tensor | None]) -> Guard:
    """A guard that puts combine(rows (J, M), index of the own, squared distances (J, J)) -> (M,) in place of the mean; None: too few
    messages."""
    def screen(inbox: Inbox, round: Round, x: Tensor) -> tuple[dict[int, Message], dict[int, float]]:
        peers, own = sorted(inbox), inbox[round.peer]
        distances = squared_distances(inner_products(inbox, round.peer, x, None, "factors"))
        parts = {name: combine(torch.stack([inbox[j].parts[name] for j in peers]), peers.index(round.peer), distances)
                 for name in own.parts}
        if any(part is None for part in parts.values()):
            return dict(inbox), {j: float(j == round.peer) for j in peers}
        found = own._replace(parts={name: part for name, part in parts.items() if part is not None})
        rest = sum(weight for j, weight in round.weights.items() if j != round.peer)
        if not rest:
            return dict(inbox), dict(round.weights)
        return {j: own if j == round.peer else found for j in peers}, \
            {j: 0.0 if j == round.peer else round.weights[j] / rest for j in peers}

    return Guard(norm().rejects, screen, numbers=True)
