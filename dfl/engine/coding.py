"""Between numbers and bytes: a peer's message as a packet, and a packet as the message that others take it for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dfl.engine import messages
from dfl.engine.memory import Memory
from dfl.engine.state import edge
from dfl.methods import Method
from dfl.seeds import derive
from dfl.slots import Message, Round
from dfl.transport.ledger import CLOCK
from dfl.transport.packet import Packet


class Coding:
    """The codec of a method with what each hosted peer's state in it is. common: what all messages have to belong to."""

    def __init__(self, method: Method, memory: Memory, seed: int, common: int):
        self.method, self.codec, self.memory, self.seed, self.common = method, method.codec, memory, seed, common
        self.differences = method.codec.update is not None

    def encode(self, message: Message, round: Round, k: int) -> Packet:
        """The bytes of a peer's message in the k-th exchange of a round."""
        key, when, draw = str(round.peer), moment(round.t, k), None
        if round.exchange:  # what another exchange sends is another thing, with errors of its own
            key = edge(round.peer, round.exchange)
        if self.codec.draws == "round":
            draw = derive(self.seed, "codec", *when)
        elif self.codec.draws or self.method.rule.updates or not self.method.rule.averages:
            draw = derive(self.seed, "codec", round.peer, *when)
        payload, state = self.codec.encode(message.parts, self.memory.get("codec", key, lambda: self.codec.init(message.parts)), draw)
        self.memory.keep("codec", key, state)
        meta = message.meta if not self.common else {**message.meta, "common": torch.tensor([self.common])}
        return Packet(payload, {name: part.numel() for name, part in message.parts.items()}, meta)

    def decode(self, packet: Packet, own: Message, held: Mapping[str, Tensor] | None = None) -> Message | None:
        """None for bytes that are no numbers. held: by part, what was known of the sender, for a codec of differences."""
        like = next(iter(own.parts.values()))
        parts = {}
        try:
            for name, data in packet.payload.items():
                data, numel = data.to(like.device), packet.numel[name]
                parts[name] = (self.codec.decode(name, data, numel, like.dtype) if self.codec.update is None
                               else self.codec.update(name, data, (held or {}).get(name), numel, like.dtype))
        except (RuntimeError, ValueError, IndexError):
            return None
        return Message(parts, {name: value for name, value in packet.meta.items() if name != CLOCK})

    def read(self, packet: Packet, message: Message) -> Message:
        """What others take a peer's message for that is in a packet of its own."""
        if self.codec.exact:
            return message._replace(meta=packet.meta)
        found = self.decode(packet, message)
        assert found is not None  # a codec reads its own bytes
        return found

    def copy_of(self, message: Message, peer: int) -> Message:
        """What all neighbours hold of a peer, where differences travel."""
        own = self.memory.tree["codec"][str(peer)]
        return message._replace(parts={name: own[name] for name in message.parts})

    def complete(self, found: Message | None, own: Message, before: Message | None) -> Message | None:
        """A message, where its tensors travel one by one, with those that did not from what was known before."""
        if found is None or self.method.trigger.tensors is None:
            return found
        return messages.put_together(found, self.method.trigger.tensors(own), own, before)


def moment(t: int, k: int) -> tuple[int, ...]:
    """A round, or one of several exchanges in it, as names of a seed."""
    return (t,) if k == 0 else (t, k)
