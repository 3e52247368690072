"""Messages beside each other: their norms, whether they are alike, and numbers of one in the place of another's."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch

from dfl.slots import Message

Tensors = Mapping[str, tuple[str, slice]]  # what travels one by one: by name, the part that it is in and where


def norms(messages: Sequence[Message]) -> list[dict[str, float]]:
    """The norm of each part of each message: not finite where a number is not. One synchronisation for all."""
    flat = [(k, name, part) for k, message in enumerate(messages) for name, part in message.parts.items()]
    found: list[dict[str, float]] = [{} for _ in messages]
    if flat:
        sizes = torch.stack([torch.linalg.vector_norm(part) for _, _, part in flat]).tolist()
        for (k, name, part), size in zip(flat, sizes, strict=True):
            # squares of float32 end at 1e38: large numbers are numbers
            found[k][name] = size if math.isfinite(size) else float(torch.linalg.vector_norm(part.double()))
    return found


def numbers(message: Message) -> int:
    return sum(part.numel() for part in message.parts.values())


def equal(one: Message, other: Message) -> bool:
    return one.parts.keys() == other.parts.keys() and all(torch.equal(part, other.parts[name]) for name, part in one.parts.items())


def same_lengths(one: Message, other: Message) -> bool:
    return one.parts.keys() == other.parts.keys() and all(part.shape == other.parts[name].shape for name, part in one.parts.items())


def patched(message: Message, instead: Message | None) -> Message | None:
    """The message with `instead`'s numbers in place of those that were lost; None where that cannot stand for it."""
    if not message.lost:
        return message
    if instead is None or not same_lengths(message, instead):
        return None
    parts = {name: torch.where(message.lost[name], instead.parts[name], part) if name in message.lost else part
             for name, part in message.parts.items()}
    return Message(parts, message.meta)


def cut(message: Message, tensors: Tensors, names: Collection[str]) -> Message:
    """A message of the tensors `names` alone, each as a part."""
    return message._replace(parts={name: message.parts[tensors[name][0]][tensors[name][1]] for name in tensors if name in names})


def put_together(pieces: Message, tensors: Tensors, like: Message, before: Message | None) -> Message | None:
    """The message that tensors, some from now and some from `before`, are of; None where one is nowhere."""
    if before is None and pieces.parts.keys() != tensors.keys():
        return None
    parts = {name: torch.empty_like(part) for name, part in like.parts.items()} if before is None else \
        {name: part.clone() for name, part in before.parts.items()}
    for name, piece in pieces.parts.items():
        part, columns = tensors.get(name, ("", slice(0)))
        if part not in parts or parts[part][columns].shape != piece.shape:
            return None
        parts[part][columns] = piece
    return Message(parts, pieces.meta)
