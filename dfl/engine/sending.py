"""The first half of a round: what hosted peers say, to whom, and what their neighbours then hold of them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.engine import clock, copies
from dfl.engine.ledger import CLOCK
from dfl.engine.state import Tree, edge
from dfl.methods import Method
from dfl.seeds import derive
from dfl.slots import Link, Message, Round, State, bits_of
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
    """What `Gossip` does before anything arrives; its attributes are those of `Gossip`."""

    method: Method
    transport: Transport
    topology: object
    peers: list[int]
    seed: int
    common: int
    scale: Tensor | None
    state: Tree

    @property
    def held(self) -> bool:
        """Whether who is silent is taken to be where it was when it last spoke."""
        return self.method.trigger.holds and not self.method.trigger.always

    def _row(self, t: int, peer: int) -> dict[int, float]:
        """The peer's row of W(t), the peer itself first; equal weights for all where the trigger merges."""
        row = dict(self.topology.neighbors(t, peer))
        if self._merges(t):
            row = dict.fromkeys(range(self.topology.num_peers), 1 / self.topology.num_peers)
        return {peer: row.get(peer, 0.0)} | row

    def _receivers(self, t: int, peer: int) -> list[int]:
        if self._merges(t):
            return [j for j in range(self.topology.num_peers) if j != peer]
        return self.topology.receivers(t, peer)

    def _merges(self, t: int) -> bool:
        merges = self.method.trigger.merges
        return merges is not None and merges(t)

    def _compose(self, x: Tensor, rounds: Sequence[Round]) -> dict[int, Message]:
        """What each hosted peer has to say."""
        found, rule = {}, self.method.rule
        for row, round in enumerate(rounds):
            key = str(round.peer)
            if "x" in self.state["start"].get(key, ()):  # before the first message of all
                start = self._common_scale(self.state["start"][key]["x"], row)
                self.state["start"][key] = copies.state_of_message(rule.send(start, rule.init(start), round)[0])
            found[round.peer], self.state["rule"][key] = rule.send(self._common_scale(x[row], row), self.state["rule"][key], round)
        return found

    def _speak(self, messages: Mapping[int, Message], rounds: Sequence[Round], k: int) -> Spoken:
        """What each hosted peer puts on its way.

        Where silence holds messages back: to all receivers of those that speak, and of those that are silent to the
        ones that have not got what was said last (they were no neighbours then, or it was lost). Where it does not: to
        all receivers of those that speak, and of the others over links that are greeted.
        """
        spoken = Spoken({}, {}, {}, set(), {})
        for round in rounds:
            peer, message = round.peer, messages[round.peer]
            spoken.due[peer] = self._receivers(round.t, peer)
            speaks = self._decide(message, round, k)
            if speaks:
                spoken.speakers.add(peer)
            if self.held:
                self._hold(spoken, message, speaks, round, k)
                continue
            spoken.addressed[peer] = spoken.due[peer] if speaks else self._greeted(round.t, peer)
            if speaks or spoken.addressed[peer]:
                self._say(spoken, message, round, k)
            else:
                said = self.method.codec.update is not None and str(peer) in self.state["codec"]
                spoken.public[peer] = self._public_copy(message, peer) if said else message
        return spoken

    def _decide(self, message: Message, round: Round, k: int) -> bool | frozenset[str]:
        trigger, key = self.method.trigger, str(round.peer)
        if trigger.always:
            return True
        begin = self._start(key) or message
        known = self.state["clock"].get(key, {})
        round = round._replace(key=derive(self.seed, "trigger", round.peer, *_when(round.t, k)), bandwidth=clock.bandwidth(known))
        speaks, state = trigger.decide(message, self._of("trigger", key, lambda: trigger.init(begin)), round)
        self._keep("trigger", key, state)
        return speaks

    def _say(self, spoken: Spoken, message: Message, round: Round, k: int) -> None:
        packet = spoken.packets[round.peer] = self._encode(message, round, k)
        differences = self.method.codec.update is not None
        spoken.public[round.peer] = self._public_copy(message, round.peer) if differences else self._decode(packet, message)

    def _public_copy(self, message: Message, peer: int) -> Message:
        """What all neighbours hold of a peer, where differences travel."""
        own = self.state["codec"][str(peer)]
        return message._replace(parts={name: own[name] for name in message.parts})

    def _hold(self, spoken: Spoken, message: Message, speaks: bool | frozenset[str], round: Round, k: int) -> None:
        """What a peer says where its neighbours hold what it said last, and remember what that was, and who knows it."""
        peer, key, receivers = round.peer, str(round.peer), spoken.due[round.peer]
        sent = self.state["sent"].get(key)
        known = set() if sent is None else set(sent["known"].tolist())
        packet = last = None if sent is None else copies.packet_of(sent)
        if speaks:
            packet, last = self._said(message, speaks, last, known >= set(receivers), round, k)
            known = set()
        addressed = [] if packet is None else [j for j in receivers if j not in known]
        if last is not None:
            self.state["sent"][key] = copies.state_of(last) | {"known": torch.tensor(sorted(known | {*addressed}), dtype=torch.int64)}
        if addressed:
            spoken.packets[peer] = packet
        spoken.addressed[peer] = addressed
        copy = last is not None and self.method.codec.update is not None
        spoken.public[peer] = self._public_copy(message, peer) if copy else self._last_said(last, message, key)

    def _said(self, message: Message, speaks: bool | frozenset[str], last: Packet | None, known: bool, round: Round,
              k: int) -> tuple[Packet, Packet]:
        """The packet, and all that has been said last, which is the same unless tensors are sent one by one: those who
        know what came before need the new ones alone."""
        if self.method.trigger.tensors is None:
            packet = self._encode(message, round, k)
            return packet, packet
        new = self._encode(copies.cut(message, self.method.trigger.tensors(message), speaks), round, k)
        whole = new if last is None else Packet({**last.payload, **new.payload}, {**last.numel, **new.numel}, new.meta)
        return (new if known else whole), whole

    def _last_said(self, last: Packet | None, message: Message, key: str) -> Message:
        """What those take the peer for who know what it said last; its message itself where it has never spoken."""
        start = self._start(key)
        if last is None:
            return start or message
        return self._whole(self._decode(last, message), message, start) or message

    def _whole(self, found: Message | None, own: Message, before: Message | None) -> Message | None:
        """A message, where its tensors travel one by one, with those that did not from what was known before."""
        if found is None or self.method.trigger.tensors is None:
            return found
        return copies.put_together(found, self.method.trigger.tensors(own), own, before)

    def _start(self, key: str) -> Message | None:
        """What everybody knows of everybody before a word is said."""
        found = self.state["start"].get(key)
        return None if found is None else copies.message_of(found)

    def _greeted(self, t: int, peer: int) -> list[int]:
        """The receivers over links that were not there in the round before."""
        if not self.method.trigger.greets or t == 0:
            return []
        before = set(self._receivers(t - 1, peer))
        return [j for j in self._receivers(t, peer) if j not in before]

    def _encode(self, message: Message, round: Round, k: int) -> Packet:
        key, codec = str(round.peer), self.method.codec
        if round.exchange:  # what another exchange sends is another thing, with errors of its own
            key = edge(round.peer, round.exchange)
        draw = None
        if codec.draws == "round":
            draw = derive(self.seed, "codec", *_when(round.t, k))
        elif codec.draws or not self.method.rule.averages:
            draw = derive(self.seed, "codec", round.peer, *_when(round.t, k))
        payload, state = codec.encode(message.parts, self._of("codec", key, lambda: codec.init(message.parts)), draw)
        self._keep("codec", key, state)
        meta = message.meta if not self.common else {**message.meta, "common": torch.tensor([self.common])}
        return Packet(payload, {name: part.numel() for name, part in message.parts.items()}, meta)

    def _decode(self, packet: Packet, own: Message, held: Mapping[str, Tensor] | None = None) -> Message | None:
        """None for bytes that are no numbers. held: by part, what was known of the sender, for a codec of differences."""
        like = next(iter(own.parts.values()))
        codec, parts = self.method.codec, {}
        try:
            for name, data in packet.payload.items():
                data, numel = data.to(like.device), packet.numel[name]
                parts[name] = (codec.decode(name, data, numel, like.dtype) if codec.update is None
                               else codec.update(name, data, (held or {}).get(name), numel, like.dtype))
        except (RuntimeError, ValueError, IndexError):
            return None
        return Message(parts, {name: value for name, value in packet.meta.items() if name != CLOCK})

    def _exchange(self, spoken: Spoken, messages: Mapping[int, Message], rounds: Sequence[Round], k: int) -> Arrived:
        """What arrives for hosted peers; where messages are answered, after a second exchange."""
        t, expected = rounds[0].t, {round.peer: others(round) for round in rounds}
        stamped = self._stamped(spoken.packets)
        arrived = self.transport.exchange(t, stamped, spoken.addressed, spoken.due, expected)
        self._wait(arrived, t)
        if not self.method.trigger.answers:
            return arrived
        # the next exchange may overwrite what came with this one; what a channel will lose is answered as well, as it was sent
        arrived = {peer: {j: copies.packet_of(copies.state_of(packet)) for j, packet in inbox.items()}
                   for peer, inbox in arrived.items()}
        answers = {}
        for round in rounds:
            peer = round.peer
            answers[peer] = [j for j in arrived[peer] if j in spoken.due[peer] and j not in spoken.addressed[peer]]
            if answers[peer] and peer not in spoken.packets:
                self._say(spoken, messages[peer], round, k)
            spoken.addressed[peer] = spoken.addressed[peer] + answers[peer]
        more = self.transport.exchange(t, self._stamped(spoken.packets), answers, spoken.due, expected)
        self._wait(more, t)
        return {peer: {**inbox, **more[peer]} for peer, inbox in arrived.items()}

    def _acknowledge(self, spoken: Spoken, t: int, k: int) -> dict[int, dict[int, float]]:
        """To whom each hosted peer sent its message how often; over a way that loses some it then knows who has got it,
        which is a function of the link, and what the others still hold."""
        channel, times = self.method.channel, {}
        for peer, receivers in spoken.addressed.items():
            times[peer] = dict.fromkeys(receivers, 1.0)
            if channel.perfect or not (self.held or channel.repeats):
                continue
            arrived = set()
            for j in receivers:
                key = edge(peer, j)
                found, state = channel.deliver(spoken.public[peer], self._of("outgoing", key, channel.init), self.link(peer, j, t, k))
                self._keep("outgoing", key, state)
                times[peer][j] = float(state["sent"]) if channel.repeats else 1.0
                if self.held and self._delivered(key, found, spoken.public[peer]):
                    arrived.add(j)
            if self.held and receivers:
                sent = self.state["sent"][str(peer)]
                known = [j for j in sent["known"].tolist() if j not in receivers or j in arrived]
                self.state["sent"][str(peer)] = sent | {"known": torch.tensor(known, dtype=torch.int64)}
        self._measure(spoken, t)
        return times

    def _measure(self, spoken: Spoken, t: int) -> None:
        """How fast each sender's links were, for triggers that ask."""
        for peer, packet in spoken.packets.items() if self.method.trigger.measures else ():
            now = clock.measured(self.method.network, self.state["clock"].get(str(peer), {}), peer, packet, spoken.addressed[peer], t)
            if now is not None:
                self._set_clock(peer, bandwidth=now)

    def _delivered(self, key: str, found: Message | None, public: Message) -> bool:
        """Keep what the receiver holds now; whether all has arrived. Noise on the way its sender does not know."""
        if found is None:
            return False
        now = copies.patched(public._replace(lost=found.lost), self._copy("delivered", key))
        if now is not None:
            self.state["delivered"][key] = copies.state_of_message(now)
        return not found.lost

    def _copy(self, slot: str, key: str) -> Message | None:
        """What one end of a link holds of the other, at least the start where all know it."""
        found = self.state[slot].get(key)
        return self._start(key.partition("/")[0]) if found is None else copies.message_of(found)

    def link(self, sender: int, receiver: int, t: int, k: int = 0) -> Link:
        return Link(sender, receiver, t, derive(self.seed, "channel", sender, receiver, *_when(t, k)), self.held)

    def _stamped(self, packets: Mapping[int, Packet]) -> dict[int, Packet]:
        """With the simulated time at which each sender sends."""
        if not self.method.network.timed:
            return dict(packets)
        return {peer: packet._replace(meta={**packet.meta, CLOCK: bits_of(self._now(peer))}) for peer, packet in packets.items()}

    def _now(self, peer: int) -> Tensor:
        return self.state["clock"].get(str(peer), {}).get("time", torch.zeros((), dtype=torch.float64))

    def _wait(self, arrived: Arrived, t: int) -> None:
        """Whoever receives is as late as the last message."""
        if self.method.network.timed:
            for peer, inbox in arrived.items():
                late = clock.arrivals(self.method.network, peer, inbox, t)
                self._set_clock(peer, time=torch.stack([self._now(peer), *late]).max())

    def _set_clock(self, peer: int, **values: Tensor) -> None:
        self.state["clock"][str(peer)] = {**self.state["clock"].get(str(peer), {}), **values}

    def _of(self, slot: str, key: str, init) -> State:
        found = self.state[slot].get(key)
        return init() if found is None else found

    def _keep(self, slot: str, key: str, state: State) -> None:
        if state:
            self.state[slot][key] = state


def _when(t: int, k: int) -> tuple[int, ...]:
    """A round, or one of several exchanges in it, as names of a seed."""
    return (t,) if k == 0 else (t, k)


def others(round: Round) -> list[int]:
    return sorted(j for j in round.weights if j != round.peer)
