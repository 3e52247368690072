"""THE loop: local steps, exchange, mix, measure, evaluate, record, save."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.attach import Rows
from dfl.config import Config
from dfl.engine import state as trees
from dfl.engine.gossip import Gossip, Report
from dfl.engine.timing import now
from dfl.metrics.answers import Answers
from dfl.metrics.consensus import consensus_rows
from dfl.metrics.evaluator import Evaluator, GivenUp, summarised
from dfl.metrics.layers import diagnose
from dfl.metrics.measures import measure, seen
from dfl.run.answers import add_answers, add_first_answers
from dfl.slots import Rule
from dfl.training.base import DivergenceError, LocalTrainer
from dfl.training.executors import Executor
from dfl.training.hosted import HostedPeers
from dfl.training.phase import ModelTrainer
from dfl.training.together import Together
from dfl.transport.base import LOOK, SENT, Transport
from dfl.transport.ledger import Ledger
from dfl.transport.packet import Packet

logger = logging.getLogger(__name__)
# what processes agree on after every local phase, the largest of what each says; _SAVE is process 0's alone to say, by its clock;
# _STOP ends with this round, _HALT in its middle, as one of them has stopped between two steps;
# a diverged peer is _DIVERGED + its id, and the number of peers more when it began the round with factors that were bad already
_GO, _SAVE, _STOP, _HALT, _DIVERGED = 0, 1, 2, 3, 4
_SECONDS = ("local", "encode", "exchange", "mix")
_COLUMNS = ("train_loss", *_SECONDS, *SENT, "message_bytes", "edges", "lost", "rejected", "rejected_sender", *Ledger._fields)
_LARGEST = ("rounds", "seconds")  # of a ledger, the largest over peers counts; else their sum


@dataclass
class Run:
    """Everything a round touches."""

    config: Config
    peers: HostedPeers
    gossip: Gossip
    topology: object
    transport: Transport
    executor: Executor
    task: object
    split: object
    evaluator: Evaluator
    completed: int = 0
    pending: "Pending | None" = None  # of the last completed round, until it is evaluated and recorded
    resumed: bool = False  # from a checkpoint
    began: bool = False  # there is more to save than the start
    merged: Rows | None = None  # the consensus model, until the models change
    answers: Answers | None = None  # that models write at evaluations
    distrusted: set[int] = field(default_factory=set)  # senders of rejected messages that a warning has named
    num_there: int = 0  # the peers that are there: all of them, unless the run goes on without some
    survives: bool = False  # it does go on without some: what would end it for all is a word that no process says
    together: Together | None = None  # with the other processes of a team that holds the base model in parts
    begun: list[tuple] = field(default_factory=list)  # (t, rows and moments, gossip's state) at the start of the last two rounds

    def __post_init__(self):
        self.num_there = self.num_there or self.config.peers
        # six times the row: the pair, the pair before and the residual that a rule may send; as much again for what is to come
        self.transport.most = 12 * self.peers.x[0].nbytes + 2**16

    @property
    def rule(self) -> Rule:
        return self.gossip.method.rule

    @property
    def trainer(self) -> LocalTrainer:
        return ModelTrainer(self.peers, self.task, self.split, self.executor, self.config.data.max_length,
                            self.together)

    def rows(self) -> Rows:
        """What the model reads of the hosted peers now."""
        return self.peers.rows(self.gossip.residuals())

    @property
    def consensus_is(self) -> str:
        """How the consensus model is made of the peers' models."""
        return "best rank-r approximation of the mean product" if self.rule.product else "mean of the factors"

    def consensus(self) -> Rows:
        """The consensus model, on all processes, which make it together: once for evaluation and checkpoint of the same models."""
        if self.merged is None:
            self.merged = consensus_rows(self.transport, self.peers.adapted, self.peers.common_scale(), self.gossip.residuals(),
                                         num_peers=self.num_there, product=self.rule.product, residual=self.rule.residual)
        return self.merged

    def give_up_together(self, given_up: bool) -> None:
        """GivenUp on all processes where it is given up on one; in a run that survives its processes nobody says that."""
        if self.transport.agree(given_up, most=int(not self.survives)):
            raise GivenUp


