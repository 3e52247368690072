"""What a receiver lets in: a neighbour's message that is no number, or far too large, is rejected, and its sender named.

This keeps out accidents and crude attacks: one peer's 1e30, or -100 times its factors, would else ruin all. It is not for subtle ones:
a message of ordinary size with another sign or direction passes.
"""

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfl.rules.base import Round, Rule


def norms(rule: Rule, messages: Mapping[int, Tensor], t: int) -> dict[int, list[float]]:
    """The norm of each part of each message, by its key; not finite where a number is not, or the rule cannot read the message."""
    found = {}
    lengths = rule.parts(t) if rule.parts is not None else None
    for key, message in messages.items():
        if rule.readable is not None and not rule.readable(message):
            found[key] = torch.full((1 if lengths is None else len(lengths),), torch.nan, device=message.device)
            continue
        body = message[rule.integers:]
        parts = [body] if lengths is None else body.split(list(lengths))
        found[key] = torch.stack([torch.linalg.vector_norm(part) for part in parts])
        if not found[key].isfinite().all():  # squares of float32 end at 1e38: large numbers are numbers
            found[key] = torch.stack([torch.linalg.vector_norm(part.double()) for part in parts])
    return {key: values.tolist() for key, values in found.items()}


def rejected(own: int, sizes: Mapping[int, Sequence[float]], bound: float | None, row: Tensor) -> list[int]:
    """The senders whose messages peer `own` does not take, by the norms of the parts of what it holds, its own message among them.

    bound: a part of a message may have `bound` times the norm of the receiver's own part, or of the median of all parts it holds,
    or the norm of its whole row (D,): B, which begins at zero, stays smaller than A under gradient descent. None: any finite
    norm. Where all of these are zero there is nothing to compare with.
    """
    finite = {j: all(size < float("inf") for size in sizes[j]) for j in sizes}
    good = [j for j in sizes if finite[j]]
    bad = [j for j in sizes if j != own and not finite[j]]
    if bound is None or own not in good:
        return bad
    middle = [statistics.median(sizes[j][part] for j in good) for part in range(len(sizes[own]))]
    usual = [bound * max(mine, median) for mine, median in zip(sizes[own], middle, strict=True)]
    large = [j for j in good if j != own and any(size > limit for size, limit in zip(sizes[j], usual, strict=True))]
    if large:
        whole = float(torch.linalg.vector_norm(row))
        limits = [max(limit, whole) or float("inf") for limit in usual]
        bad += [j for j in large if any(size > limit for size, limit in zip(sizes[j], limits, strict=True))]
    return sorted(bad)


def without(inbox: dict[int, Tensor], round: Round, bad: Sequence[int]) -> tuple[dict[int, Tensor], Round]:
    """The inbox without some senders, their weight given to the receiver itself."""
    if not bad:
        return inbox, round
    weights = {j: weight for j, weight in round.weights.items() if j not in bad}
    weights[round.peer] = weights.get(round.peer, 0.0) + sum(round.weights[j] for j in bad)
    return {j: message for j, message in inbox.items() if j not in bad}, round._replace(weights=weights)
