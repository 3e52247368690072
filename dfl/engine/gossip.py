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
from dfl.engine import copies, ledger, repeats
from dfl.engine.ledger import Ledger
from dfl.engine.sending import Sending, Spoken, others
from dfl.engine.state import Tree, edge
from dfl.methods import Method
from dfl.rules.base import same_shape
from dfl.slots import EXACT, Message, Plan, Round, State
from dfl.training.base import AfterStep
from dfl.transport.base import Arrived, Transport

Inboxes = dict[int, dict[int, Message]]
REMEMBERED = ("trigger", "codec", "sent", "received", "channel", "delivered", "outgoing", "start", "clock")


class Report(NamedTuple):
    """What one round did to the hosted peers: those that mixed something with their own; messages along directed edges
    that they sent (to a peer in the same process as well) and their bytes, broadcasts (peers that spoke), messages lost
    on the way and rejected by a guard, seconds by phase; what each peer sent, and how often all have exchanged and
    mixed in this round."""

    mixed: tuple[int, ...] = ()
    messages: int = 0
    message_bytes: int = 0
    broadcasts: int = 0
    lost: int = 0
    rejected: tuple[tuple[int, int], ...] = ()
    encode_s: float = 0.0
    exchange_s: float = 0.0
    mix_s: float = 0.0
    ledger: Mapping[int, Ledger] = {}
    aggregations: int = 0

    def plus(self, later: "Report") -> "Report":
        """Of one exchange, and of those after it in the same round."""
        return Report(tuple(sorted({*self.mixed, *later.mixed})),
                      *(one + other for one, other in zip(self[1:9], later[1:9], strict=True)),
                      ledger.of_one_round(ledger.together(self.ledger, later.ledger)), self.aggregations + later.aggregations)


