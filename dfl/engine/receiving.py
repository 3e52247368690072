"""The second half of a round: what comes through to hosted peers, what a guard lets in, and what fills the gaps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dfl.engine import messages
from dfl.engine.coding import Coding
from dfl.engine.memory import Memory, message_of, named, state_of_message, under
from dfl.engine.sending import Spoken
from dfl.engine.state import edge
from dfl.engine.ways import Ways, others
from dfl.methods import Method
from dfl.rules.base import same_shape
from dfl.slots import EXACT, Inbox, Message, Round, State
from dfl.transport.base import Arrived
from dfl.transport.packet import Packet

Told = dict[int, Message | None]  # by sender; None: bytes that are no numbers
Norms = Mapping[str, float]


@dataclass
class Received:
    """Messages by sender, neighbours whose messages are not used, and how many were lost, at one receiver."""

    inbox: dict[int, Message] = field(default_factory=dict)
    rejected: list[int] = field(default_factory=list)
    lost: int = 0


class Receiving:
    """Channel, codec and guard of the hosted peers, and the inbox that `mix` sees. common: what all messages have to belong to."""

    def __init__(self, method: Method, ways: Ways, coding: Coding, memory: Memory, common: int):
        self.method, self.ways, self.coding, self.memory, self.common = method, ways, coding, memory, common
        self._views: dict[int, tuple[Packet, Message | None]] = {}
        self._seen: dict[int, tuple[Packet, Message | None]] = {}

    def open(self, arrived: Arrived, spoken: Spoken, own: Mapping[int, Message], rounds: Sequence[Round],
             k: int) -> dict[int, Received]:
        """What comes through the channel and can be read, by hosted receiver."""
        told = self._moved_copies(arrived, own, rounds) if self.coding.differences else self._decoded(arrived, spoken, own)
        return {round.peer: self._through(told[round.peer], own[round.peer], round, k) for round in rounds}

    def _decoded(self, arrived: Arrived, spoken: Spoken, own: Mapping[int, Message]) -> dict[int, Told]:
        """Each packet decoded once, however many receive it."""
        like, decoded = next(iter(own.values())), dict[int, Message | None]()
        self._views, self._seen = self._seen, {}  # those of the last round, and of this one
        if self.method.trigger.tensors is None:
            decoded = {id(packet): spoken.public[peer] for peer, packet in spoken.packets.items()}
        for packet in (packet for inbox in arrived.values() for packet in inbox.values()):
            if id(packet) not in decoded:
                decoded[id(packet)] = self._read(packet, like)
        return {peer: {j: decoded[id(packet)] for j, packet in inbox.items()} for peer, inbox in arrived.items()}

    def _read(self, packet: Packet, like: Message) -> Message | None:
        """A packet decoded. Where numbers travel as they are, a transport may give the same packet in every round, which is a view of
        the buffer that it receives into: then so is the message."""
        if not self.coding.codec.exact:
            return self.coding.decode(packet, like)
        kept = self._views.get(id(packet))
        if kept is None or kept[0] is not packet:
            kept = packet, self.coding.decode(packet, like)
        self._seen[id(packet)] = kept
        return kept[1]

    def _moved_copies(self, arrived: Arrived, own: Mapping[int, Message], rounds: Sequence[Round]) -> dict[int, Told]:
        """Each receiver's copies of its neighbours, moved by the differences that arrived.

        Receivers that held one tensor go on to share one: memory for each sender, not for each link.
        """
        made: dict[tuple[int, ...], tuple[State, Message | None]] = {}
        told: dict[int, Told] = {round.peer: {} for round in rounds}
        for round in rounds:
            for j in others(round):
                key, packet, mine = edge(round.peer, j), arrived[round.peer].get(j), own[round.peer]
                held = self.memory.tree["received"].get(key, {})
                if packet is not None:
                    mark = (id(packet), *map(id, held.values()))
                    if mark not in made:  # with `held`, which keeps the ids from being given to others
                        made[mark] = held, self.coding.decode(packet, mine, under(held, "part."))
                    message = told[round.peer][j] = made[mark][1]
                    if message is not None:
                        self.memory.tree["received"][key] = held | named(message)
                elif held:
                    copy = message_of(held)
                    told[round.peer][j] = copy._replace(parts={name: copy.parts[name] for name in mine.parts})
        return told

    def _through(self, told: Told, own: Message, round: Round, k: int) -> Received:
        found, peer, pieces = Received(), round.peer, self.method.trigger.tensors is not None
        for j in others(round):
            message = told.get(j)
            if pieces:
                message = self.coding.complete(message, own, self.memory.message("received", edge(peer, j)))
            if j in told and not self._readable(message, own, round):
                found.rejected.append(j)
                continue
            message = self._deliver(message, j, round, k)
            found.lost += j in told and message is None and not self.method.channel.delays
            if message is not None:
                self._check_common(message, j, peer)
                found.inbox[j] = message
        return found

    def _readable(self, message: Message | None, own: Message, round: Round) -> bool:
        if message is None:
            return False
        bare = message
        if "common" in message.meta:
            bare = message._replace(meta={name: value for name, value in message.meta.items() if name != "common"})
        readable = self.method.rule.readable
        return same_shape(bare, own) if readable is None else readable(bare, own, round)

    def _deliver(self, message: Message | None, sender: int, round: Round, k: int) -> Message | None:
        """What comes through the channel. Where messages are held back, numbers that were lost are those that came before."""
        channel, key = self.method.channel, edge(round.peer, sender)
        if channel.perfect or message is None and not channel.delays:
            return message
        message = self.ways.deliver("channel", key, message, self.ways.link(sender, round.peer, round.t, k))
        if message is None or not message.lost:
            return message
        if self.method.rule.dated:  # numbers of another message are no numbers of this one
            return None
        return messages.patched(message, self.memory.message("received", key)) if self.method.held else message

    def _check_common(self, message: Message, sender: int, peer: int) -> None:
        found = int(message.meta["common"]) if "common" in message.meta else 0
        if found != self.common:
            groups = "+".join(sorted(self.method.schedule.common)) or "nothing"
            raise TypeError(f"peer {sender} sent a message that belongs to {found:#x}, peer {peer} holds {self.common:#x} as what "
                            f"all share ({groups}): all must start from the same")

    def guard(self, received: Mapping[int, Received], own: Mapping[int, Message], x: Mapping[int, Tensor]) -> dict[int, Norms]:
        """Take out of each inbox what may not enter the mix; the norms of each hosted peer's own message."""
        # what a hosted peer said and what others here take it for have the same parts
        seen = {id(message.parts): message for message in own.values()}
        seen |= {id(message.parts): message for one in received.values() for message in one.inbox.values()}
        norms = dict(zip(seen, messages.norms(list(seen.values())), strict=True))
        for peer, one in received.items():
            held = {j: norms[id(message.parts)] for j, message in one.inbox.items()}
            out = self.method.guard.rejects({**held, peer: norms[id(own[peer].parts)]}, peer, x[peer])
            one.rejected = sorted([*one.rejected, *out])
            self._check_needed(peer, one.rejected)
            one.inbox = {j: message for j, message in one.inbox.items() if j not in one.rejected}
        return {peer: norms[id(message.parts)] for peer, message in own.items()}

    def _check_needed(self, peer: int, rejected: Sequence[int]) -> None:
        """What peers keep has to cancel over all of them, or to be the same at both ends: one message less would break it for ever,
        and nobody would see it."""
        if rejected and (self.method.rule.conserves or self.method.rule.lossless):
            why = "cancel over all peers" if self.method.rule.conserves else "stay equal at both ends"
            raise ValueError(f"peer {peer} rejected what peer {rejected[0]} sent, which {self.method.name!r} with this rule and "
                             f"wrapper cannot go without: what it keeps has to {why}; go on from the last checkpoint, allowed: "
                             "without the wrapper or copies, a smaller train.lr, or a guard.bound above what honest peers need")

    def complete(self, received: Received, own: Message, spoken: Spoken, round: Round, k: int, x: Tensor) -> tuple[Inbox, Round]:
        """The inbox with one message for every weight, before `mix` sees it.

        Who is silent is where it was when it last spoke to this peer; who never did, and whose message was lost or
        rejected, gives its weight to the receiver. What the others take the peer's own message for may not be what it
        is, because it was rounded or held back: `_keep_mean` is for rules that average; any other takes what everybody
        got this round, or its own message as it is where nobody got one. A guard that weighs or replaces messages does
        so when all are there. x: the peer's row.
        """
        method, peer, public, weights = self.method, round.peer, spoken.public[round.peer], dict(round.weights)
        inbox = self._without_lost_numbers(self._with_silent(received, spoken, round, weights), public, weights)
        if method.channel.air is not None:
            state, link = self.memory.get("channel", str(peer), method.channel.init), self.ways.link(peer, peer, round.t, k)
            inbox, state = method.channel.air(inbox, public, weights, state, link)
            self.memory.keep("channel", str(peer), state)
        exact = method.codec.exact and (method.trigger.always and not method.delay or messages.equal(public, own))
        alone = not inbox  # then it keeps what it has, whatever others know of it
        as_known = method.rule.averages or self.coding.differences or method.trigger.always or bool(method.delay)
        inbox[peer] = own if exact or alone or not as_known else public
        if method.guard.screen is not None and not alone:
            inbox, weights = method.guard.screen(inbox, round._replace(weights=weights), x)
        if method.rule.averages and not method.rule.updates and not alone:
            weights = self._keep_mean(inbox, weights, own, public, exact, peer)
        return dict(sorted(inbox.items())), round._replace(weights=weights)

    def _with_silent(self, received: Received, spoken: Spoken, round: Round, weights: dict[int, float]) -> dict[int, Message]:
        """The inbox with what is held of those who are silent. Weights of those who are not in it go to the receiver."""
        peer, public = round.peer, spoken.public[round.peer]
        keeps = self.method.held and not self.coding.differences  # whose copies have followed already
        # a part of a message says nothing where it is not like the own
        inbox = {j: message for j, message in received.inbox.items() if not message.lost or messages.same_lengths(message, public)}
        for j in others(round):
            key = edge(peer, j)
            if j in inbox and keeps:
                self.memory.tree["received"][key] = state_of_message(inbox[j])
            elif keeps and j not in received.rejected and (copy := self.memory.message("received", key)) is not None:
                inbox[j] = copy
            # a link that j does not use this peer leaves alone as well
            if j in inbox and self.method.held and not self._known_to(j, peer, spoken):
                del inbox[j]
            if j not in inbox:
                weights[peer] += weights.pop(j)
        return inbox

    def _known_to(self, j: int, peer: int, spoken: Spoken) -> bool:
        """Whether a neighbour holds a message of this peer's, if it is to get any."""
        if j not in spoken.due[peer] or self.memory.start(peer) is not None:
            return True
        if not self.method.channel.perfect:
            return edge(peer, j) in self.memory.tree["delivered"]
        sent = self.memory.tree["sent"].get(str(peer))
        return sent is not None and j in sent["known"].tolist()

    def _without_lost_numbers(self, inbox: dict[int, Message], public: Message, weights: Mapping[int, float]) -> dict[int, Message]:
        """Something for every number that was lost: as the channel has it, or the receiver's own."""
        if not any(message.lost for message in inbox.values()):
            return inbox
        if self.method.channel.fill is not None:
            return self.method.channel.fill(inbox, public, weights)
        return {j: found for j, message in inbox.items() if (found := messages.patched(message, public)) is not None}

    def _keep_mean(self, inbox: dict[int, Message], weights: dict[int, float], own: Message, public: Message, exact: bool,
                   peer: int) -> dict[int, float]:
        """The weights of own + sum_j w_ij (m_j - m_i as j has it), the sum times the codec's step, which keeps the mean where
        what others know of the peer is not what it is; the inbox gets what that needs."""
        known = {}
        if self.method.held and not self.method.channel.perfect:
            known = {j: found for j in inbox if j != peer and (found := self.memory.message("delivered", edge(peer, j))) is not None
                     and not messages.equal(found, public)}
        if exact and not known:
            return weights
        inbox[EXACT], step = own, self.method.codec.gamma
        weights = {EXACT: 1.0} | {j: step * (weight - (j == peer)) for j, weight in weights.items()}
        for j, found in known.items():  # it holds an older one
            inbox[EXACT - 1 - j] = found
            weights[EXACT - 1 - j], weights[peer] = -weights[j], weights[peer] + weights[j]
        return weights
