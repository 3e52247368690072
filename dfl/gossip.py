"""One exchange of a round: send, encode, move, decode, mix. The loop and the simulator share it."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfl import guard as guards
from dfl.codecs import Codec
from dfl.factors import Layout
from dfl.rules.base import EXACT, Round, Rule, State
from dfl.seeds import derive
from dfl.transport.base import Transport, edges_of


class Traffic(NamedTuple):
    """What one exchange cost: directed edges with a message in the whole run; of this process, the bytes of the messages it
    sent along them, wherever the receiver is hosted, the messages that its peers rejected as (receiver, sender), and the seconds by
    phase."""

    edges: int
    message_bytes: int
    rejected: list[tuple[int, int]]
    encode_s: float
    exchange_s: float
    mix_s: float


def gossip(rule: Rule, codec: Codec, transport: Transport, x: Tensor, peers: Sequence[int], states: list[State],
           w: np.ndarray, t: int, *, lr: float = 0.0, rates: Mapping[str, float] = {}, local_steps: int = 0,
           tag: int = 0, seed: int = 0, guard: float | None = None, fold: Callable[..., Tensor] | None = None) -> Traffic:
    """Exchange and mix round t for the hosted peers: rows x_PD change in place, `states` is updated.

    w (N, N): the mixing matrix of the round. Every receiver uses the values from before the mix. What a codec that rounds does to
    the mean, `Rule.averages` says; `seed` is for its draws. A neighbour's message that is not finite, or larger than
    `guard` allows (`dfl.guard.rejected`), is rejected: its weight stays with the receiver.
    tag: what the messages belong to (`digest_of_common`); TypeError where a neighbour's is another.
    fold: peers whose adapters are scaled differently: fold(row, k) as if all were scaled alike, fold(row, k, True) back.
    """
    fold = fold or same
    speaks = bool(rule.sends(t))
    length = rule.length(t)
    edges = edges_of(w) if speaks else []
    rounds = [Round(t, peer, _row(w, peer), lr, local_steps, rates) for peer in peers]
    start = time.perf_counter()
    outbox, exact = {}, {}
    if speaks:
        for row, round in enumerate(rounds):
            message, states[row] = rule.send(fold(x[row], row), states[row], round)
            outbox[round.peer] = _encode(codec, rule, message, derive(seed, "codec", round.peer, t))
            if rule.averages and codec.unbiased is not None:
                exact[round.peer] = message
    size = None if length is None else codec.size(length, x.dtype)
    encoded = time.perf_counter()
    inboxes = transport.exchange(t, outbox, edges, size, tag) if speaks else {}
    moved = time.perf_counter()
    rejected: list[tuple[int, int]] = []
    if speaks:
        decoded = _decode(codec, rule.integers, outbox, inboxes, x)
        norms = guards.norms(rule, {id(message): message for inbox in decoded.values() for message in inbox.values()}, t)
        mixed = []
        for row, round in enumerate(rounds):
            sizes = {j: norms[id(message)] for j, message in decoded[round.peer].items()}
            bad = guards.rejected(round.peer, sizes, guard, x[row])
            rejected += [(round.peer, sender) for sender in bad]
            inbox, round = guards.without(decoded[round.peer], round, bad)
            if round.peer in exact and len(inbox) > 1:
                inbox, round = _beside_rounded(exact[round.peer], inbox, round)
            new, state = x[row], states[row]
            # what a peer cannot hear from itself it cannot mix; its next local phase says that it has diverged
            if all(map(math.isfinite, sizes[round.peer])):
                new, state = rule.mix(fold(new, row), inbox, state, round)
                # alone, it keeps its bits, which folding there and back may not
                new = fold(new, row, True) if len(inbox) > 1 or fold is same else x[row]
            mixed.append((new, state))
        for row, (new, state) in enumerate(mixed):
            x[row] = new
            states[row] = state
    mixed_at = time.perf_counter()
    receivers = Counter(sender for sender, _ in edges)
    message_bytes = sum(receivers[peer] * len(message) for peer, message in outbox.items())
    return Traffic(len(edges), message_bytes, rejected, encoded - start, moved - encoded, mixed_at - moved)


def same(row: Tensor, k: int, back: bool = False) -> Tensor:
    """All peers are scaled alike."""
    return row


def _row(w: np.ndarray, peer: int) -> dict[int, float]:
    """A peer's row of W as {peer: weight}; its own weight is there also where it is zero."""
    return {peer: float(w[peer, peer])} | {int(j): float(w[peer, j]) for j in np.flatnonzero(w[peer])}


def _encode(codec: Codec, rule: Rule, message: Tensor, seed: int) -> Tensor:
    """The bytes (uint8) of a message: its integers as they are, then what the codec makes of the rest."""
    integers, rest = message[:rule.integers], message[rule.integers:]
    if codec.unbiased is None or rule.averages:
        data = codec.encode(rest)
    else:
        data = codec.unbiased(rest, torch.Generator(rest.device).manual_seed(seed))
    return torch.cat([integers.view(torch.uint8), data]) if rule.integers else data


def _beside_rounded(message: Tensor, inbox: dict[int, Tensor], round: Round) -> tuple[dict[int, Tensor], Round]:
    """The inbox and weights of m_i + sum_j w_ij (Q(m_j) - Q(m_i)): a peer loses nothing of its own to the codec.

    For doubly stochastic W the sum over peers of what is added is zero, so that the network mean is kept whatever Q does.
    """
    weights = {EXACT: 1.0} | {j: weight - (j == round.peer) for j, weight in round.weights.items()}
    return {EXACT: message} | inbox, round._replace(weights=weights)


def _decode(codec: Codec, integers: int, outbox, inboxes, x: Tensor) -> dict[int, dict[int, Tensor]]:
    """Every message once, however many hosted peers hear it."""
    once: dict[int, Tensor] = {}  # by the identity of its bytes
    head = integers * x.dtype.itemsize

    def decode(data: Tensor) -> Tensor:
        if id(data) not in once:
            try:
                message = codec.decode(data[head:], x.dtype)
                once[id(data)] = torch.cat([data[:head].view(x.dtype), message]) if head else message
            except RuntimeError:  # its bytes are no whole numbers
                once[id(data)] = x.new_full((1,), torch.nan)
        return once[id(data)]

    return {peer: {peer: decode(outbox[peer])} | {j: decode(data) for j, data in inboxes[peer].items()} for peer in outbox}


def digest_of_common(rule: Rule, layout: Layout, x: Tensor) -> int:
    """A 32-bit number that all peers must share: what the groups that stay the same for ever hold (0: there are none).

    x (P, D): the rows of the hosted peers. TypeError when they differ among themselves: what was trained beside one
    frozen A means nothing beside another.
    """
    if not rule.common:
        return 0
    digests = {hashlib.sha256(torch.cat([row[cut] for cut in layout.columns(rule.common)]).cpu().numpy().tobytes()).digest()
               for row in x}
    if len(digests) > 1:
        raise TypeError(f"the peers hold {len(digests)} different {'+'.join(sorted(rule.common))}, which this rule never mixes; "
                        "all must start from the same")
    return int.from_bytes(digests.pop()[:4], "big") or 1
