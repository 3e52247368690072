"""What the hosted peers remember of a round: the state tree, as the steps of a round ask for it.

Where a peer may be silent, its neighbours go on with the copy they hold. Over a way that loses messages both ends know
what arrived, as a link that acknowledges tells them: the sender keeps what each neighbour holds of it, and sends again
what did not get there. So messages, and packets to send again, are states as well.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dfl.engine.state import Tree
from dfl.slots import Message, State
from dfl.transport.packet import Packet

REMEMBERED = ("trigger", "codec", "sent", "received", "channel", "delivered", "outgoing", "start", "clock", "ahead")


class Memory:
    """The tree of a `Gossip`; whoever snapshots, restores or saves it may put another in its place."""

    def __init__(self) -> None:
        self.tree: Tree = {slot: {} for slot in ("rule", *REMEMBERED)}

    def get(self, slot: str, key: str, init: Callable[[], State]) -> State:
        found = self.tree[slot].get(key)
        return init() if found is None else found

    def keep(self, slot: str, key: str, state: State) -> None:
        if state:
            self.tree[slot][key] = state

    def start(self, peer: int) -> Message | None:
        """What everybody knows of a peer before a word is said."""
        found = self.tree["start"].get(str(peer))
        return None if found is None else message_of(found)

    def message(self, slot: str, key: str) -> Message | None:
        """What one end of a link holds of the other, at least the start where all know it."""
        found = self.tree[slot].get(key)
        return self.start(int(key.partition("/")[0])) if found is None else message_of(found)


def state_of_packet(packet: Packet) -> State:
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
