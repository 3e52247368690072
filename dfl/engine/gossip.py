"""One round of gossip, as the papers draw it:

    plan -> local training -> send -> trigger -> encode -> transport -> channel -> decode -> guard -> complete -> mix

`Gossip` does everything but the local training, for the peers that this process hosts. It knows no loop, no clock
and no folder; a process asks the topology for the rows of its own peers alone. `_say` and `_take` are the line above.
Its steps lie in `sending` (trigger, encode, transport), `receiving` (channel, decode, guard, complete) and the slots.

With `delay: 1` the line begins before the local training: send, trigger and encode take the rows as they were at the
end of the round before, the transport works while peers train, and the mix moves what they have trained meanwhile,
x_i <- x_i + sum_j w_ij (m_j - m_i). The mean over peers is kept as without it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.common import digest_of_common
from dfl.adapters.layout import Layout
from dfl.channels import repeats
from dfl.engine import messages
from dfl.engine.averaging import Averaging, terms_of
from dfl.engine.coding import Coding
from dfl.engine.memory import Memory, state_of_message
from dfl.engine.receiving import Norms, Received, Receiving
from dfl.engine.sending import Sending, Spoken
from dfl.engine.state import Tree, snapshot
from dfl.engine.timing import now
from dfl.engine.ways import Graph, Ways
from dfl.methods import Method
from dfl.networks.clock import Clock
from dfl.rules.base import GroupMean
from dfl.slots import LAST, Inbox, Message, Plan, Round, State
from dfl.training.base import AfterStep
from dfl.transport import ledger
from dfl.transport.base import Arrived, Transport
from dfl.transport.ledger import Ledger


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
        return Report(tuple(sorted({*self.mixed, *later.mixed})), self.messages + later.messages,
                      self.message_bytes + later.message_bytes, self.broadcasts + later.broadcasts, self.lost + later.lost,
                      self.rejected + later.rejected, self.encode_s + later.encode_s, self.exchange_s + later.exchange_s,
                      self.mix_s + later.mix_s, ledger.of_one_round(ledger.together(self.ledger, later.ledger)),
                      self.aggregations + later.aggregations)


class Said(NamedTuple):
    """What hosted peers have to say, what of it is on its way, and what waits for what arrives; seconds until then."""

    rounds: list[Round]
    own: dict[int, Message]
    spoken: Spoken
    arrive: Callable[[], Arrived]
    encode_s: float


class Ahead:
    """An exchange under way during the local phase. rows: those that it began with; state: what the peers remembered then."""

    def __init__(self, said: Said, rows: Tensor, state: Tree):
        self.said, self.rows, self.state = said, rows, state
        self.arrived: Arrived | None = None
        self.exchange_s = 0.0

    def arrive(self) -> Arrived:
        if self.arrived is None:
            started = time.perf_counter()
            self.arrived = self.said.arrive()
            self.exchange_s = time.perf_counter() - started
        return self.arrived


class Gossip:
    """The peers `peers` of a run on a topology, with rows x (P, D) in `layout`.

    state: the tree of what the slots remember. scale: by how much each hosted peer's B counts against the layout's
    scaling, (P,), where peers are scaled differently; messages are exchanged as if all were scaled alike.
    """

    def __init__(self, method: Method, layout: Layout, topology: Graph, transport: Transport, peers: Sequence[int], x: Tensor, *,
                 seed: int = 0, scale: Tensor | None = None):
        self.method, self.layout, self.topology, self.transport = method, layout, topology, transport
        self.peers, self.seed, self.scale = list(peers), seed, scale
        self.memory = memory = Memory()
        common = digest_of_common(method.schedule.common, layout, x)
        self.clock, self.ways = Clock(method.network, lambda: memory.tree["clock"]), Ways(method, topology, self.memory, seed)
        coding = Coding(method, self.memory, seed, common)
        self.sending = Sending(method, self.ways, coding, self.clock, transport, self.memory, seed)
        self.receiving = Receiving(method, self.ways, coding, self.memory, common)
        self._planned: tuple[int, list[Round]] = (-1, [])
        self._contracts: tuple[int, float] = (-1, 1.0)
        self._ahead: Ahead | None = None
        self._averaging = Averaging(layout) if isinstance(method.rule.mix, GroupMean) and scale is None else None
        for k, (peer, row) in enumerate(zip(self.peers, x, strict=True)):
            self.state["rule"][str(peer)] = method.rule.init(self._common_scale(row, k))
        if method.trigger.common_start:
            self.state["start"] = {str(peer): {"x": row} for peer, row in zip(self.peers, _same_start(x), strict=True)}

    @property
    def state(self) -> Tree:
        """All that must not be forgotten now. While an exchange is under way: as it was before, with the rows that it began with."""
        if self._ahead is None:
            return self.memory.tree
        rows = {str(peer): {"x": row} for peer, row in zip(self.peers, self._ahead.rows, strict=True)}
        return self._ahead.state | {"ahead": rows}

    @state.setter
    def state(self, tree: Tree) -> None:
        self.memory.tree, self._ahead = tree, None

    def restore(self, state: Tree) -> None:
        """Go on from a state that `state` once was: what the hosted peers remembered."""
        self.state = {slot: dict(state.get(slot, {})) for slot in self.state}
        self.state["rule"] = {str(peer): self.state["rule"].get(str(peer), {}) for peer in self.peers}  # a file holds no empty ones

    def graph_changed(self) -> None:
        """W of a round that was asked for is another now, as of a round that begins again without somebody."""
        self._planned, self._contracts = (-1, []), (-1, 1.0)

    def averaging(self, t: int, peer: int) -> dict[int, float]:
        """The peer's row of W(t), for measures: where a mass is divided by, as the mean that it comes to."""
        row = dict(self.topology.neighbors(t, peer))
        return {j: weight / sum(row.values()) for j, weight in row.items()} if self.method.rule.columns else row

    def plans(self, t: int) -> list[Plan]:
        """What each hosted peer does in round t."""
        return [round.plan for round in self._rounds(t)]

    def corrections(self) -> list[Tensor | None]:
        """What is added to each local gradient (D,) of the hosted peers."""
        return [self.method.rule.correct(self.memory.tree["rule"][str(peer)]) for peer in self.peers]

    def residuals(self) -> Tensor | None:
        """The residuals (P, D_E) of the hosted peers, None for a rule without."""
        if self.method.rule.residual is None:
            return None
        return torch.stack([self.memory.tree["rule"][str(peer)]["residual"] for peer in self.peers])

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
            return self._own_scale(change(self._common_scale(x, row), self.memory.tree["rule"][str(round.peer)], round, k), row)

        return changed

    def _rounds(self, t: int, lr: float = 0.0, local_steps: int | Sequence[int] = 0, rates: Mapping[str, float] = {}) -> list[Round]:
        """What the slots may know of round t at each hosted peer. Plans and rows of W are made once a round, however many ask."""
        if self._planned[0] != t:
            plan, row = self.method.schedule.plan, self.ways.row
            self._planned = (t, [Round(t, peer, row(t, peer), plan(t, peer)) for peer in self.peers])
        steps = [local_steps] * len(self.peers) if isinstance(local_steps, int) else local_steps
        return [Round(t, round.peer, round.weights, round.plan, lr, num, rates)
                for round, num in zip(self._planned[1], steps, strict=True)]

    def begin(self, t: int, x: Tensor, *, lr: float = 0.0, local_steps: int | Sequence[int] = 0,
              rates: Mapping[str, float] = {}) -> None:
        """Before the local phase of round t, with what `round` will be told: begin its exchange where the method has a delay."""
        rounds = self._rounds(t, lr, local_steps, rates)
        if not self.method.delay or not self._speaks(t, rounds):
            return
        begun, before = self.memory.tree["ahead"], snapshot(self.memory.tree)
        rows = torch.stack([begun[str(peer)]["x"] if begun else row for peer, row in zip(self.peers, x, strict=True)])
        self.memory.tree["ahead"] = {}
        said = self._say(0, rows, rounds)
        self.clock.train(rounds)
        self._ahead = Ahead(said, rows, before)

    def arrive(self) -> None:
        """Behind the local phase, before processes say anything else to each other: wait for what `begin` has begun."""
        if self._ahead is not None:
            self._ahead.arrive()

    def round(self, t: int, x: Tensor, *, lr: float = 0.0, local_steps: int | Sequence[int] = 0,
              rates: Mapping[str, float] = {}) -> Report:
        """Exchange and mix round t: the rows x (P, D) change in place, `state` is replaced.

        local_steps: of all hosted peers, or of each. Every receiver uses the values from before the mix. TypeError where
        a neighbour holds other common values.
        """
        rounds, report = self._rounds(t, lr, local_steps, rates), Report()
        if self._ahead is None:
            self.clock.train(rounds)
        if self._speaks(t, rounds):
            report = self._exchanges(x, rounds)
        elif self._due(t, rounds):
            report = Report(ledger={peer: Ledger(due=len(self.topology.receivers(t, peer))) for peer in self.peers})
        if not self.method.network.timed:
            return report
        times = {peer: Ledger(seconds=float(self.clock.now(peer))) for peer in self.peers}
        return report._replace(ledger=ledger.together(report.ledger, times))

    def _due(self, t: int, rounds: Sequence[Round]) -> bool:
        return bool(rounds) and bool(rounds[0].plan.sends) and self.method.rule.speaks(t)

    def _speaks(self, t: int, rounds: Sequence[Round]) -> bool:
        return self._due(t, rounds) and (self.method.trigger.due is None or self.method.trigger.due(t))

    def _exchanges(self, x: Tensor, rounds: Sequence[Round]) -> Report:
        """All exchanges and mixes of a round: as many as the rule and the channel have."""
        report, seen = self._once(0, x, rounds)
        for k in range(1, self._how_often(rounds, seen) * self.method.rule.exchanges):
            rounds = [round._replace(exchange=k % self.method.rule.exchanges) for round in rounds]
            report = report.plus(self._once(k, x, rounds)[0])
        return report

    def _once(self, k: int, x: Tensor, rounds: Sequence[Round]) -> tuple[Report, dict[int, repeats.Seen]]:
        """Exchange and mix for the k-th time in a round, and what the peers saw before they mixed."""
        if not self.method.delay:
            ahead, fresh = Ahead(said := self._say(k, x, rounds), x, {}), said.own
        elif self._ahead is None or self._ahead.said.rounds[0].t != rounds[0].t:
            raise ValueError(f"delay = 1 needs the exchange of round {rounds[0].t} to be on its way: call begin(t, x) before the "
                             "local phase, and arrive() behind it")
        else:
            ahead, fresh, self._ahead = self._ahead, self._fresh(x, rounds), None
        arrived = ahead.arrive()
        report, seen = self._take(k, x, rounds, arrived, ahead.said.spoken, fresh)
        return report._replace(encode_s=ahead.said.encode_s, exchange_s=ahead.exchange_s), seen

    def _say(self, k: int, x: Tensor, rounds: Sequence[Round]) -> Said:
        """The first half: what hosted peers say goes on its way."""
        started = now(x)
        own = self._send(x, rounds)
        spoken = self.sending.speak(own, rounds, k)  # trigger, encode
        encoded = now(x)
        return Said(list(rounds), own, spoken, self.sending.begin(spoken, own, rounds, k), encoded - started)  # transport

    def _take(self, k: int, x: Tensor, rounds: Sequence[Round], arrived: Arrived, spoken: Spoken,
              own: Mapping[int, Message]) -> tuple[Report, dict[int, repeats.Seen]]:
        """The second half: what has arrived is mixed with each hosted peer's own message, and the rows x change."""
        started, t, receiving = now(x), rounds[0].t, self.receiving
        times = self.sending.acknowledge(spoken, t, k)
        received = receiving.open(arrived, spoken, own, rounds, k)  # channel, decode
        norms = receiving.guard(received, own, dict(zip(own, x, strict=True)))
        seen = self._look(received, own, k)
        full = [receiving.complete(received[round.peer], own[round.peer], spoken, round, k, self._common_scale(x[row], row))
                for row, round in enumerate(rounds)]
        self._mix(x, norms, full, own)
        mixed = now(x)
        together = tuple(round.peer for inbox, round in full if len(inbox) > 1)
        entries = {peer: ledger.entry(spoken.packets.get(peer), to, self.method.rule.index, int(peer in spoken.speakers),
                                      self._usual(t, peer, spoken), self.method.codec.counts) for peer, to in times.items()}
        if self.method.channel.shared(t):
            entries = {peer: one._replace(channel_uses=messages.numbers(own[peer]) * (peer in together))
                       for peer, one in entries.items()}
        sent = ledger.total(entries)
        return Report(together, sent.messages, sent.total_bytes, sent.broadcasts, sum(one.lost for one in received.values()),
                      tuple((peer, j) for peer, one in received.items() for j in one.rejected), mix_s=mixed - started,
                      ledger=entries, aggregations=1), seen

    def _usual(self, t: int, peer: int, spoken: Spoken) -> int:
        """How many messages W(t) alone has a peer send."""
        return len(spoken.due[peer] if self.method.trigger.merges is None else self.topology.receivers(t, peer))

    def _fresh(self, x: Tensor, rounds: Sequence[Round]) -> dict[int, Message]:
        """What hosted peers would say now; nothing is remembered of it."""
        return {round.peer: self.method.rule.send(self._common_scale(x[row], row), self.memory.tree["rule"][str(round.peer)], round)[0]
                for row, round in enumerate(rounds)}

    def _send(self, x: Tensor, rounds: Sequence[Round]) -> dict[int, Message]:
        """What each hosted peer has to say."""
        found, rule = {}, self.method.rule
        for row, round in enumerate(rounds):
            key = str(round.peer)
            if "x" in self.memory.tree["start"].get(key, ()):  # before the first message of all
                start = self._common_scale(self.memory.tree["start"][key]["x"], row)
                self.memory.tree["start"][key] = state_of_message(rule.send(start, rule.init(start), round)[0])
            own = self._common_scale(x[row], row)
            found[round.peer], state = rule.send(own, self.memory.tree["rule"][key], round)
            if not round.plan.away:
                self.memory.tree["rule"][key] = state
        return found

    def _look(self, received: Mapping[int, Received], own: Mapping[int, Message], k: int) -> dict[int, repeats.Seen]:
        """What the peers see before the first mix of a round, where the channel asks for it."""
        if self.method.channel.aggregations is not None or k:
            return {}
        return {peer: repeats.look(own[peer], {j: message for j, message in one.inbox.items()
                                               if messages.same_lengths(message, own[peer])}) for peer, one in received.items()}

    def _how_often(self, rounds: Sequence[Round], seen: Mapping[int, repeats.Seen]) -> int:
        """Exchanges in this round: as many as any peer wants where the channel chooses after the first."""
        channel, t = self.method.channel, rounds[0].t
        if channel.aggregations is not None:
            return channel.aggregations
        if self._contracts[0] != t:
            self._contracts = (t, repeats.contraction(self.topology.matrix(t)))
        wanted = [repeats.best(seen[round.peer], round.peer, round.weights, channel, self._contracts[1]) for round in rounds]
        return self.transport.agree(max(wanted), most=channel.most)

    def _mix(self, x: Tensor, norms: Mapping[int, Norms], full: Sequence[tuple[Inbox, Round]], own: Mapping[int, Message]) -> None:
        """All new rows are made before any takes the place of an old one, which a message may be a view of."""
        if self._averaging is not None and x.device.type == "cpu":
            sums = {row: terms_of(inbox, round) for row, (inbox, round) in enumerate(full) if _finite(norms[round.peer])}
            self._averaging(x, full[0][1].plan.sends, sums)
            return
        mixed = [self._mixed_row(x[row], norms[round.peer], inbox, round, row, own[round.peer])
                 for row, (inbox, round) in enumerate(full)]
        for row, ((_, round), (new, state)) in enumerate(zip(full, mixed, strict=True)):
            x[row] = new
            self.memory.tree["rule"][str(round.peer)] = state

    def _mixed_row(self, x: Tensor, norms: Norms, inbox: Inbox, round: Round, row: int, own: Message) -> tuple[Tensor, State]:
        state = self.memory.tree["rule"][str(round.peer)]
        if round.plan.away:
            return x, {name: value + 1 if name.endswith(LAST) else value for name, value in state.items()}
        # what is not finite in its own message a peer cannot mix; its next local phase says that it has diverged
        if not _finite(norms):
            return x, state
        new, state = self._mixed(self._common_scale(x, row), inbox, state, round, own)
        # alone, it keeps its bits, which scaling there and back may not
        return self._own_scale(new, row) if len(inbox) > 1 or self.scale is None else x, state

    def _mixed(self, x: Tensor, inbox: Inbox, state: State, round: Round, own: Message) -> tuple[Tensor, State]:
        """The row (D,) after the rule's mix. Where others know it otherwise than it is, and the rule only asks for rows, it moves by
        what the mix does to what they know: x_i + gamma (mix(m^)_i - m^_i). What they lack of it is not lost."""
        rule, as_is = self.method.rule, self.method.codec.exact and (not self.method.delay or inbox[round.peer] is own)
        if as_is or not rule.of_rows or len(inbox) == 1:
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

    def _times(self, row: Tensor, factor: Tensor) -> Tensor:
        row = row.clone()
        row[self.layout.groups["B"]] *= factor
        return row


def _finite(norms: Norms) -> bool:
    return all(map(math.isfinite, norms.values()))


def _same_start(x: Tensor) -> Tensor:
    """The rows (P, D) as they are now. ValueError where they differ: then nobody knows where another begins."""
    if not torch.equal(x, x[:1].expand_as(x)):
        raise ValueError("trigger.start = 'common' needs peers that all start from the same values, which these do not; allowed: sent")
    return x.clone()
