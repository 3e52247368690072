"""THE loop: local steps, exchange, mix, measure, evaluate, record, save."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dfl.adapters import Rows
from dfl.codecs import Codec
from dfl.config import Config
from dfl.diagnostics import diagnose
from dfl.evaluate import Evaluator, consensus_rows, summary
from dfl.executors import Executor
from dfl.factors import empty_rows
from dfl.gossip import Traffic, digest_of_common, gossip
from dfl.measures import measure, whole
from dfl.peers import DivergenceError, HostedPeers
from dfl.rules.base import Rule, State
from dfl.transport.base import SENT, Transport

logger = logging.getLogger(__name__)
# what processes agree on after every local phase, the largest of what each says; _SAVE is process 0's alone to say, by its clock;
# a diverged peer is _DIVERGED + its id, and the number of peers more when it began the round with factors that were bad already
_GO, _SAVE, _STOP, _DIVERGED = 0, 1, 2, 3
_SECONDS = ("local", "encode", "exchange", "mix")
_COLUMNS = ("train_loss", *_SECONDS, *SENT, "message_bytes", "rejected", "rejected_sender")


@dataclass
class Run:
    """Everything a round touches. `states` is one rule state per hosted peer."""

    config: Config
    peers: HostedPeers
    rule: Rule
    topology: object
    codec: Codec
    transport: Transport
    executor: Executor
    task: object
    split: object
    evaluator: Evaluator
    states: list[State] = field(default_factory=list)
    completed: int = 0
    gathered: tuple | None = None  # what `gather_models` found, until the models change
    distrusted: set[int] = field(default_factory=set)  # senders of rejected messages that a warning has named

    def __post_init__(self):
        self.states = self.states or [self.rule.init(row) for row in self.peers.x]
        # six times the row: the pair, the pair before and the residual that a rule may send; as much again for what is to come
        self.transport.most = 12 * self.peers.x[0].nbytes + 2**16
        self.tag = digest_of_common(self.rule, self.peers.layout, self.peers.x)
        self.show_residuals()

    def residuals(self) -> Tensor | None:
        """The residuals (P, D_E) that the rule keeps for the hosted peers; None for a rule without."""
        if self.rule.residual is None:
            return None
        rows = empty_rows(len(self.states), self.rule.residual.size, device=self.peers.device)
        for row, state in enumerate(self.states):
            rows[row] = state["residual"]
        return rows

    def show_residuals(self) -> None:
        """What the rule keeps becomes part of the models: after every change of rows and `states`."""
        self.gathered = None
        if self.rule.residual is not None:
            self.peers.keep_residuals(self.residuals())

    def consensus(self, x: Tensor, kept: Tensor | None) -> Rows:
        """The consensus model of the rows x (N, D) of all peers, scaled alike, and their residuals."""
        return consensus_rows(self.peers.adapted, x, kept, self.rule.product, self.rule.residual)


class Hooks(NamedTuple):
    """What happens beside the mathematics: `record` is called on every process, with None where it is not process 0."""

    record: Callable[[dict | None], None]
    save: Callable[[], None]
    stop_requested: Callable[[], bool]
    save_due: Callable[[], bool] = lambda: False  # a checkpoint by time; asked in every round, on process 0 alone


def run_rounds(run: Run, hooks: Hooks) -> bool:
    """Run to the last round, from wherever `run.completed` is. False when stopped early by an agreed signal.

    On divergence the peers go back to the last state known to be good, which is saved, and DivergenceError is raised everywhere.
    """
    config, begun = run.config, []
    if run.completed == 0:
        hooks.record(_start_record(run))
    while run.completed < config.train.rounds:
        t = run.transport.round = run.completed
        # the start of this round and of the one before it
        begun = [*begun[-1:], (t, run.peers.snapshot(), list(run.states))]
        started = time.perf_counter()
        losses, flag = _local(run, t, hooks)
        local_seconds = time.perf_counter() - started
        if flag >= _DIVERGED:
            at_start, peer = divmod(flag - _DIVERGED, config.peers)
            _go_back(run, begun[0] if at_start else begun[-1])
            hooks.save()
            raise DivergenceError(f"peer {peer} diverged in round {t + 1}: its training loss or its factors are not finite; the state "
                                  f"after round {run.completed} is saved. A smaller train.lr or train.clip may help", peer)
        hooks.record(_finish(run, t, losses, local_seconds, flag == _STOP))
        run.completed = t + 1
        if flag == _STOP and run.completed < config.train.rounds:
            hooks.save()
            return False
        if flag == _SAVE or due(config.checkpoint.every, t) or run.completed == config.train.rounds:
            hooks.save()
    return True


def _go_back(run: Run, begun: tuple) -> None:
    run.completed, snapshot, states = begun
    run.states[:] = states
    run.peers.restore(snapshot)
    run.show_residuals()


def due(every: int, t: int) -> bool:
    return bool(every) and (t + 1) % every == 0


def _local(run: Run, t: int, hooks: Hooks) -> tuple[Tensor | None, int]:
    """The local phase; the mean losses (P,) and what all processes agreed to do."""
    stop, losses = hooks.stop_requested(), None
    run.gathered = None
    corrections = [run.rule.correct(state) for state in run.states]
    try:
        losses = run.peers.local_phase(t, run.rule.trains(t), run.task, run.split, run.executor, corrections, run.rule.masks)
        flag = _STOP if stop else _SAVE if run.transport.rank == 0 and hooks.save_due() else _GO
    except DivergenceError as error:
        flag = _DIVERGED + error.peer + run.config.peers * error.at_start
    return losses, run.transport.agree(flag)


def _finish(run: Run, t: int, losses: Tensor, local_seconds: float, stop: bool) -> dict | None:
    """Exchange, mix, measure, evaluate round t; the round's record on process 0."""
    w, config = run.topology.matrix(t), run.config
    last = t + 1 == config.train.rounds
    look = Look(due(config.measure.every, t), due(config.measure.layers, t))
    before = look.before(run)
    traffic = _exchange(run, w, t)
    started = time.perf_counter()
    found = look.after(run, before, w)
    measured_at = time.perf_counter()
    evaluated = due(config.eval.every, t) or last
    evaluation = evaluate(run) if evaluated else None
    evaluated_at = time.perf_counter()
    if last or stop:
        gather_models(run)  # for the checkpoint that follows: its bytes belong to this record, the last one
    record = _round_record(run, t, losses, local_seconds, traffic)
    if record is not None:
        record |= found | ({"eval": evaluation} if evaluated else {})
        record["seconds"] |= {"measure": measured_at - started, "evaluate": evaluated_at - measured_at}
    return record


