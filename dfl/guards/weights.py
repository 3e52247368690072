"""Guards that weigh whole messages by how far they are: ClippedGossip, Krum, the geometric median.

Messages that `norm` rejects are left out before. Each gives the others new weights, so that a rule mixes as it always
does: factors, or products. No mean is kept over the network, as what i takes of j is no longer what j takes of i.
"""

import torch
from torch import Tensor

from dfl.adapters.batched import uploaded
from dfl.adapters.layout import Layout, make_layout
from dfl.guards.distances import METRICS, inner_products, squared_distances
from dfl.guards.norm import norm
from dfl.plugins import check_choice, check_count, check_number
from dfl.slots import Guard, Inbox, Message, Round


def clipped(*, radius: float | None = None, tolerate: int = 1, metric: str = "product", layout: Layout | None = None) -> Guard:
    """Take of every neighbour no more than a step of a given length towards it (ClippedGossip).

    x_i <- x_i + sum_j w_ij clip(x_j - x_i, tau),  clip(z, tau) = z min(1, tau / ||z||): the weight w_ij min(1, tau / ||x_j - x_i||),
    what is taken off goes to i. radius: tau; null: the (1 - 2 f / d)-quantile of the distances to the d neighbours, f = tolerate
    of them poisoned (at f >= d / 2 the smallest one). A large radius is plain gossip, 0 isolation. metric: product, ||B_j A_j - B_i
    A_i|| and all else as numbers, A and B clipped jointly, whatever the frame: -B_i and -A_i are the same model and pass, which a
    rule that averages products does not mind, and one that averages factors does (its attackers are seen by metric factors). He,
    Karimireddy, Jaggi 2022, arXiv 2202.01545; the product distance is ours.
    """
    if radius is not None:
        check_number("guard.radius", radius)
    layout = checked(tolerate, metric, layout)

    def screen(inbox: Inbox, round: Round, x: Tensor) -> tuple[dict[int, Message], dict[int, float]]:
        peers, weights = sorted(inbox), dict(round.weights)
        distances = inner_products(inbox, round.peer, x, layout, metric).diagonal().clamp_min(0).sqrt()
        others = distances[uploaded([k for k, j in enumerate(peers) if j != round.peer], distances)]
        tau = radius
        if tau is None:
            tau = float(torch.quantile(others, max(0.0, 1 - 2 * tolerate / len(others)), interpolation="lower"))
        for j, distance in zip(peers, distances.tolist(), strict=True):
            if j != round.peer and distance > tau:
                taken = weights[j] * tau / distance
                weights[round.peer] += weights[j] - taken
                weights[j] = taken
        return dict(inbox), weights

    return Guard(norm().rejects, screen)


def krum(*, tolerate: int = 1, average: int = 1, metric: str = "factors", layout: Layout | None = None) -> Guard:
    """Take the message that is closest to most others, in place of a mean (Krum).

    score(j) = sum of the n - f - 2 smallest ||x_j - x_k||², k != j, over the n messages that i holds, its own among them;  x_i <-
    the message of the smallest score, or the mean of the `average` smallest (multi-Krum). f = tolerate; with fewer than 2 f + 3
    messages i keeps to itself. W counts for nothing beside who is a neighbour. Blanchard, El Mhamdi, Guerraoui, Stainer 2017,
    arXiv 1703.02757.
    """
    check_count("guard.average", average)
    layout = checked(tolerate, metric, layout)

    def screen(inbox: Inbox, round: Round, x: Tensor) -> tuple[dict[int, Message], dict[int, float]]:
        chosen = closest(squared_distances(inner_products(inbox, round.peer, x, layout, metric)), tolerate)[:average]
        peers = sorted(inbox)
        if not chosen:
            return dict(inbox), {j: float(j == round.peer) for j in peers}
        return dict(inbox), {j: (1 / len(chosen) if k in chosen else 0.0) for k, j in enumerate(peers)}

    return Guard(norm().rejects, screen)


def geometric_median(*, steps: int = 8, smoothing: float = 0.1, metric: str = "factors", layout: Layout | None = None) -> Guard:
    """Take the point whose distances to all messages sum to the least, in place of a mean (RFA).

    x_i <- argmin_z sum_j w_ij ||z - x_j||, by `steps` steps of Weiszfeld from the mean: beta_j = w_ij / max(smoothing, ||z - x_j||),
    z <- sum_j beta_j x_j / sum_j beta_j. All of it in the inner products of the messages. Pillutla, Kakade, Harchaoui 2019,
    arXiv 1912.13445.
    """
    check_count("guard.steps", steps)
    check_number("guard.smoothing", smoothing)
    if not smoothing:
        raise ValueError("guard.smoothing = 0 is not allowed; allowed: a number above 0")
    layout = checked(1, metric, layout)

    def screen(inbox: Inbox, round: Round, x: Tensor) -> tuple[dict[int, Message], dict[int, float]]:
        peers = sorted(inbox)
        inner = inner_products(inbox, round.peer, x, layout, metric)
        given = uploaded([round.weights[j] for j in peers], inner, torch.float64)
        shares = given / given.sum()
        for _ in range(steps):
            mixed = inner @ shares
            distances = (shares @ mixed - 2 * mixed + inner.diagonal()).clamp_min(0).sqrt()
            shares = given / distances.clamp_min(smoothing)
            shares = shares / shares.sum()
        return dict(inbox), dict(zip(peers, shares.tolist(), strict=True))

    return Guard(norm().rejects, screen)


def closest(distances: Tensor, tolerate: int) -> list[int]:
    """Which of J messages have the smallest score of Krum, the best first, for squared distances (J, J); none for too few."""
    num = len(distances)
    if num < 2 * tolerate + 3:
        return []
    others = distances + torch.diag(torch.full((num,), torch.inf, dtype=distances.dtype, device=distances.device))
    scores = others.sort(1).values[:, :num - tolerate - 2].sum(1)
    return scores.argsort(stable=True).tolist()


def checked(tolerate: object, metric: object, layout: Layout | None) -> Layout:
    check_count("guard.tolerate", tolerate, least=0)
    check_choice("guard.metric", metric, METRICS)
    return make_layout(()) if layout is None else layout
