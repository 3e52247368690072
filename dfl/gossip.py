"""One exchange of a round: send, encode, move, decode, mix. The loop and the simulator share it."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dfl.codecs import Codec
from dfl.rules.base import Round, Rule, State
from dfl.transport.base import Transport, edges_of


class Traffic(NamedTuple):
    """What one exchange cost: directed edges with a message in the whole run; of this process, the bytes of the messages it
    sent along them, wherever the receiver is hosted, and the seconds by phase."""

    edges: int
    message_bytes: int
    encode_s: float
    exchange_s: float
    mix_s: float


def gossip(rule: Rule, codec: Codec, transport: Transport, x: Tensor, peers: Sequence[int], states: list[State],
           w: np.ndarray, t: int, *, lr: float = 0.0, local_steps: int = 0) -> Traffic:
    """Exchange and mix round t for the hosted peers: rows x_PD change in place, `states` is updated.

    w (N, N): the mixing matrix of the round. Every receiver uses the values from before the mix. A peer also takes its
    own message as the codec decodes it.
    """
    length = rule.length(t)
    edges = edges_of(w) if length else []
    rounds = [Round(t, peer, _row(w, peer), lr, local_steps) for peer in peers]
    start = time.perf_counter()
    outbox = {}
    if length:
        for row, round in enumerate(rounds):
            message, states[row] = rule.send(x[row], states[row], round)
            outbox[round.peer] = codec.encode(message)
    size = codec.size(length, x.dtype)
    encoded = time.perf_counter()
    inboxes = transport.exchange(t, outbox, edges, size) if length else {}
    moved = time.perf_counter()
    if length:
        decoded = _decode(codec, outbox, inboxes, x)
        mixed = [rule.mix(x[row], decoded[round.peer], states[row], round) for row, round in enumerate(rounds)]
        for row, (new, state) in enumerate(mixed):
            x[row] = new
            states[row] = state
    mixed_at = time.perf_counter()
    receivers = Counter(sender for sender, _ in edges)
    message_bytes = sum(receivers[peer] * len(message) for peer, message in outbox.items())
    return Traffic(len(edges), message_bytes, encoded - start, moved - encoded, mixed_at - moved)


def _row(w: np.ndarray, peer: int) -> dict[int, float]:
    return {int(j): float(w[peer, j]) for j in np.flatnonzero(w[peer])}


def _decode(codec: Codec, outbox, inboxes, x: Tensor) -> dict[int, dict[int, Tensor]]:
    """Every message once, however many hosted peers hear it."""
    once: dict[int, Tensor] = {}

    def decode(peer: int, data: Tensor) -> Tensor:
        if peer not in once:
            once[peer] = codec.decode(data, x.dtype)
        return once[peer]

    return {peer: {peer: decode(peer, outbox[peer])}
            | {j: decode(j, data) for j, data in inboxes[peer].items()} for peer in outbox}