class Pending(NamedTuple):
    """A round before its evaluation. table: `_table` of the hosted peers; found: measures."""

    table: Tensor
    found: dict
    measure_seconds: float


class Hooks(NamedTuple):
    """What happens beside the mathematics: `record` is called on every process, with what is of all peers and of its own."""

    record: Callable[[dict], None]
    save: Callable[[], None]
    stop_requested: Callable[[], bool]  # with the end of a round; asked at its begin
    save_due: Callable[[], bool] = lambda: False  # a checkpoint by time; asked in every round, on process 0 alone
    halted: Callable[[], bool] = lambda: False  # as soon as possible: evaluations are given up
    halt: Callable[[int], bool] | None = None  # the same between two steps, of which so many are left


def run_rounds(run: Run, hooks: Hooks) -> bool:
    """Run to the last round, from wherever the run is. False when stopped early, as all processes agreed; the state is saved then.

    A stop comes at the end of a round, between two steps of its local phase, or between two batches of its evaluation.
    On divergence the peers go back to the last state known to be good, which is saved, and DivergenceError is raised everywhere; where
    the run survives a process, on that of the peer alone, which has to save.
    """
    config = run.config
    if not run.resumed:
        try:
            hooks.record(_start_record(run, hooks.halted))
        except GivenUp:
            return False
    run.began = True
    while run.completed < config.train.rounds or run.pending is not None:
        flag = _GO
        if run.pending is None:
            t = run.transport.round = run.completed
            # the start of this round and of the one before it
            run.begun = [*run.begun[-1:], (t, run.peers.round_start(), trees.snapshot(run.gossip.state))]
            flag = _round(run, t, hooks)
        if flag == _HALT or not _conclude(run, hooks, flag == _STOP):
            hooks.save()
            return False
        if flag == _STOP and run.completed < config.train.rounds:
            hooks.save()
            return False
        if flag == _SAVE or due(config.checkpoint.every, run.completed - 1) or run.completed == config.train.rounds:
            hooks.save()
    return True


def _round(run: Run, t: int, hooks: Hooks) -> int:
    """Round t up to its evaluation, or, where it gives _HALT, to a step of its local phase."""
    started = now(run.peers.x)
    losses, flag = _local(run, t, hooks)
    local_seconds = now(run.peers.x) - started
    if flag >= _DIVERGED:
        at_start, peer = divmod(flag - _DIVERGED, run.config.peers)
        go_back(run, run.begun[0] if at_start else run.begun[-1])
        if not run.survives:
            hooks.save()
        raise DivergenceError(f"peer {peer} diverged in round {t + 1}: its training loss or its factors are not finite; the state "
                              f"after round {run.completed} is saved. A smaller train.lr or train.clip may help", peer)
    if flag != _HALT:
        run.peers.end_phase()
        run.pending = finish_round(run, t, losses, local_seconds)
        run.completed = t + 1
    return flag


def _conclude(run: Run, hooks: Hooks, stop: bool) -> bool:
    """Evaluate the last round where that is due, and record it; False, with nothing done, when the evaluation was given up."""
    t, pending, started = run.completed - 1, run.pending, time.perf_counter()
    last = run.completed == run.config.train.rounds
    evaluated = due(run.config.eval.every, t) or last
    try:
        evaluation = evaluate(run, hooks.halted) if evaluated else None
    except GivenUp:
        return False
    evaluated_at = time.perf_counter()
    if last or stop:
        run.consensus()  # for the checkpoint that follows: its bytes belong to this record, the last one
    record = round_record(run, t, pending, run.transport.summary(record_sums(run, pending))) | pending.found
    record |= {"eval": evaluation} if evaluated else {}
    record["seconds"] |= {"measure": pending.measure_seconds, "evaluate": evaluated_at - started}
    run.pending = None
    hooks.record(record)
    return True


