"""The graph and the links of a round, as hosted peers see them."""

from typing import Protocol

import numpy as np

from dfl.engine.coding import moment
from dfl.engine.memory import Memory
from dfl.methods import Method
from dfl.seeds import derive
from dfl.slots import Link, Message, Round


class Graph(Protocol):
    """What is asked of a topology: W(t), and a peer's row and column of it."""

    @property
    def num_peers(self) -> int: ...

    def matrix(self, t: int) -> np.ndarray: ...

    def neighbors(self, t: int, i: int) -> dict[int, float]:
        """The weights that peer i gives, its own among them."""

    def receivers(self, t: int, j: int) -> list[int]:
        """The others that give weight to peer j."""


class Ways:
    """Who receives from whom in round t, and what the channel does to it."""

    def __init__(self, method: Method, topology: Graph, memory: Memory, seed: int):
        self.topology, self.memory, self.seed = topology, memory, seed
        self.channel, self.merges, self.held = method.channel, method.trigger.merges, method.held

    def row(self, t: int, peer: int) -> dict[int, float]:
        """The peer's row of W(t), the peer itself first; equal weights for all where the trigger merges."""
        row = dict(self.topology.neighbors(t, peer))
        if self.merges is not None and self.merges(t):
            there = self._there(t)
            row = dict.fromkeys(there, 1 / len(there)) if peer in there else {peer: 1.0}
        return {peer: row.get(peer, 0.0)} | row

    def receivers(self, t: int, peer: int) -> list[int]:
        if self.merges is not None and self.merges(t):
            there = self._there(t)
            return [j for j in there if j != peer] if peer in there else []
        return self.topology.receivers(t, peer)

    def _there(self, t: int) -> list[int]:
        there = getattr(self.topology, "there", None)
        return list(range(self.topology.num_peers)) if there is None else np.flatnonzero(there(t)).tolist()

    def link(self, sender: int, receiver: int, t: int, k: int) -> Link:
        return Link(sender, receiver, t, derive(self.seed, "channel", sender, receiver, *moment(t, k)), self.held)

    def deliver(self, slot: str, key: str, message: Message | None, link: Link) -> Message | None:
        """What comes through. slot: whose state of the link, "channel" the receiver's, "outgoing" the sender's: both draw alike."""
        message, state = self.channel.deliver(message, self.memory.get(slot, key, self.channel.init), link)
        self.memory.keep(slot, key, state)
        return message


def others(round: Round) -> list[int]:
    return sorted(j for j in round.weights if j != round.peer)
