"""What each peer sent: the numbers that papers compare, by peer and round."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dfl.transport.packet import Packet

Counts = Callable[[str, int, int], tuple[int, int]]
CLOCK = "clock"  # the metadatum that carries a sender's simulated time: no part of its message


class Ledger(NamedTuple):
    """What one peer sent in one round.

    messages: along directed edges, those to a peer in the same process as well;  broadcasts: how often it spoke, to
    however many (an answer, and what a neighbour is sent that was none before, are messages alone);  payload_bytes: of
    the parts of messages, over all receivers and repetitions;  header_bytes: of the integers beside them;
    index_bytes: of those that say which numbers the parts hold;  channel_uses: numbers that it put on its way, once
    for all who listen (over the air: that it received, once for all who sent);  repeated: messages sent again, a part
    of one as that part;  due: messages that the same run with the trigger off would have sent;  rounds: 1 where it sent
    anything;  seconds: simulated time from the start of the run to the end of its round, 0.0 without a network.

    The total over peers is their sum, but for `rounds` and `seconds`, of which the largest counts. 1 - messages / due
    is what the trigger saved: what a schedule leaves out is not its merit. Of bytes and seconds the run with the trigger
    off tells.
    """

    messages: int = 0
    broadcasts: int = 0
    payload_bytes: int = 0
    header_bytes: int = 0
    index_bytes: int = 0
    channel_uses: int = 0
    repeated: float = 0.0
    due: int = 0
    rounds: int = 0
    seconds: float = 0.0

    def plus(self, later: "Ledger") -> "Ledger":
        """Of a time, and what the same peer sent after it."""
        added = Ledger(*map(operator.add, self, later))
        return added._replace(seconds=max(self.seconds, later.seconds))

    @property
    def total_bytes(self) -> int:
        return self.payload_bytes + self.header_bytes + self.index_bytes


def entry(packet: Packet | None, sent: Mapping[int, float], index: frozenset[str], broadcasts: int, due: int,
          counts: Counts | None = None) -> Ledger:
    """Of one packet to the receivers of `sent`, {receiver: how often, 1.0: once}. counts: as that of a `Codec`."""
    if packet is None or not sent:
        return Ledger(broadcasts=broadcasts, due=due)
    times, num = sum(sent.values()), len(sent)
    meta = {name: value.nbytes for name, value in packet.meta.items() if name != CLOCK}
    indices = sum(size for name, size in meta.items() if name in index)
    payload = sum(part.nbytes for part in packet.payload.values())
    numbers, places = sum(packet.numel.values()), 0
    if counts is not None and packet.payload:
        held = [counts(name, packet.numel[name], part.nbytes) for name, part in packet.payload.items()]
        numbers, places = (sum(column) for column in zip(*held, strict=True))
    return Ledger(num, broadcasts, round(times * (payload - places)), num * (sum(meta.values()) - indices),
                  num * indices + round(times * places), round(numbers * times / num), times - num, due, 1)


def bytes_of(packet: Packet) -> int:
    """Of one message with its metadata."""
    return packet.nbytes - sum(value.nbytes for name, value in packet.meta.items() if name == CLOCK)


def together(one: Mapping[int, Ledger], other: Mapping[int, Ledger]) -> dict[int, Ledger]:
    """By peer, of both."""
    return {peer: one.get(peer, Ledger()).plus(other.get(peer, Ledger())) for peer in sorted({*one, *other})}


def total(ledger: Mapping[int, Ledger]) -> Ledger:
    """Over all peers."""
    if not ledger:
        return Ledger()
    *counts, rounds, seconds = zip(*ledger.values(), strict=True)
    return Ledger(*map(sum, counts))._replace(rounds=max(rounds), seconds=max(seconds))


def of_one_round(ledger: Mapping[int, Ledger]) -> dict[int, Ledger]:
    """With a round counted once, however often all exchanged in it."""
    return {peer: one._replace(rounds=min(1, one.rounds)) for peer, one in ledger.items()}


def transmission_time(ledger: Mapping[int, Ledger], bandwidth: Sequence[float], degrees: Sequence[int]) -> float:
    """mean_i (numbers sent / b_i / d_i) of one round: EF-HC's cost (Zehtabi, Hosseinalipour, Brinton 2022, arXiv 2204.03726).

    bandwidth: numbers a unit of time, degrees: neighbours, of each peer; ledger: of all peers.
    """
    return sum(one.messages * one.channel_uses / bandwidth[peer] / degrees[peer] for peer, one in ledger.items() if one.messages) \
        / len(bandwidth)