def _agreed(run: Run, work: Callable[[], object]):
    """`work()` of every process; GivenUp on all where it is given up on one."""
    found, given_up = None, False
    try:
        found = work()
    except GivenUp:
        given_up = True
    run.give_up_together(given_up)
    return found


def go_back(run: Run, begun: tuple) -> None:
    """To the start of a round."""
    run.completed, snapshot, run.gossip.state = begun
    run.peers.restore(snapshot)
    run.merged = None


def due(every: int, t: int) -> bool:
    return bool(every) and (t + 1) % every == 0


def _local(run: Run, t: int, hooks: Hooks) -> tuple[Tensor | None, int]:
    """The local phase; the mean losses (P,) and what all processes agreed to do. Where the run survives this process, it says to
    nobody that a peer of its own has diverged: it goes, and the others go on."""
    stop, losses = hooks.stop_requested(), None
    run.merged = None
    try:
        halt = {}
        if hooks.halt:
            hooks.halt.begin()
            halt = {"halt": hooks.halt}
        run.gossip.begin(t, run.peers.x, **_told(run, t))
        after_step = run.gossip.after_step(t, **_told(run, t))
        losses = run.trainer.run(run.peers.x, run.gossip.plans(t), run.gossip.corrections(), t, residuals=run.gossip.residuals(),
                                 after_step=after_step, **halt)
        save = run.transport.rank == 0 and hooks.save_due()
        flag = _HALT if losses is None else _STOP if stop or hooks.halted() else _SAVE if save else _GO
    except DivergenceError as error:
        flag = _DIVERGED + error.peer + run.config.peers * error.at_start
    run.gossip.arrive()
    if flag >= _DIVERGED and run.survives:
        return losses, flag
    return losses, run.transport.agree(flag, most=_SAVE if run.survives else _DIVERGED + 2 * run.config.peers - 1)


def finish_round(run: Run, t: int, losses: Tensor, local_seconds: float) -> "Pending":
    """Exchange, mix and measure round t: all of its record but the evaluation."""
    config, started = run.config, now(run.peers.x)
    last = t + 1 == config.train.rounds
    every = config.eval.every if config.measure.every is None else config.measure.every
    look = Look(due(every, t) or (config.measure.every is None and last), due(config.measure.layers, t))
    before = look.before(run, t)
    seconds = now(run.peers.x) - started
    traffic = _exchange(run, t)
    started = now(run.peers.x)
    found = look.after(run, before)
    if run.config.delay:  # the local phase took what was exchanged meanwhile for its own
        local_seconds -= traffic.encode_s + traffic.exchange_s
    return Pending(_table(run, losses, local_seconds, traffic), found, seconds + time.perf_counter() - started)


def _exchange(run: Run, t: int) -> Report:
    """Exchange and mix; the optimiser follows where mixing turns the basis of the factors."""
    peers = run.peers
    frames = peers.x.clone() if run.rule.changes_basis and peers.turns_moments else None
    traffic = run.gossip.round(t, peers.x, **_told(run, t))
    run.merged = None
    if run.rule.changes_basis:
        peers.after_refactor(frames, traffic.mixed)
    return traffic


def _told(run: Run, t: int) -> dict[str, object]:
    """What the slots are told of round t: rates in its middle, the same on all processes, not zero in a warm-up."""
    peers, middle = run.peers, (t + 0.5) / run.config.train.rounds
    return {"lr": peers.learning_rate(middle), "rates": peers.rates(middle),
            "local_steps": [peers.steps(row) for row in range(len(peers.ids))]}