def _exchange(run: Run, w, t: int) -> Traffic:
    """Exchange and mix; the optimiser follows where mixing turns the basis of the factors."""
    peers = run.peers
    frames = peers.x.clone() if run.rule.changes_basis and peers.turns_moments else None
    now = t / run.config.train.rounds
    traffic = gossip(run.rule, run.codec, run.transport, peers.x, peers.ids, run.states, w, t,
                     lr=peers.learning_rate(now), rates=peers.rates(now), local_steps=peers.steps(0), tag=run.tag, fold=peers.fold,
                     seed=run.config.seed, guard=run.config.guard.norm)
    run.show_residuals()
    if run.rule.changes_basis and traffic.edges:
        peers.after_refactor(frames)
    return traffic


class Look(NamedTuple):
    """What is measured of a round: the whole, and layer by layer."""

    whole: bool
    layers: bool

    def before(self, run: Run) -> tuple[Tensor, Tensor | None] | None:
        return (run.peers.alike(), run.residuals()) if self.whole or self.layers else None

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


def _round_record(run: Run, t, losses, local_seconds, traffic: Traffic) -> dict | None:
    """Numbers of all processes on process 0; None elsewhere. Seconds are those of the slowest process, bytes those sent by all since
    the record before."""
    state_names = [name for name, value in run.states[0].items() if value.dim() == 0]
    table = run.transport.gather(_table(run, losses, local_seconds, traffic, state_names))
    if table is None:
        return None
    column = dict(zip(_COLUMNS, table.T, strict=False))
    now = t / run.config.train.rounds
    lr, rates = run.peers.learning_rate(now), run.peers.rates(now)
    return {"round": t + 1, "trains": "+".join(sorted(run.rule.trains(t))), "lr": lr,
            **({"rates": rates} if set(rates.values()) != {lr} else {}),
            "train_loss": summary(column["train_loss"].tolist()), "train_loss_peers": column["train_loss"].tolist(),
            "edges": traffic.edges, **{name: int(column[name].sum()) for name in ("message_bytes", *SENT)},
            **_rejections(run, t, column), "seconds": {name: float(column[name].max()) for name in _SECONDS},
            # what a rule measures itself, mean over peers (the truncation error of DeCAF)
            **dict(zip(state_names, table[:, len(_COLUMNS):].mean(0).tolist(), strict=True))}


