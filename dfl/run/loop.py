"""THE loop: local steps, exchange, mix, measure, evaluate, record, save."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters.attach import Rows
from dfl.config import Config
from dfl.engine import state as trees
from dfl.engine.gossip import Gossip, Report
from dfl.metrics.evaluator import Evaluator, GivenUp, consensus_rows, summary
from dfl.metrics.layers import diagnose
from dfl.metrics.measures import measure, whole
from dfl.slots import Rule
from dfl.training.executors import Executor
from dfl.training.hosted import DivergenceError, HostedPeers
from dfl.transport.base import SENT, Transport

logger = logging.getLogger(__name__)
# what processes agree on after every local phase, the largest of what each says; _SAVE is process 0's alone to say, by its clock;
# _STOP ends with this round, _HALT in its middle, as one of them has stopped between two steps;
# a diverged peer is _DIVERGED + its id, and the number of peers more when it began the round with factors that were bad already
_GO, _SAVE, _STOP, _HALT, _DIVERGED = 0, 1, 2, 3, 4
_SECONDS = ("local", "encode", "exchange", "mix")
_COLUMNS = ("train_loss", *_SECONDS, *SENT, "message_bytes", "edges", "rejected", "rejected_sender")


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
    gathered: tuple | None = None  # what `gather_models` found, until the models change
    distrusted: set[int] = field(default_factory=set)  # senders of rejected messages that a warning has named

    def __post_init__(self):
        # six times the row: the pair, the pair before and the residual that a rule may send; as much again for what is to come
        self.transport.most = 12 * self.peers.x[0].nbytes + 2**16

    @property
    def rule(self) -> Rule:
        return self.gossip.method.rule

    def rows(self) -> Rows:
        """What the model reads of the hosted peers now."""
        return self.peers.rows(self.gossip.residuals())

    def consensus(self, x: Tensor, kept: Tensor | None) -> Rows:
        """The consensus model of the rows x (N, D) of all peers, scaled alike, and their residuals."""
        return consensus_rows(self.peers.adapted, x, kept, self.rule.product, self.rule.residual)


class Pending(NamedTuple):
    """A round before its evaluation. table: `_table` of the hosted peers; found: measures, on process 0."""

    table: Tensor
    found: dict
    measure_seconds: float


class Hooks(NamedTuple):
    """What happens beside the mathematics: `record` is called on every process, with None where it is not process 0."""

    record: Callable[[dict | None], None]
    save: Callable[[], None]
    stop_requested: Callable[[], bool]  # with the end of a round; asked at its begin
    save_due: Callable[[], bool] = lambda: False  # a checkpoint by time; asked in every round, on process 0 alone
    halted: Callable[[], bool] = lambda: False  # as soon as possible: evaluations are given up
    halt: Callable[[int], bool] | None = None  # the same between two steps, of which so many are left


def run_rounds(run: Run, hooks: Hooks) -> bool:
    """Run to the last round, from wherever the run is. False when stopped early, as all processes agreed; the state is saved then.

    A stop comes at the end of a round, between two steps of its local phase, or between two batches of its evaluation.
    On divergence the peers go back to the last state known to be good, which is saved, and DivergenceError is raised everywhere.
    """
    config, begun = run.config, []
    if not run.resumed:
        try:
            hooks.record(_agreed(run, lambda: _start_record(run, hooks.halted)))
        except GivenUp:
            return False
    run.began = True
    while run.completed < config.train.rounds or run.pending is not None:
        flag = _GO
        if run.pending is None:
            t = run.transport.round = run.completed
            # the start of this round and of the one before it
            begun = [*begun[-1:], (t, run.peers.round_start(), trees.snapshot(run.gossip.state))]
            flag = _round(run, t, hooks, begun)
        if flag == _HALT or not _conclude(run, hooks, flag == _STOP):
            hooks.save()
            return False
        if flag == _STOP and run.completed < config.train.rounds:
            hooks.save()
            return False
        if flag == _SAVE or due(config.checkpoint.every, run.completed - 1) or run.completed == config.train.rounds:
            hooks.save()
    return True


def _round(run: Run, t: int, hooks: Hooks, begun: list[tuple]) -> int:
    """Round t up to its evaluation, or, where it gives _HALT, to a step of its local phase."""
    started = time.perf_counter()
    losses, flag = _local(run, t, hooks)
    local_seconds = time.perf_counter() - started
    if flag >= _DIVERGED:
        at_start, peer = divmod(flag - _DIVERGED, run.config.peers)
        _go_back(run, begun[0] if at_start else begun[-1])
        hooks.save()
        raise DivergenceError(f"peer {peer} diverged in round {t + 1}: its training loss or its factors are not finite; the state "
                              f"after round {run.completed} is saved. A smaller train.lr or train.clip may help", peer)
    if flag != _HALT:
        run.peers.end_phase()
        run.pending = _finish(run, t, losses, local_seconds)
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
        gather_models(run)  # for the checkpoint that follows: its bytes belong to this record, the last one
    record = _round_record(run, t, pending)
    if record is not None:
        record |= pending.found | ({"eval": evaluation} if evaluated else {})
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
    if run.transport.agree(given_up):
        raise GivenUp
    return found


def _go_back(run: Run, begun: tuple) -> None:
    run.completed, snapshot, run.gossip.state = begun
    run.peers.restore(snapshot)
    run.gathered = None


def due(every: int, t: int) -> bool:
    return bool(every) and (t + 1) % every == 0


def _local(run: Run, t: int, hooks: Hooks) -> tuple[Tensor | None, int]:
    """The local phase; the mean losses (P,) and what all processes agreed to do."""
    stop, losses = hooks.stop_requested(), None
    run.gathered = None
    try:
        halt = {}
        if hooks.halt:
            hooks.halt.begin()
            halt = {"halt": hooks.halt}
        losses = run.peers.local_phase(t, run.gossip.plans(t), run.task, run.split, run.executor, run.gossip.corrections(),
                                       run.gossip.residuals(), after_step=run.gossip.after_step(t, **_told(run, t)), **halt)
        save = run.transport.rank == 0 and hooks.save_due()
        flag = _HALT if losses is None else _STOP if stop or hooks.halted() else _SAVE if save else _GO
    except DivergenceError as error:
        flag = _DIVERGED + error.peer + run.config.peers * error.at_start
    return losses, run.transport.agree(flag)


def _finish(run: Run, t: int, losses: Tensor, local_seconds: float) -> "Pending":
    """Exchange, mix and measure round t: all of its record but the evaluation."""
    w, config = run.topology.matrix(t), run.config
    look = Look(due(config.measure.every, t), due(config.measure.layers, t))
    before = look.before(run)
    traffic = _exchange(run, t)
    started = time.perf_counter()
    found = look.after(run, before, w)
    return Pending(_table(run, losses, local_seconds, traffic), found, time.perf_counter() - started)


def _exchange(run: Run, t: int) -> Report:
    """Exchange and mix; the optimiser follows where mixing turns the basis of the factors."""
    peers = run.peers
    frames = peers.x.clone() if run.rule.changes_basis and peers.turns_moments else None
    traffic = run.gossip.round(t, peers.x, **_told(run, t))
    run.gathered = None
    if run.rule.changes_basis:
        peers.after_refactor(frames, traffic.mixed)
    return traffic


def _told(run: Run, t: int) -> dict[str, object]:
    """What the slots are told of round t: rates in its middle, the same on all processes, not zero in a warm-up."""
    peers, middle = run.peers, (t + 0.5) / run.config.train.rounds
    return {"lr": peers.learning_rate(middle), "rates": peers.rates(middle),
            "local_steps": [peers.steps(row) for row in range(len(peers.ids))]}


class Look(NamedTuple):
    """What is measured of a round: the whole, and layer by layer."""

    whole: bool
    layers: bool

    def before(self, run: Run) -> tuple[Tensor, Tensor | None] | None:
        return (run.peers.common_scale(), run.gossip.residuals()) if self.whole or self.layers else None

    def after(self, run: Run, before: tuple[Tensor, Tensor | None] | None, w) -> dict:
        """Measures of all peers on process 0; nothing elsewhere."""
        if before is None:
            return {}
        x_before, kept_before = (None if rows is None else run.transport.gather(rows) for rows in before)
        after = gather_models(run)
        if after is None:
            return {}
        adapted, residual, (x_after, kept_after) = run.peers.adapted, run.rule.residual, after
        # cores are read as the factors that they make
        x_before, x_after = adapted.factors(x_before), adapted.factors(x_after)
        factors = (x_before, x_after, w, adapted.lora)
        models = (whole(x_before, adapted.lora, kept_before, residual)[0], *whole(x_after, adapted.lora, kept_after, residual))
        found = {}
        if self.whole:
            found["measures"] = measure(*factors, models)
        if self.layers:
            found["layers"] = diagnose(*factors, models)
        return found


def _round_record(run: Run, t: int, pending: Pending) -> dict | None:
    """Numbers of all processes on process 0; None elsewhere. Seconds are those of the slowest process, bytes those sent by all since
    the record before."""
    state_names = _state_names(run)
    pending.table[0, 5:5 + len(SENT)] = torch.tensor(run.transport.newly_sent(), dtype=torch.float64)
    table = run.transport.gather(pending.table)
    if table is None:
        return None
    column = dict(zip(_COLUMNS, table.T, strict=False))
    now = t / run.config.train.rounds
    lr, rates = run.peers.learning_rate(now), run.peers.rates(now)
    return {"round": t + 1, "trains": "+".join(sorted(run.gossip.plans(t)[0].trains)), "lr": lr,
            **({"rates": rates} if set(rates.values()) != {lr} else {}),
            "train_loss": summary(column["train_loss"].tolist()), "train_loss_peers": column["train_loss"].tolist(),
            **{name: int(column[name].sum()) for name in ("edges", "message_bytes", *SENT)},
            **_rejections(run, t, column), "seconds": {name: float(column[name].max()) for name in _SECONDS},
            # what a rule measures itself, mean over peers (the truncation error of DeCAF)
            **dict(zip(state_names, table[:, len(_COLUMNS):].mean(0).tolist(), strict=True))}


def _state_names(run: Run) -> list[str]:
    return [name for name, value in run.gossip.state["rule"][str(run.peers.ids[0])].items() if value.dim() == 0]


def _table(run: Run, losses: Tensor, local_seconds: float, traffic: Report) -> Tensor:
    """By hosted peer, the columns _COLUMNS and what its rule measures itself; what is of the process stands at its first peer. The
    bytes sent are known after the evaluation."""
    state_names = _state_names(run)
    table = torch.zeros(len(run.peers.ids), len(_COLUMNS) + len(state_names), dtype=torch.float64)
    table[:, 0] = losses.cpu()
    table[:, 1:5] = torch.tensor([local_seconds, traffic.encode_s, traffic.exchange_s, traffic.mix_s], dtype=torch.float64)
    table[0, 8:10] = torch.tensor([traffic.message_bytes, traffic.messages])
    for receiver, sender in reversed(traffic.rejected):
        row = run.peers.ids.index(receiver)
        table[row, 10] += 1
        table[row, 11] = sender + 1  # the first of them; zero: none
    states = [run.gossip.state["rule"][str(peer)] for peer in run.peers.ids]
    for column, name in enumerate(state_names, len(_COLUMNS)):
        table[:, column] = torch.stack([state[name] for state in states]).cpu()
    return table


def _rejections(run: Run, t: int, column: dict[str, Tensor]) -> dict[str, object]:
    """How many messages were rejected, and whose: the first sender at each receiver. A warning names a sender once."""
    senders = sorted({int(sender) - 1 for sender in column["rejected_sender"].tolist() if sender})
    for sender in senders:
        if sender not in run.distrusted:
            receiver = column["rejected_sender"].tolist().index(sender + 1)
            logger.warning("dfl: WARNING: peer %d rejected the message of peer %d in round %d: it is not finite, or far larger than "
                           "its own (guard.bound); later ones are counted in the record", receiver, sender, t + 1)
    run.distrusted |= set(senders)
    return {"rejected": int(column["rejected"].sum()), **({"rejected_senders": senders} if senders else {})}


def evaluate(run: Run, halted: Callable[[], bool] = lambda: False) -> dict | None:
    """Every peer's own model where it is hosted, the consensus model on process 0; the results there, None elsewhere.

    GivenUp, on all processes, once `halted()` on one.
    """
    sums = run.transport.gather(_agreed(run, lambda: run.evaluator.sums(run.rows(), run.executor, halted)))
    gathered = gather_models(run) if run.config.eval.consensus else None
    merged = _agreed(run, lambda: gathered and run.evaluator.sums(run.consensus(*gathered), run.executor, halted))
    if sums is None:
        return None
    return run.evaluator.record(sums, merged)


def gather_models(run: Run) -> tuple[Tensor, Tensor | None] | None:
    """The rows of all peers, scaled alike, and the residuals beside them on process 0; None elsewhere.

    They travel once, for measures, evaluation and checkpoint of the same models.
    """
    if run.gathered is None:
        kept = run.gossip.residuals()
        x = run.transport.gather(run.peers.common_scale())
        kept = None if kept is None else run.transport.gather(kept)
        run.gathered = (None if x is None else (x, kept),)
    return run.gathered[0]


def _start_record(run: Run, halted: Callable[[], bool]) -> dict | None:
    """The evaluation before the first round: all peers' models are equal, so one is evaluated."""
    if 0 not in run.peers.ids:
        return None
    sums = run.evaluator.sums(run.rows().row(0), run.executor, halted)
    return {"round": 0, "eval": run.evaluator.record(sums.expand(run.config.peers, -1), sums)}
