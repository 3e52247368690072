"""The first half of a round: what hosted peers say, to whom, and what their neighbours then hold of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from dfl.engine import messages
from dfl.engine.coding import Coding, moment
from dfl.engine.memory import Memory, packet_of, state_of_message, state_of_packet
from dfl.engine.state import edge
from dfl.engine.ways import Ways, others
from dfl.methods import Method
from dfl.networks.clock import Clock
from dfl.seeds import derive
from dfl.slots import Message, Round
from dfl.transport.base import Arrived, Transport
from dfl.transport.packet import Packet


class Spoken(NamedTuple):
    """Packets by hosted sender, to whom they go, and whom W(t) allows; who spoke; public: what those who know a peer's
    last message take it for."""

    packets: dict[int, Packet]
    addressed: dict[int, list[int]]
    due: dict[int, list[int]]
    speakers: set[int]
    public: dict[int, Message]


class Sending:
    """Trigger, codec and transport of the hosted peers."""

    def __init__(self, method: Method, ways: Ways, coding: Coding, clock: Clock, transport: Transport, memory: Memory, seed: int):
        self.method, self.ways, self.coding, self.clock = method, ways, coding, clock
        self.transport, self.memory, self.seed = transport, memory, seed

    def speak(self, said: Mapping[int, Message], rounds: Sequence[Round], k: int) -> Spoken:
        """What each hosted peer puts on its way.

        Where silence holds messages back: to all receivers of those that speak, and of those that are silent to the
        ones that have not got what was said last (they were no neighbours then, or it was lost). Where it does not: to
        all receivers of those that speak, and of the others over links that are greeted.
        """
        spoken = Spoken({}, {}, {}, set(), {})
        for round in rounds:
            peer, message = round.peer, said[round.peer]
            if round.plan.away:
                spoken.due[peer], spoken.addressed[peer], spoken.public[peer] = [], [], message
                continue
            spoken.due[peer] = self.ways.receivers(round.t, peer)
            speaks = self._decide(message, round, k)
            if speaks:
                spoken.speakers.add(peer)
            if self.method.held:
                self._hold(spoken, message, speaks, round, k)
                continue
            spoken.addressed[peer] = spoken.due[peer] if speaks else self._greeted(round.t, peer)
            if speaks or spoken.addressed[peer]:
                self._say(spoken, message, round, k)
            else:
                known = self.coding.differences and str(peer) in self.memory.tree["codec"]
                spoken.public[peer] = self.coding.copy_of(message, peer) if known else message
        return spoken

    def _decide(self, message: Message, round: Round, k: int) -> bool | frozenset[str]:
        trigger, key = self.method.trigger, str(round.peer)
        if trigger.always:
            return True
        begin = self.memory.start(round.peer) or message
        copied = self.coding.differences and key in self.memory.tree["codec"]
        known = self.coding.copy_of(message, round.peer).parts if copied else None
        round = round._replace(key=derive(self.seed, "trigger", round.peer, *moment(round.t, k)),
                               bandwidth=self.clock.bandwidth(round.peer), known=known)
        speaks, state = trigger.decide(message, self.memory.get("trigger", key, lambda: trigger.init(begin)), round)
        self.memory.keep("trigger", key, state)
        return speaks

    def _say(self, spoken: Spoken, message: Message, round: Round, k: int) -> None:
        peer = round.peer
        packet = spoken.packets[peer] = self.coding.encode(message, round, k)
        spoken.public[peer] = self.coding.copy_of(message, peer) if self.coding.differences else self.coding.read(packet, message)

    def _hold(self, spoken: Spoken, message: Message, speaks: bool | frozenset[str], round: Round, k: int) -> None:
        """What a peer says where its neighbours hold what it said last, and remember what that was, and who knows it."""
        peer, key, receivers = round.peer, str(round.peer), spoken.due[round.peer]
        sent = self.memory.tree["sent"].get(key)
        known = set() if sent is None else set(sent["known"].tolist())
        packet = last = None if sent is None else packet_of(sent)
        if speaks:
            packet, last = self._said(message, speaks, last, known >= set(receivers), round, k)
            known = set()
        addressed = [] if packet is None else [j for j in receivers if j not in known]
        if last is not None:
            told = torch.tensor(sorted(known | {*addressed}), dtype=torch.int64)
            self.memory.tree["sent"][key] = state_of_packet(last) | {"known": told}
        if addressed and packet is not None:
            spoken.packets[peer] = packet
        spoken.addressed[peer] = addressed
        copy = last is not None and self.coding.differences
        spoken.public[peer] = self.coding.copy_of(message, peer) if copy else self._last_said(last, message, peer)

    def _said(self, message: Message, speaks: bool | frozenset[str], last: Packet | None, known: bool, round: Round,
              k: int) -> tuple[Packet, Packet]:
        """The packet, and all that has been said last, which is the same unless tensors are sent one by one: those who
        know what came before need the new ones alone."""
        if self.method.trigger.tensors is None or isinstance(speaks, bool):
            packet = self.coding.encode(message, round, k)
            return packet, packet
        new = self.coding.encode(messages.cut(message, self.method.trigger.tensors(message), speaks), round, k)
        full = new if last is None else Packet({**last.payload, **new.payload}, {**last.numel, **new.numel}, new.meta)
        return (new if known else full), full

    def _last_said(self, last: Packet | None, message: Message, peer: int) -> Message:
        """What those take the peer for who know what it said last; its message itself where it has never spoken."""
        start = self.memory.start(peer)
        if last is None:
            return start or message
        return self.coding.complete(self.coding.decode(last, message), message, start) or message

    def _greeted(self, t: int, peer: int) -> list[int]:
        """The receivers over links that were not there in the round before."""
        if not self.method.trigger.greets or t == 0:
            return []
        before = set(self.ways.receivers(t - 1, peer))
        return [j for j in self.ways.receivers(t, peer) if j not in before]

    def begin(self, spoken: Spoken, said: Mapping[int, Message], rounds: Sequence[Round], k: int) -> Callable[[], Arrived]:
        """Send. What it gives waits for what arrives for hosted peers; where messages are answered, after a second exchange. Without a
        delay that is at once, so that nothing goes on aside."""
        t, expected = rounds[0].t, {round.peer: others(round) for round in rounds}
        given = t, self.clock.stamped(spoken.packets), spoken.addressed, spoken.due, expected
        arrive = self.transport.begin(*given) if self.method.delay else partial(self.transport.exchange, *given)
        return lambda: self._answered(arrive(), expected, spoken, said, rounds, k)

    def _answered(self, arrived: Arrived, expected: dict[int, list[int]], spoken: Spoken, said: Mapping[int, Message],
                  rounds: Sequence[Round], k: int) -> Arrived:
        t = rounds[0].t
        self.clock.wait(arrived, t)
        if not self.method.trigger.answers:
            return arrived
        # the next exchange may overwrite what came with this one; what a channel will lose is answered as well, as it was sent
        arrived = {peer: {j: packet_of(state_of_packet(packet)) for j, packet in inbox.items()} for peer, inbox in arrived.items()}
        answers = {}
        for round in rounds:
            peer = round.peer
            answers[peer] = [j for j in arrived[peer] if j in spoken.due[peer] and j not in spoken.addressed[peer]]
            if answers[peer] and peer not in spoken.packets:
                self._say(spoken, said[peer], round, k)
            spoken.addressed[peer] = spoken.addressed[peer] + answers[peer]
        more = self.transport.exchange(t, self.clock.stamped(spoken.packets), answers, spoken.due, expected)
        self.clock.wait(more, t)
        return {peer: {**inbox, **more[peer]} for peer, inbox in arrived.items()}

    def acknowledge(self, spoken: Spoken, t: int, k: int) -> dict[int, dict[int, float]]:
        """To whom each hosted peer sent its message how often; over a way that loses some it then knows who has got it,
        which is a function of the link, and what the others still hold."""
        channel, times = self.method.channel, {}
        for peer, receivers in spoken.addressed.items():
            times[peer] = dict.fromkeys(receivers, 1.0)
            if channel.perfect or not (self.method.held or channel.repeats):
                continue
            arrived = set()
            for j in receivers:
                key = edge(peer, j)
                found = self.ways.deliver("outgoing", key, spoken.public[peer], self.ways.link(peer, j, t, k))
                times[peer][j] = float(self.memory.tree["outgoing"][key]["sent"]) if channel.repeats else 1.0
                if self.method.held and self._delivered(key, found, spoken.public[peer]):
                    arrived.add(j)
            if self.method.held and receivers:
                sent = self.memory.tree["sent"][str(peer)]
                known = [j for j in sent["known"].tolist() if j not in receivers or j in arrived]
                self.memory.tree["sent"][str(peer)] = sent | {"known": torch.tensor(known, dtype=torch.int64)}
        if self.method.trigger.measures:
            self.clock.measure(spoken.packets, spoken.addressed, t)
        return times

    def _delivered(self, key: str, found: Message | None, public: Message) -> bool:
        """Keep what the receiver holds now; whether all has arrived. Noise on the way its sender does not know."""
        if found is None:
            return False
        now = messages.patched(public._replace(lost=found.lost), self.memory.message("delivered", key))
        if now is not None:
            self.memory.tree["delivered"][key] = state_of_message(now)
        return not found.lost