def _table(run: Run, losses: Tensor, local_seconds: float, traffic: Traffic, state_names: list[str]) -> Tensor:
    """By hosted peer, the columns _COLUMNS and what its rule measures itself; what is of the process stands at its first peer."""
    table = torch.zeros(len(run.peers.ids), len(_COLUMNS) + len(state_names), dtype=torch.float64)
    of_process = [*run.transport.newly_sent(), traffic.message_bytes]
    table[:, 0] = losses.cpu()
    table[:, 1:5] = torch.tensor([local_seconds, traffic.encode_s, traffic.exchange_s, traffic.mix_s], dtype=torch.float64)
    table[0, 5:9] = torch.tensor(of_process, dtype=torch.float64)
    for receiver, sender in reversed(traffic.rejected):
        row = run.peers.ids.index(receiver)
        table[row, 9] += 1
        table[row, 10] = sender + 1  # the first of them; zero: none
    for column, name in enumerate(state_names, len(_COLUMNS)):
        table[:, column] = torch.stack([state[name] for state in run.states]).cpu()
    return table


def _rejections(run: Run, t: int, column: dict[str, Tensor]) -> dict[str, object]:
    """How many messages were rejected, and whose: the first sender at each receiver. A warning names a sender once."""
    senders = sorted({int(sender) - 1 for sender in column["rejected_sender"].tolist() if sender})
    for sender in senders:
        if sender not in run.distrusted:
            receiver = column["rejected_sender"].tolist().index(sender + 1)
            logger.warning("dfl: WARNING: peer %d rejected the message of peer %d in round %d: it is not finite, or far larger than "
                           "its own (guard.norm); later ones are counted in the record", receiver, sender, t + 1)
    run.distrusted |= set(senders)
    return {"rejected": int(column["rejected"].sum()), **({"rejected_senders": senders} if senders else {})}


def evaluate(run: Run) -> dict | None:
    """Every peer's own model where it is hosted, the consensus model on process 0; the results there, None elsewhere."""
    sums = run.transport.gather(run.evaluator.sums(run.peers.rows(), run.executor))
    gathered = gather_models(run) if run.config.eval.consensus else None
    if sums is None:
        return None
    consensus = None if gathered is None else run.evaluator.sums(run.consensus(*gathered), run.executor)
    return run.evaluator.record(sums, consensus)


def gather_models(run: Run) -> tuple[Tensor, Tensor | None] | None:
    """The rows of all peers, scaled alike, and the residuals beside them on process 0; None elsewhere.

    They travel once, for measures, evaluation and checkpoint of the same models.
    """
    if run.gathered is None:
        kept = run.residuals()
        x = run.transport.gather(run.peers.alike())
        kept = None if kept is None else run.transport.gather(kept)
        run.gathered = (None if x is None else (x, kept),)
    return run.gathered[0]


def _start_record(run: Run) -> dict | None:
    """The evaluation before the first round: all peers' models are equal, so one is evaluated."""
    if 0 not in run.peers.ids:
        return None
    sums = run.evaluator.sums(run.peers.rows().row(0), run.executor)
    return {"round": 0, "eval": run.evaluator.record(sums.expand(run.config.peers, -1), sums)}
