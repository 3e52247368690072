"""Messages beside each other: their norms, whether they are alike, and numbers of one in the place of another's."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from dfl.slots import Message

Tensors = Mapping[str, tuple[str, slice]]  # what travels one by one: by name, the part that it is in and where


def norms(messages: Sequence[Message]) -> list[dict[str, float]]:
    """The norm of each part of each message: not finite where a number is not. One synchronisation for all."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for k, message in enumerate(messages):
        for name, part in message.parts.items():
            parts.setdefault(name, []).append((k, part))
    found: list[dict[str, float]] = [dict.fromkeys(message.parts, 0.0) for message in messages]
    if parts:
        sizes = torch.cat([_sizes([part for _, part in held]) for held in parts.values()]).tolist()
        for (name, k, part), size in zip(((name, *one) for name, held in parts.items() for one in held), sizes, strict=True):
            # squares of float32 end at 1e38: large numbers are numbers
            found[k][name] = size if math.isfinite(size) else float(torch.linalg.vector_norm(part.double()))
    return found


def _sizes(parts: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor (M,), of those that lie at equal distances, as the rows of hosted peers do, in one call: (K,)."""
    first, last = parts[0], parts[-1]
    length, places = first.numel(), [part.data_ptr() for part in parts]
    step = places[1] - places[0] if len(parts) > 1 else 0
    alike = (step > 0 and step % first.itemsize == 0 and places == list(range(places[0], places[0] + step * len(parts), step))
             and all(part.dtype == first.dtype and part.numel() == length for part in parts)
             and first.untyped_storage().data_ptr() == last.untyped_storage().data_ptr())
    if alike:
        return torch.linalg.vector_norm(first.as_strided((len(parts), length), (step // first.itemsize, 1)), dim=1)
    return torch.stack([torch.linalg.vector_norm(part) for part in parts])


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
