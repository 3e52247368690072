"""What is remembered of messages: packets to send again, and messages as a neighbour holds them, as states.

Where a peer may be silent, its neighbours go on with the copy they hold. Over a way that loses messages both ends know
what arrived, as a link that acknowledges tells them: the sender keeps what each neighbour holds of it, and sends again
what did not get there.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfl.slots import Message, State
from dfl.transport.packet import Packet


def state_of(packet: Packet) -> State:
    """What is needed to send it again."""
    return ({f"bytes.{name}": data.clone() for name, data in packet.payload.items()}
            | {f"numel.{name}": torch.tensor(numel) for name, numel in packet.numel.items()}
            | {f"meta.{name}": value for name, value in packet.meta.items()})


def packet_of(state: State) -> Packet:
    numel = {name: int(value) for name, value in under(state, "numel.").items()}
    return Packet(under(state, "bytes."), numel, under(state, "meta."))


def state_of_message(message: Message) -> State:
    return named(message._replace(parts={name: part.clone() for name, part in message.parts.items()}))


def named(message: Message) -> State:
    """The same without copying, for tensors that are nobody else's to change."""
    return {f"part.{name}": part for name, part in message.parts.items()} | \
        {f"meta.{name}": value for name, value in message.meta.items()}


def message_of(state: State) -> Message:
    return Message(under(state, "part."), under(state, "meta."))


def under(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


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


def cut(message: Message, tensors: Mapping[str, tuple[str, slice]], names) -> Message:
    """A message of the tensors `names` alone, each as a part."""
    return message._replace(parts={name: message.parts[tensors[name][0]][tensors[name][1]] for name in tensors if name in names})


def put_together(pieces: Message, tensors: Mapping[str, tuple[str, slice]], like: Message, before: Message | None) -> Message | None:
    """The message that tensors, some from now and some from `before`, are of; None where one is nowhere."""
    if before is None and pieces.parts.keys() != tensors.keys():
        return None
    parts = {name: torch.empty_like(part) for name, part in like.parts.items()} if before is None else \
        {name: part.clone() for name, part in before.parts.items()}
    for name, piece in pieces.parts.items():
        part, columns = tensors.get(name, (None, None))
        if part not in parts or parts[part][columns].shape != piece.shape:
            return None
        parts[part][columns] = piece
    return Message(parts, pieces.meta)