class Look(NamedTuple):
    """What is measured of a round: the whole, and layer by layer. Every process looks at what its own peers receive."""

    whole: bool
    layers: bool

    def before(self, run: Run, t: int) -> "Before | None":
        if not (self.whole or self.layers):
            return None
        mine = {"x": run.peers.common_scale()} | ({} if run.rule.residual is None else {"kept": run.gossip.residuals()})
        rows = [run.gossip.averaging(t, peer) for peer in run.peers.ids]
        due = {peer: run.topology.receivers(t, peer) for peer in run.peers.ids}
        expected = {peer: sorted(j for j in row if j != peer) for peer, row in zip(run.peers.ids, rows, strict=True)}
        packets = {peer: _packet({name: values[k] for name, values in mine.items()}) for k, peer in enumerate(run.peers.ids)}
        arrived = run.transport.exchange(t, packets, due, due, expected, LOOK)
        known = packets | {j: packet for inbox in arrived.values() for j, packet in inbox.items()}
        ids = sorted(known)
        place = {j: k for k, j in enumerate(ids)}
        weights = torch.zeros(len(rows), len(ids), dtype=torch.float64)
        for k, row in enumerate(rows):
            there = [j for j in row if j in place]
            weights[k, [place[j] for j in there]] = torch.tensor([row[j] for j in there], dtype=torch.float64)
        found = {name: torch.stack([known[j].payload[name].view(values.dtype) for j in ids]).to(values.device)
                 for name, values in mine.items()}
        return Before(found["x"], found.get("kept"), weights, [place[peer] for peer in run.peers.ids])

    def after(self, run: Run, before: "Before | None") -> dict:
        if before is None:
            return {}
        adapted = run.peers.adapted
        # cores are read as the factors that they make
        look = seen(adapted.factors(before.x), adapted.factors(run.peers.common_scale()), before.weights, before.own, adapted.lora,
                    before.kept, run.gossip.residuals(), run.rule.residual)
        found = {}
        if self.whole:
            found["measures"] = measure(run.transport, look, run.num_there)
        if self.layers:
            found["layers"] = diagnose(run.transport, look, run.num_there)
        return found


class Before(NamedTuple):
    """The rows x (J, D) before a mix of the hosted peers and of those that they receive from, with residuals; weights (P, J)."""

    x: Tensor
    kept: Tensor | None
    weights: Tensor
    own: list[int]


def _packet(parts: dict[str, Tensor]) -> Packet:
    return Packet({name: part.contiguous().view(torch.uint8) for name, part in parts.items()},
                  {name: part.numel() for name, part in parts.items()}, {})


def record_sums(run: Run, pending: Pending) -> Tensor:
    """(3, K) float64, for `Transport.summary`: of each number of a record the sum, least and largest over the hosted peers."""
    table = pending.table
    table[0, _columns(SENT)] = torch.tensor(run.transport.newly_sent(), dtype=torch.float64)
    return torch.stack([table.sum(0), table.amin(0), table.amax(0)])


def round_record(run: Run, t: int, pending: Pending, summed: Tensor) -> dict:
    """Numbers of all processes; lists are of the hosted peers. Seconds are those of the slowest process, bytes those sent by all since
    the record before. summed (3, K): `record_sums` of all processes."""
    names, table = (*_COLUMNS, *_state_names(run)), pending.table
    total, least, most = (dict(zip(names, row, strict=True)) for row in summed.tolist())
    now, num_peers = t / run.config.train.rounds, run.num_there
    lr, rates = run.peers.learning_rate(now), run.peers.rates(now)
    return {"round": t + 1, "trains": "+".join(sorted(run.gossip.plans(t)[0].trains)), "lr": lr,
            **({"rates": rates} if set(rates.values()) != {lr} else {}),
            "train_loss": {"mean": total["train_loss"] / num_peers, "min": least["train_loss"], "max": most["train_loss"]},
            **_hosted(run), "train_loss_peers": table[:, 0].tolist(),
            **{name: int(total[name]) for name in ("edges", "message_bytes", *SENT, "lost", "rejected")},
            "ledger": {name: _plain((most if name in _LARGEST else total)[name]) for name in Ledger._fields},
            **rejections(run, t, table), "seconds": {name: most[name] for name in _SECONDS},
            # what a rule measures itself, mean over peers (the truncation error of DeCAF)
            **{name: total[name] / num_peers for name in names[len(_COLUMNS):]}}


def _hosted(run: Run) -> dict[str, list[int]]:
    """Whose values the lists of a record are, where they are not all peers'."""
    return {"hosted": list(run.peers.ids)} if run.transport.size > 1 else {}