class Gossip(Sending):
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
        self.state: Tree = {"rule": {str(peer): method.rule.init(self._common_scale(row, k))
                                     for k, (peer, row) in enumerate(zip(self.peers, x, strict=True))}}
        self.state |= {slot: {} for slot in REMEMBERED}
        if method.trigger.common_start:
            self.state["start"] = {str(peer): {"x": row} for peer, row in zip(self.peers, _same_start(x), strict=True)}
        self._contracts: tuple[int, float] = (-1, 1.0)

    def restore(self, state: Tree) -> None:
        """Go on from a state that `state` once was: what the hosted peers remembered."""
        self.state = {slot: dict(state.get(slot, {})) for slot in self.state}
        self.state["rule"] = {str(peer): self.state["rule"].get(str(peer), {}) for peer in self.peers}  # a file holds no empty ones

    def averaging(self, t: int, peer: int) -> dict[int, float]:
        """The peer's row of W(t), for measures: where a mass is divided by, as the mean that it comes to."""
        row = dict(self.topology.neighbors(t, peer))
        return {j: weight / sum(row.values()) for j, weight in row.items()} if self.method.rule.columns else row

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

    def after_step(self, t: int, *, lr: float = 0.0, local_steps: int | Sequence[int] = 0,
                   rates: Mapping[str, float] = {}) -> AfterStep | None:
        """(row, x_D, k) -> x_D: what becomes of the `row`-th hosted peer's row after its local step k of round t, in the
        numbers that it trains. None: nothing."""
        change = self.method.rule.after_step
        if change is None:
            return None
        rounds = self._rounds(t, lr, local_steps, rates)

        def changed(row: int, x: Tensor, k: int) -> Tensor:
            round = rounds[row]
            return self._own_scale(change(self._common_scale(x, row), self.state["rule"][str(round.peer)], round, k), row)

        return changed

    def _rounds(self, t: int, lr: float, local_steps: int | Sequence[int], rates: Mapping[str, float]) -> list[Round]:
        """What the slots may know of round t at each hosted peer."""
        steps = [local_steps] * len(self.peers) if isinstance(local_steps, int) else local_steps
        return [Round(t, peer, self._row(t, peer), plan, lr, num, rates)
                for peer, plan, num in zip(self.peers, self.plans(t), steps, strict=True)]

    def round(self, t: int, x: Tensor, *, lr: float = 0.0, local_steps: int | Sequence[int] = 0,
              rates: Mapping[str, float] = {}) -> Report:
        """Exchange and mix round t: the rows x (P, D) change in place, `state` is replaced.

        local_steps: of all hosted peers, or of each. Every receiver uses the values from before the mix. TypeError where
        a neighbour holds other common values.
        """
        rounds, rule = self._rounds(t, lr, local_steps, rates), self.method.rule
        due, timed, report = self.method.trigger.due, self.method.network.timed, Report()
        for round in rounds if timed else ():
            took = self.method.network.compute(t, round.peer, round.local_steps)
            self._set_clock(round.peer, time=self._now(round.peer) + took)
        exchanged = bool(rounds) and bool(rounds[0].plan.sends) and rule.speaks(t)
        if exchanged and due is not None and not due(t):
            report = Report(ledger={peer: Ledger(due=len(self.topology.receivers(t, peer))) for peer in self.peers})
        elif exchanged:
            report, seen = self._aggregate(0, x, rounds)
            for k in range(1, self._how_often(rounds, seen) * rule.exchanges):
                rounds = [round._replace(exchange=k % rule.exchanges) for round in rounds]
                report = report.plus(self._aggregate(k, x, rounds)[0])
        times = {peer: Ledger(seconds=float(self._now(peer))) for peer in self.peers if timed}
        return report._replace(ledger=ledger.together(report.ledger, times))

    def _aggregate(self, k: int, x: Tensor, planned: Sequence[Round]) -> tuple[Report, dict[int, repeats.Seen]]:
        """Exchange and mix for the k-th time in a round, and what the peers saw before they mixed."""
        started, rounds, t = time.perf_counter(), list(planned), planned[0].t
        messages = self._compose(x, rounds)
        spoken = self._speak(messages, rounds, k)
        encoded = time.perf_counter()
        arrived = self._exchange(spoken, messages, rounds, k)
        moved = time.perf_counter()
        times = self._acknowledge(spoken, t, k)
        norms = dict(zip(messages, _norms(list(messages.values())), strict=True))
        inboxes, lost, rejected, seen = self._receive(x, arrived, spoken, messages, rounds, norms, k)
        self._mix(x, norms, inboxes, rounds)
        mixed = time.perf_counter()
        together = tuple(peer for peer, inbox in inboxes.items() if len(inbox) > 1)
        entries = {peer: ledger.entry(spoken.packets.get(peer), to, self.method.rule.index, int(peer in spoken.speakers),
                                      len(self.topology.receivers(t, peer)), self.method.codec.counts) for peer, to in times.items()}
        if self.method.channel.shared(t):
            entries = {peer: one._replace(channel_uses=_numbers(messages[peer]) * (peer in together)) for peer, one in entries.items()}
        sent = ledger.total(entries)
        return Report(together, sent.messages, sent.total_bytes, sent.broadcasts, lost, rejected, encoded - started, moved - encoded,
                      mixed - moved, entries, 1), seen

    def _how_often(self, rounds: Sequence[Round], seen: Mapping[int, repeats.Seen]) -> int:
        """Exchanges in this round: as many as any peer wants where the channel chooses after the first."""
        channel, t = self.method.channel, rounds[0].t
        if channel.aggregations is not None:
            return channel.aggregations
        if self._contracts[0] != t:
            self._contracts = (t, repeats.contraction(self.topology.matrix(t)))
        wanted = [repeats.best(seen[round.peer], round.peer, round.weights, channel, self._contracts[1]) for round in rounds]
        return self.transport.agree(max(wanted))

    def _receive(self, x, arrived: Arrived, spoken: Spoken, messages, rounds, norms, k):
        """What each hosted peer mixes: decoded once however many receive it, past its channel and its guard, gaps filled;
        messages lost and rejected; what the peers saw, where the channel asks for it."""
        told = self._told(arrived, spoken, messages, rounds)
        found = list({id(message): message for inbox in told.values() for message in inbox.values() if message is not None}.values())
        sizes = {id(message): size for message, size in zip(found, _norms(found), strict=True)}
        inboxes, lost, rejected, seen = {}, 0, [], {}
        for row, round in enumerate(rounds):
            peer, own, inbox, out = round.peer, messages[round.peer], {}, []
            for j in others(round):
                message = self._whole(told[peer].get(j), own, self._copy("received", edge(peer, j)))
                if j in told[peer] and not self._readable(message, own, round):
                    out.append(j)
                    continue
                message = self._deliver(message, j, round, k)
                lost += j in told[peer] and message is None and not self.method.channel.delays
                if message is not None:
                    self._check_common(message, j, peer)
                    inbox[j] = message
            held = {j: sizes.get(id(message)) or _norms([message])[0] for j, message in inbox.items()}
            out = sorted([*out, *self.method.guard.rejects({**held, peer: norms[peer]}, peer, x[row])])
            rejected += [(peer, j) for j in out]
            inbox = {j: message for j, message in inbox.items() if j not in out}
            if self.method.channel.aggregations is None and k == 0:
                seen[peer] = repeats.look(own, {j: message for j, message in inbox.items() if copies.same_lengths(message, own)})
            inboxes[peer], rounds[row] = self._complete(inbox, own, spoken, round, out, k, self._common_scale(x[row], row))
        return inboxes, lost, tuple(rejected), seen

    def _told(self, arrived: Arrived, spoken: Spoken, messages: Mapping[int, Message],
              rounds: Sequence[Round]) -> dict[int, dict[int, Message | None]]:
        """By receiver, what each neighbour tells it; None: bytes that are no numbers. Decoded once however many receive it."""
        if self.method.codec.update is not None:
            return self._moved_copies(arrived, messages, rounds)
        like, decoded = next(iter(messages.values())), {}
        if self.method.trigger.tensors is None:
            decoded = {id(packet): spoken.public[peer] for peer, packet in spoken.packets.items()}
        for packet in (packet for inbox in arrived.values() for packet in inbox.values()):
            if id(packet) not in decoded:
                decoded[id(packet)] = self._decode(packet, like)
        return {peer: {j: decoded[id(packet)] for j, packet in inbox.items()} for peer, inbox in arrived.items()}

    def _moved_copies(self, arrived: Arrived, messages: Mapping[int, Message],
                      rounds: Sequence[Round]) -> dict[int, dict[int, Message | None]]:
        """The same where differences travel: each receiver's copies, moved by what arrived.

        Receivers that held one tensor go on to share one: memory for each sender, not for each link.
        """
        made: dict[tuple, tuple] = {}
        told: dict[int, dict[int, Message | None]] = {round.peer: {} for round in rounds}
        for round in rounds:
            for j in others(round):
                key, packet, own = edge(round.peer, j), arrived[round.peer].get(j), messages[round.peer]
                held = self.state["received"].get(key, {})
                if packet is not None:
                    mark = (id(packet), *map(id, held.values()))
                    if mark not in made:  # with `held`, which keeps the ids from being given to others
                        made[mark] = held, self._decode(packet, own, copies.under(held, "part."))
                    message = told[round.peer][j] = made[mark][1]
                    if message is not None:
                        self.state["received"][key] = held | copies.named(message)
                elif held:
                    copy = copies.message_of(held)
                    told[round.peer][j] = copy._replace(parts={name: copy.parts[name] for name in own.parts})
        return told

    def _readable(self, message: Message | None, own: Message, round: Round) -> bool:
        if message is None:
            return False
        bare = message
        if "common" in message.meta:
            bare = message._replace(meta={name: value for name, value in message.meta.items() if name != "common"})
        return (self.method.rule.readable or (lambda other, own, round: same_shape(other, own)))(bare, own, round)

    def _deliver(self, message: Message | None, sender: int, round: Round, k: int) -> Message | None:
        """What comes through the channel. Where messages are held back, numbers that were lost are those that came before."""
        channel, key = self.method.channel, edge(round.peer, sender)
        if channel.perfect or message is None and not channel.delays:
            return message
        message, state = channel.deliver(message, self._of("channel", key, channel.init), self.link(sender, round.peer, round.t, k))
        self._keep("channel", key, state)
        if message is None or not message.lost:
            return message
        if self.method.rule.dated:  # numbers of another message are no numbers of this one
            return None
        return copies.patched(message, self._copy("received", key)) if self.held else message

    def _complete(self, inbox: dict[int, Message], own: Message, spoken: Spoken, round: Round,
                  rejected: Sequence[int], k: int, x: Tensor) -> tuple[dict[int, Message], Round]:
        """The inbox with one message for every weight, before `mix` sees it.

        Who is silent is where it was when it last spoke to this peer; who never did, and whose message was lost or
        rejected, gives its weight to the receiver. Where what the others take the peer's own message for is not what it
        is, because it was rounded or held back, a rule that averages mixes own + sum_j w_ij (m_j - m_i as j has it), the
        sum times the codec's step, which keeps the mean; any other rule takes what everybody got this round, or its own
        message as it is where nobody got one. A guard that weighs or replaces messages does so when all are there. x: the
        peer's row.
        """
        weights, peer, public = dict(round.weights), round.peer, spoken.public[round.peer]
        moved = self.method.codec.update is not None  # then its copies have followed already
        keeps = self.held and not moved
        # a part of a message says nothing where it is not like the own
        inbox = {j: message for j, message in inbox.items() if not message.lost or copies.same_lengths(message, public)}
        for j in others(round):
            key = edge(peer, j)
            if j in inbox and keeps:
                self.state["received"][key] = copies.state_of_message(inbox[j])
            elif j not in inbox and j not in rejected and keeps and (copy := self._copy("received", key)) is not None:
                inbox[j] = copy
            # a link that j does not use this peer leaves alone as well
            if j in inbox and self.held and not self._known_to(j, peer, spoken):
                del inbox[j]
            if j not in inbox:
                weights[peer] += weights.pop(j)
        inbox = self._filled(inbox, public, weights)
        if self.method.channel.air is not None:
            state, link = self._of("channel", str(peer), self.method.channel.init), self.link(peer, peer, round.t, k)
            inbox, state = self.method.channel.air(inbox, public, weights, state, link)
            self._keep("channel", str(peer), state)
        same = self.method.codec.exact and (self.method.trigger.always or copies.equal(public, own))
        known = {j: found for j in inbox if self.held and not self.method.channel.perfect
                 and (found := self._copy("delivered", edge(peer, j))) is not None and not copies.equal(found, public)}
        averages = self.method.rule.averages
        alone = not inbox  # then it keeps what it has, whatever others know of it
        inbox[peer] = own if same or alone or not (averages or moved or self.method.trigger.always) else public
        if self.method.guard.screen is not None and not alone:
            inbox, weights = self.method.guard.screen(inbox, round._replace(weights=weights), x)
        if averages and (known or not same) and len(inbox) > 1:
            inbox[EXACT] = own
            step = self.method.codec.gamma
            weights = {EXACT: 1.0} | {j: step * (weight - (j == peer)) for j, weight in weights.items()}
            for j, found in known.items():  # it holds an older one
                inbox[EXACT - 1 - j] = found
                weights[EXACT - 1 - j], weights[peer] = -weights[j], weights[peer] + weights[j]
        return dict(sorted(inbox.items())), round._replace(weights=weights)

    def _known_to(self, j: int, peer: int, spoken: Spoken) -> bool:
        """Whether a neighbour holds a message of this peer's, if it is to get any."""
        if j not in spoken.due[peer] or self._start(str(peer)) is not None:
            return True
        if not self.method.channel.perfect:
            return edge(peer, j) in self.state["delivered"]
        sent = self.state["sent"].get(str(peer))
        return sent is not None and j in sent["known"].tolist()

    def _filled(self, inbox: dict[int, Message], own: Message, weights: dict[int, float]) -> dict[int, Message]:
        """Something for every number that was lost."""
        if not any(message.lost for message in inbox.values()):
            return inbox
        fill = self.method.channel.fill
        return {j: copies.patched(message, own) for j, message in inbox.items()} if fill is None else fill(inbox, own, weights)

    def _mix(self, x: Tensor, norms: Mapping[int, Mapping[str, float]], inboxes: Inboxes, rounds: Sequence[Round]) -> None:
        mixed = []
        for row, round in enumerate(rounds):
            key, inbox = str(round.peer), inboxes[round.peer]
            new, state = x[row], self.state["rule"][key]
            # what is not finite in its own message a peer cannot mix; its next local phase says that it has diverged
            if all(map(math.isfinite, norms[round.peer].values())):
                new, state = self._mixed(self._common_scale(new, row), inbox, state, round)
                # alone, it keeps its bits, which scaling there and back may not
                new = self._own_scale(new, row) if len(inbox) > 1 or self.scale is None else x[row]
            mixed.append((new, state))
        for row, (round, (new, state)) in enumerate(zip(rounds, mixed, strict=True)):
            x[row] = new
            self.state["rule"][str(round.peer)] = state

    def _mixed(self, x: Tensor, inbox: Mapping[int, Message], state: State, round: Round) -> tuple[Tensor, State]:
        """The row (D,) after the rule's mix. Where others know it otherwise than it is, and the rule only asks for rows, it moves by
        what the mix does to what they know: x_i + gamma (mix(m^)_i - m^_i). What they lack of it is not lost."""
        rule = self.method.rule
        if self.method.codec.exact or not rule.of_rows or len(inbox) == 1:
            return rule.mix(x, inbox, state, round)
        public = x.clone()
        for name, part in inbox[round.peer].parts.items():
            public[self.layout.groups[name]] = part
        mixed, state = rule.mix(public, inbox, state, round)
        return x + self.method.codec.gamma * (mixed - public), state

    def _common_scale(self, row: Tensor, k: int) -> Tensor:
        return row if self.scale is None else self._times(row, self.scale[k])

    def _own_scale(self, row: Tensor, k: int) -> Tensor:
        return row if self.scale is None else self._times(row, 1 / self.scale[k])

    def _times(self, row: Tensor, factor) -> Tensor:
        row = row.clone()
        row[self.layout.groups["B"]] *= factor
        return row

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


def _numbers(message: Message) -> int:
    return sum(part.numel() for part in message.parts.values())


def _same_start(x: Tensor) -> Tensor:
    """The rows (P, D) as they are now. ValueError where they differ: then nobody knows where another begins."""
    if not torch.equal(x, x[:1].expand_as(x)):
        raise ValueError("trigger.start = 'common' needs peers that all start from the same values, which these do not; allowed: sent")
    return x.clone()


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
