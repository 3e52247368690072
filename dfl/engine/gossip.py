"""One round of gossip, as the papers draw it:

    plan -> local training -> send -> trigger -> encode -> transport -> channel -> decode -> guard -> complete -> mix

`Gossip` does everything behind the local training, for the peers that this process hosts. It knows no loop, no clock
and no folder; a process asks the topology for the rows of its own peers alone.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.layout import Layout
from dfl.engine.state import Tree, edge
from dfl.methods import Method
from dfl.rules.base import same_shape
from dfl.seeds import derive
from dfl.slots import EXACT, Message, Plan, Round, State
from dfl.transport.base import Transport
from dfl.transport.packet import Packet

Inboxes = dict[int, dict[int, Message]]


class Report(NamedTuple):
    """What one round did to the hosted peers: those that mixed something with their own; messages along directed edges
    that they sent (to a peer in the same process as well) and their bytes, broadcasts (peers that spoke), messages lost
    on the way and rejected by a guard, seconds by phase."""

    mixed: tuple[int, ...] = ()
    messages: int = 0
    message_bytes: int = 0
    broadcasts: int = 0
    lost: int = 0
    rejected: tuple[tuple[int, int], ...] = ()
    encode_s: float = 0.0
    exchange_s: float = 0.0
    mix_s: float = 0.0


class Gossip:
    """The peers `peers` of a run on a topology, with rows x (P, D) in `layout`.

    state: the tree of what the slots remember. scale: by how much each hosted peer's B counts against the layout's
    scaling, (P,), where peers are scaled differently; messages are exchanged as if all were scaled alike.
    """

    def __init__(self, method: Method, layout: Layout, topology, transport: Transport, peers: Sequence[int], x: Tensor, *,
                 seed: int = 0, scale: Tensor | None = None):
        self.method, self.layout, self.topology, self.transport = method, layout, topology, transport
        self.peers, self.seed, self.scale = list(peers), seed, scale
        self.common = digest_of_common(method.schedule.common, layout, x)
        self._planned: tuple[int, list[Plan]] = (-1, [])
        self.state: Tree = {"rule": {str(peer): method.rule.init(row) for peer, row in zip(self.peers, x, strict=True)}}
        for slot in ("trigger", "codec", "sent", "received", "channel"):
            self.state[slot] = {}

    def restore(self, state: Tree) -> None:
        """Go on from a state that `state` once was: what the hosted peers remembered."""
        self.state = {slot: dict(state.get(slot, {})) for slot in self.state}
        self.state["rule"] = {str(peer): self.state["rule"].get(str(peer), {}) for peer in self.peers}  # a file holds no empty ones

    def plans(self, t: int) -> list[Plan]:
        """What each hosted peer does in round t. Those of the last round asked for are kept: training, exchange and record ask."""
        if self._planned[0] != t:
            self._planned = (t, [self.method.schedule.plan(t, peer) for peer in self.peers])
        return self._planned[1]

    def corrections(self) -> list[Tensor | None]:
        """What is added to each local gradient (D,) of the hosted peers."""
        return [self.method.rule.correct(self.state["rule"][str(peer)]) for peer in self.peers]

    def residuals(self) -> Tensor | None:
        """The residuals (P, D_E) of the hosted peers, None for a rule without."""
        if self.method.rule.residual is None:
            return None
        return torch.stack([self.state["rule"][str(peer)]["residual"] for peer in self.peers])

    def round(self, t: int, x: Tensor, *, lr: float = 0.0, local_steps: int = 0, rates: Mapping[str, float] = {}) -> Report:
        """Exchange and mix round t: the rows x (P, D) change in place, `state` is replaced.

        Every receiver uses the values from before the mix. TypeError where a neighbour holds other common values.
        """
        rounds = [Round(t, peer, self.topology.neighbors(t, peer), plan, lr, local_steps, rates)
                  for peer, plan in zip(self.peers, self.plans(t), strict=True)]
        rounds = [round._replace(weights={round.peer: round.weights.get(round.peer, 0.0)} | dict(round.weights)) for round in rounds]
        if not rounds or not rounds[0].plan.sends:  # nobody speaks in this round
            return Report()
        started = time.perf_counter()
        messages = self._compose(x, rounds)
        due = {peer: self.topology.receivers(t, peer) for peer in self.peers}
        packets, addressed, spoke = self._speak(messages, due, rounds)
        encoded = time.perf_counter()
        arrived = self.transport.exchange(t, packets, addressed, due, {round.peer: _others(round) for round in rounds})
        moved = time.perf_counter()
        norms = dict(zip(messages, _norms(list(messages.values())), strict=True))
        inboxes, lost, rejected = self._receive(x, arrived, packets, messages, rounds, norms)
        self._mix(x, norms, inboxes, rounds)
        mixed = time.perf_counter()
        together = tuple(peer for peer, inbox in inboxes.items() if len(inbox) > 1)
        sent = sum(packets[i].nbytes * len(to) for i, to in addressed.items())
        return Report(together, sum(map(len, addressed.values())), sent, spoke, lost, rejected,
                      encoded - started, moved - encoded, mixed - moved)

    def _compose(self, x: Tensor, rounds: Sequence[Round]) -> dict[int, Message]:
        """What each hosted peer has to say."""
        found = {}
        for row, round in enumerate(rounds):
            key = str(round.peer)
            found[round.peer], self.state["rule"][key] = self.method.rule.send(self._common_scale(x[row], row),
                                                                               self.state["rule"][key], round)
        return found

    def _speak(self, messages: Mapping[int, Message], due: Mapping[int, list[int]],
               rounds: Sequence[Round]) -> tuple[dict[int, Packet], dict[int, list[int]], int]:
        """What each hosted peer puts on its way, to whom, and how many have spoken: all receivers of those that speak,
        and of those that are silent the ones that have not got what was said last (they were no neighbours then)."""
        trigger, packets, addressed, spoke = self.method.trigger, {}, {}, 0
        for round in rounds:
            peer, key = round.peer, str(round.peer)
            receivers = due[peer]
            speaks, state = trigger.decide(messages[peer], self._of("trigger", key, lambda m=messages[peer]: trigger.init(m)), round)
            self._keep("trigger", key, state)
            spoke += speaks
            if speaks:
                packets[peer] = self._encode(messages[peer], round)
                addressed[peer] = receivers
            else:
                packets[peer] = _packet_of(self.state["sent"][key])
                known = self.state["sent"][key]["known"].tolist()
                addressed[peer] = [j for j in receivers if j not in known]
            if not trigger.always:
                sent = _state_of(packets[peer]) if speaks else self.state["sent"][key]
                known = addressed[peer] if speaks else known + addressed[peer]
                self.state["sent"][key] = sent | {"known": torch.tensor(sorted(known), dtype=torch.int64)}
        return packets, addressed, spoke

    def _encode(self, message: Message, round: Round) -> Packet:
        key, codec = str(round.peer), self.method.codec
        draw = None if self.method.rule.averages else derive(self.seed, "codec", round.peer, round.t)
        payload, state = codec.encode(message.parts, self._of("codec", key, lambda: codec.init(message.parts)), draw)
        self._keep("codec", key, state)
        meta = message.meta if not self.common else {**message.meta, "common": torch.tensor([self.common])}
        return Packet(payload, {name: part.numel() for name, part in message.parts.items()}, meta)

    def _receive(self, x, arrived, packets, messages, rounds, norms) -> tuple[Inboxes, int, tuple[tuple[int, int], ...]]:
        """What each hosted peer mixes: decoded once however many receive it, past its channel and its guard, gaps filled."""
        came = {id(packet): packet for inbox in arrived.values() for packet in inbox.values()}
        own = {id(packet): packet for packet in packets.values()}
        decoded = {key: self._decode(packet, messages) for key, packet in (came | own).items()}
        readable = {key: message for key in came if (message := decoded[key]) is not None}
        sizes = dict(zip(readable, _norms(list(readable.values())), strict=True))
        inboxes, lost, rejected = {}, 0, []
        for row, round in enumerate(rounds):
            peer, inbox, out = round.peer, {}, []
            for j in _others(round):
                packet = arrived[peer].get(j)
                message = None if packet is None else decoded[id(packet)]
                if packet is not None and not self._readable(message, messages[peer], round):
                    out.append(j)
                    continue
                message = None if message is None else self._deliver(message, j, round)
                lost += packet is not None and message is None
                if message is not None:
                    self._check_common(message, j, peer)
                    inbox[j] = message
            held = {j: sizes[id(arrived[peer][j])] for j in inbox}
            out = sorted([*out, *self.method.guard.rejects({**held, peer: norms[peer]}, peer, x[row])])
            rejected += [(peer, j) for j in out]
            inbox = {j: message for j, message in inbox.items() if j not in out}
            inboxes[peer], rounds[row] = self._complete(inbox, decoded[id(packets[peer])], messages[peer], round, out)
        return inboxes, lost, tuple(rejected)

    def _readable(self, message: Message | None, own: Message, round: Round) -> bool:
        if message is None:
            return False
        bare = message
        if "common" in message.meta:
            bare = message._replace(meta={name: value for name, value in message.meta.items() if name != "common"})
        return (self.method.rule.readable or (lambda other, own, round: same_shape(other, own)))(bare, own, round)

    def _decode(self, packet: Packet, messages: Mapping[int, Message]) -> Message | None:
        """None for bytes that are no numbers."""
        like = next(iter(next(iter(messages.values())).parts.values()))
        try:
            parts = {name: self.method.codec.decode(name, data.to(like.device), packet.numel[name], like.dtype)
                     for name, data in packet.payload.items()}
        except RuntimeError:
            return None
        return Message(parts, packet.meta)

    def _deliver(self, message: Message, sender: int, round: Round) -> Message | None:
        channel, key = self.method.channel, edge(round.peer, sender)
        if channel.perfect:
            return message
        message, state = channel.deliver(message, self._of("channel", key, channel.init),
                                         derive(self.seed, "channel", sender, round.peer, round.t))
        self._keep("channel", key, state)
        return message

    def _complete(self, inbox: dict[int, Message], public: Message, own: Message, round: Round,
                  rejected: Sequence[int]) -> tuple[dict[int, Message], Round]:
        """The inbox with one message for every weight, before `mix` sees it.

        Who is silent is where it was when it last spoke to this peer; who never did, and whose message was lost or
        rejected, gives its weight to the receiver. public: what the others take the peer's own message for. Where that
        is not what it is, because it was rounded or held back, a rule that averages mixes own + sum_j w_ij (m_j -
        public), which keeps the mean; any other rule takes what everybody got this round, or its own message as it is
        where nobody got one.
        """
        weights = dict(round.weights)
        for j in _others(round):
            key = edge(round.peer, j)
            if j in inbox and not self.method.trigger.always:
                self.state["received"][key] = _state_of_message(inbox[j])
            elif j not in inbox and j not in rejected and key in self.state["received"]:
                inbox[j] = _message_of(self.state["received"][key])
            elif j not in inbox:
                weights[round.peer] += weights.pop(j)
        same = self.method.codec.exact and (self.method.trigger.always or _equal(public, own))
        averages = self.method.rule.averages
        inbox[round.peer] = own if same or not (averages or self.method.trigger.always) else public
        if averages and not same and len(inbox) > 1:
            inbox[EXACT] = own
            weights = {EXACT: 1.0} | {j: weight - (j == round.peer) for j, weight in weights.items()}
        return dict(sorted(inbox.items())), round._replace(weights=weights)

    def _mix(self, x: Tensor, norms: Mapping[int, Mapping[str, float]], inboxes: Inboxes, rounds: Sequence[Round]) -> None:
        mixed = []
        for row, round in enumerate(rounds):
            key, inbox = str(round.peer), inboxes[round.peer]
            new, state = x[row], self.state["rule"][key]
            # what is not finite in its own message a peer cannot mix; its next local phase says that it has diverged
            if all(map(math.isfinite, norms[round.peer].values())):
                new, state = self.method.rule.mix(self._common_scale(new, row), inbox, state, round)
                # alone, it keeps its bits, which scaling there and back may not
                new = self._own_scale(new, row) if len(inbox) > 1 or self.scale is None else x[row]
            mixed.append((new, state))
        for row, (round, (new, state)) in enumerate(zip(rounds, mixed, strict=True)):
            x[row] = new
            self.state["rule"][str(round.peer)] = state

    def _common_scale(self, row: Tensor, k: int) -> Tensor:
        return row if self.scale is None else self._times(row, self.scale[k])

    def _own_scale(self, row: Tensor, k: int) -> Tensor:
        return row if self.scale is None else self._times(row, 1 / self.scale[k])

    def _times(self, row: Tensor, factor) -> Tensor:
        row = row.clone()
        row[self.layout.groups["B"]] *= factor
        return row

    def _of(self, slot: str, key: str, init) -> State:
        found = self.state[slot].get(key)
        return init() if found is None else found

    def _keep(self, slot: str, key: str, state: State) -> None:
        if state:
            self.state[slot][key] = state

    def _check_common(self, message: Message, sender: int, peer: int) -> None:
        found = int(message.meta["common"]) if "common" in message.meta else 0
        if found != self.common:
            groups = "+".join(sorted(self.method.schedule.common)) or "nothing"
            raise TypeError(f"peer {sender} sent a message that belongs to {found:#x}, peer {peer} holds {self.common:#x} as what "
                            f"all share ({groups}): all must start from the same")


def _norms(messages: Sequence[Message]) -> list[dict[str, float]]:
    """The norm of each part of each message: not finite where a number is not. One synchronisation for all."""
    flat = [(k, name, part) for k, message in enumerate(messages) for name, part in message.parts.items()]
    found: list[dict[str, float]] = [{} for _ in messages]
    if flat:
        sizes = torch.stack([torch.linalg.vector_norm(part) for _, _, part in flat]).tolist()
        for (k, name, part), size in zip(flat, sizes, strict=True):
            # squares of float32 end at 1e38: large numbers are numbers
            found[k][name] = size if math.isfinite(size) else float(torch.linalg.vector_norm(part.double()))
    return found


def _others(round: Round) -> list[int]:
    return sorted(j for j in round.weights if j != round.peer)


def _state_of(packet: Packet) -> State:
    """What is needed to send it again."""
    return ({f"bytes.{name}": data.clone() for name, data in packet.payload.items()}
            | {f"numel.{name}": torch.tensor(numel) for name, numel in packet.numel.items()}
            | {f"meta.{name}": value for name, value in packet.meta.items()})


def _packet_of(state: State) -> Packet:
    numel = {name: int(value) for name, value in _under(state, "numel.").items()}
    return Packet(_under(state, "bytes."), numel, _under(state, "meta."))


def _state_of_message(message: Message) -> State:
    return {f"part.{name}": part.clone() for name, part in message.parts.items()} | \
        {f"meta.{name}": value for name, value in message.meta.items()}


def _message_of(state: State) -> Message:
    return Message(_under(state, "part."), _under(state, "meta."))


def _under(state: State, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _equal(one: Message, other: Message) -> bool:
    return one.parts.keys() == other.parts.keys() and all(torch.equal(part, other.parts[name]) for name, part in one.parts.items())


def digest_of_common(groups: frozenset[str], layout: Layout, x: Tensor) -> int:
    """A 32-bit number that all peers must share: what the groups that stay the same for ever hold (0: there are none).

    x (P, D): the rows of the hosted peers. TypeError when they differ among themselves: what was trained beside one
    frozen A means nothing beside another.
    """
    if not groups:
        return 0
    digests = {hashlib.sha256(torch.cat([row[cut] for cut in layout.columns(groups)]).cpu().numpy().tobytes()).digest()
               for row in x}
    if len(digests) > 1:
        raise TypeError(f"the peers hold {len(digests)} different {'+'.join(sorted(groups))}, which this rule never mixes; "
                        "all must start from the same")
    return int.from_bytes(digests.pop()[:4], "big") or 1