def _state_names(run: Run) -> list[str]:
    return [name for name, value in run.gossip.state["rule"][str(run.peers.ids[0])].items() if value.dim() == 0]


def _table(run: Run, losses: Tensor, local_seconds: float, traffic: Report) -> Tensor:
    """By hosted peer, the columns _COLUMNS and what its rule measures itself; what is of the process stands at its first peer. The
    bytes sent are known after the evaluation."""
    state_names, rejected = _state_names(run), dict[int, list[int]]()
    for receiver, sender in traffic.rejected:
        rejected.setdefault(receiver, []).append(sender)
    seconds = [local_seconds, traffic.encode_s, traffic.exchange_s, traffic.mix_s]
    of_process = [*[0.0] * len(SENT), traffic.message_bytes, traffic.messages, traffic.lost]
    rows = []
    for row, (peer, loss) in enumerate(zip(run.peers.ids, losses.tolist(), strict=True)):
        senders = rejected.get(peer, [])
        first = senders[0] + 1 if senders else 0  # the first of them; zero: none
        rows.append([loss, *seconds, *(of_process if row == 0 else [0.0] * len(of_process)), len(senders), first,
                     *traffic.ledger.get(peer, Ledger()), *[0.0] * len(state_names)])
    table = torch.tensor(rows, dtype=torch.float64)
    states = [run.gossip.state["rule"][str(peer)] for peer in run.peers.ids]
    for column, name in enumerate(state_names, len(_COLUMNS)):
        table[:, column] = torch.stack([state[name] for state in states]).cpu()
    return table


def _plain(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _columns(names: Sequence[str]) -> list[int]:
    return [_COLUMNS.index(name) for name in names]


def rejections(run: Run, t: int, table: Tensor) -> dict[str, object]:
    """Whose messages the hosted peers have rejected: the first sender at each receiver. A warning names a sender once."""
    senders = table[:, _COLUMNS.index("rejected_sender")].long()
    for receiver, sender in zip(run.peers.ids, (senders - 1).tolist(), strict=True):
        if sender >= 0 and sender not in run.distrusted:
            logger.warning("dfl: WARNING: peer %d rejected the message of peer %d in round %d: it is not finite, or far larger than "
                           "its own (guard.bound); later ones are counted in the record", receiver, sender, t + 1)
            run.distrusted.add(sender)
    found = sorted({sender - 1 for sender in senders.tolist() if sender})
    return {"rejected_senders": found} if found else {}


def evaluate(run: Run, halted: Callable[[], bool] = lambda: False) -> dict:
    """Every peer's own model where it is hosted, the consensus model by all processes together; lists are of the hosted peers.

    GivenUp, on all processes, once `halted()` on one.
    """
    sums = _agreed(run, lambda: run.evaluator.sums(run.rows(), run.executor, halted))
    merged = _evaluated_by_all(run, run.consensus(), halted) if run.config.eval.consensus else None
    record = run.evaluator.record(sums, merged, run.peers.ids)
    if run.answers:
        add_answers(run, record, halted)
    return summarised(record, run.transport, run.num_there)


def _evaluated_by_all(run: Run, model: Rows, halted: Callable[[], bool]) -> Tensor:
    """The sums (1, ...) of one model that all processes hold: each takes its share of the batches."""
    mine = range(run.transport.rank, len(run.evaluator.batches), run.transport.size)
    table = _agreed(run, lambda: run.evaluator.by_batch(model, run.executor, mine, halted))
    return run.evaluator.total(run.transport.total(table)[None])


def _start_record(run: Run, halted: Callable[[], bool]) -> dict:
    """The evaluation before the first round: all peers' models are equal, so one is evaluated."""
    sums = _evaluated_by_all(run, run.rows().row(0), halted)
    found = run.evaluator.record(sums.expand(len(run.peers.ids), -1), sums, run.peers.ids)
    if run.answers:
        add_first_answers(run, found, halted)
    return {"round": 0, **_hosted(run), "eval": summarised(found, run.transport, run.num_there)}
