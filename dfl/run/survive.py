"""`membership: survive`: a run that goes on without the processes that it loses, and takes them back.

Every process keeps a folder of its own, RUN/process-K, which is that of a run with the peers that it hosts: nothing is shared but
messages, and nobody is special. Whoever is lost is absent from W(t, alive) of the round at work, which all others begin again, so that
a round has the same living at all of them; who is living is recorded with each round. `dfl collect` joins the folders, `dfl replay`
runs such a record.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfl.config import Config, from_dict
from dfl.engine.living import Living, forget
from dfl.run.build import Loaded, assemble, load
from dfl.run.checkpoint import Checkpointer
from dfl.run.folder import Recording, begin, describe_data, enter, make_room
from dfl.run.joining import join, keep_book, kept_book, make
from dfl.run.loop import Hooks, Run, go_back, run_rounds
from dfl.run.preflight import ready
from dfl.run.runtime import Place, Runtime, Worker, choose_device, num_threads, place_from_environment
from dfl.run.saving import STOPPED, clock_of, restore, save
from dfl.run.told import Plan, Told, came_before, next_turn, plan_of, read
from dfl.store import manifest
from dfl.store.checkpoints import complete, folder_of, rounds_of
from dfl.store.lease import Lease
from dfl.store.records import JsonLines
from dfl.training.base import DivergenceError
from dfl.transport import InProcess, hosting
from dfl.transport.handshake import check_contents, contents, settings
from dfl.transport.mail import Address
from dfl.transport.members import FaultError, FinishedError, LeftOutError, ViewChange
from dfl.transport.packet import Packet
from dfl.transport.stopping import ECHO_SECONDS, StopSignal
from dfl.transport.survivors import Survivors

HAND_OVER = "state for who comes"
# between two looks at whether this process is told to stop as well
LOOK_SECONDS = 0.01


class Left(BaseException):
    """This process was told to stop: it leaves, and the others go on."""


class AllStop(BaseException):
    """All processes were told to stop."""


def folder_of_process(output: str | Path, process: int) -> Path:
    return Path(output) / f"process-{process}"


def train_on(config: Config, worker: Worker | None, topology, resume: bool, overwrite: bool, stop: StopSignal) -> int:
    """A process of such a run, to its end; the exit status."""
    place = Place(worker.rank, worker.size, worker.rank, worker.size) if worker else place_from_environment()
    hosted = hosting(config.peers, place.size)[place.rank]
    device = choose_device(config.model_copy(update={"device": "cpu"}), place)
    torch.set_num_threads(num_threads(config))
    alone = Runtime(Place(), device, InProcess(), hosted)  # for its folder
    own = from_dict(config.to_dict() | {"output": str(folder_of_process(config.output, place.rank))})
    Path(config.output).mkdir(parents=True, exist_ok=True)
    lease, _ = enter(own, Path(own.output), alone, resume, overwrite)
    try:
        process = Process(own, alone, place, worker, topology, lease, stop)
        return process.work(resume, overwrite)
    finally:
        lease.release()


class Process:
    """One process of the run, its folder, and the loop around the loop: train, settle, go back, train."""

    def __init__(self, config: Config, alone: Runtime, place: Place, worker: Worker | None, topology, lease: Lease, stop: StopSignal):
        self.config, self.alone, self.place, self.worker, self.lease, self.stop = config, alone, place, worker, lease, stop
        self.output, self.living = Path(config.output), Living(topology)
        self.came: dict[str, Any] | None = None  # how this process came into a run at work, for all records
        self.coming: dict[str, dict[str, Any]] = {}  # by peer, the same of all that came in the round at work
        self.record: Recording | None = None
        self._again = True  # it has to be settled who is there

    def work(self, resume: bool, overwrite: bool) -> int:
        config, stop = self.config, self.stop
        with stop.at_once():
            loaded = load(config, self.alone.device, ready(config, self.living.topology, self.alone.device, self.place)[0])
        bundle, topology = loaded.bundle, self.living.topology
        loaded = loaded._replace(contents=contents(loaded.adapted.model, bundle.train, bundle.valid, loaded.parts, topology))
        make_room(self.output, not (resume and complete(self.output)), overwrite, self.lease)
        describe_data(config, loaded, say=self.place.rank == 0)
        known: list[Address] = kept_book(self.output) if resume else []
        about = {name: value for name, value in settings(config).items() if not name.startswith("membership.")} | dict(loaded.contents)
        self.transport, self.mail, seeds = make(config, self.place, self.worker, about, known)
        try:
            self._assemble(loaded)
            with stop.at_once():
                join(self.mail, self.transport, self.place, self.worker, seeds, config)
            done = self._rounds()
        except BaseException as error:
            self.transport.leave(error)
            raise
        finally:
            if self.record is not None:
                self.record.close()
        return 0 if done else STOPPED

    def _assemble(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.run: Run = assemble(self.config, self._runtime(), loaded, self.living)
        self.run.survives = True
        self.saver = Checkpointer(self.output, InProcess(), 0, loaded.bundle.base_name, self.config.checkpoint.keep, loaded.contents,
                                  self.lease, self.config.peers)
        self.clock = clock_of(self.run)
        self.hooks = Hooks(self._record, self._save, lambda: False, self.clock.due, self._halted, _Halt(self.transport))

    def _rounds(self) -> bool:
        """To the end of the run; False when stopped."""
        joined = False
        while True:
            try:
                if self._again:
                    self._settle(self._progress() if joined else None)
                    joined = True
                    if self.run.completed:  # who comes and goes now finds all at the same round
                        self._save()
                self._again = False
                run_rounds(self.run, self.hooks)
                self.transport.group.ending = True
                self.transport.agree(0, most=0)  # all have come to the end
                return self._ended()
            except FinishedError:
                return self._ended()
            except DivergenceError:
                self._save(alone=True)
                raise
            except AllStop:
                return self._stopped("all processes", alone=False)
            except Left:
                return self._stopped("this process")
            except ViewChange:
                pass
            except FaultError as fault:
                self.transport.accuse(fault)
            self._again = True
            if self.stop.received and joined:
                self._go_back(self._progress())
                return self._stopped("this process")

    def _ended(self) -> bool:
        self.transport.close()
        return True

    def _stopped(self, who: str, alone: bool = True) -> bool:
        try:
            self._save(alone)
        except (ViewChange, FaultError):  # others leave at the same time
            self._save(True)
        self.record.console.say(f"{who} stopped after round {self.run.completed}; the state is saved, --resume goes on")
        self.transport.leave(ConnectionAbortedError("stopped by a signal"))
        return False

    def _progress(self) -> int:
        """The rounds that this process has concluded."""
        return self.run.completed - (self.run.pending is not None)

    def _settle(self, progress: int | None) -> None:
        """Agree on the members and on the round that all begin with, and give those that come what they need."""
        saved = [rounds_of(folder) for folder in complete(self.output)] if progress is None else []
        checkpoints = [rounds for rounds in saved if rounds <= self.config.train.rounds]
        changes = [] if progress is None else self.living.changes
        infos = self.transport.settle({"progress": progress, "checkpoints": checkpoints, "came": self.came, "changes": changes})
        told = read(infos, dict(enumerate(self.transport.hosts)), self.config.train.rounds)
        plan = plan_of(told, self.place.rank)
        if plan.round < self.config.train.rounds:  # else others may have left already with the word that all have ended
            self.transport.group.ending = False
        before = came_before(plan, told)
        if progress is None and not plan.start:  # what it has missed
            for t, alive in next(one.changes for one in told.values() if one.progress is not None):
                self.living.change(t, alive)
        self.living.change(plan.round, self.transport.alive)
        self.run.gossip.graph_changed()
        self.run.num_there = len(self.transport.alive)
        if progress is None:
            self._come(plan, before, checkpoints)
        else:
            self._go_back(plan.round)
        self._note_who_came(plan, told, before)
        if plan.coming:
            self._hand_over(plan)
        came = {int(peer) for peer in self.coming}
        self.run.gossip.state = forget(self.run.gossip.state, came)
        self.run.resumed = plan.round > 0
        if self.record is None:
            self.record = begin(self.config, self.run, self.loaded, self.output, self._runtime(), plan.round == 0, self.lease,
                                quiet=self.transport.rank > 0)
        self._rewind(plan.round)
        self.run.transport.round = plan.round
        keep_book(self.output, self.mail.book)
        self.record.console.quiet = self.transport.rank > 0
        self.record.console.say(self._said(plan))

    def _runtime(self) -> Runtime:
        return Runtime(self.place, self.alone.device, self.transport, self.alone.hosted)

    def _said(self, plan: Plan) -> str:
        there = ", ".join(map(str, self.transport.alive))
        coming = f"; {', '.join(self.coming)} came" if self.coming else ""
        return f"from round {plan.round + 1} on with peers {there}{coming}"

    def _come(self, plan: Plan, before: Mapping[int, Mapping[str, Any]], checkpoints: list[int]) -> None:
        """The state of a process that begins, goes on, or comes back."""
        if self.place.rank in plan.coming:
            self.came = self._way(plan, self.place.rank, checkpoints, next_turn(before))
            if self.came["from"] == "checkpoint":
                self._restore(self.came["of"])
        elif plan.round:
            self._restore(plan.round)
        self.run.completed, self.run.pending, self.run.merged = plan.round, None, None

    def _restore(self, rounds: int) -> None:
        folder = folder_of(self.output, rounds)
        restore(self.run, folder)
        check_contents(manifest.read(folder).contents, self.loaded.contents, self.config, self.output)
        self.run.peers.give_up_phase()

    def _takes_rows(self) -> bool:
        """Whether a peer can begin with a mean of others' rows."""
        peers = self.run.peers
        return self.run.rule.residual is None and peers.adapted.ranks.unequal is None and peers.scale is None

    def _go_back(self, t: int) -> None:
        """To the start of round t, which this process has concluded or is at work on."""
        run = self.run
        run.peers.give_up_phase()
        kept = next((begun for begun in run.begun if begun[0] == t), None)
        if kept is not None:
            go_back(run, kept)
            run.pending, run.begun = None, [begun for begun in run.begun if begun[0] < t]
        if run.completed != t:
            raise LeftOutError(f"the others go back to round {t}, which this process has left behind; started again, it comes back")
        assert run.pending is None
        run.merged = None

    def _note_who_came(self, plan: Plan, told: Mapping[int, Told], before: Mapping[int, dict[str, Any]]) -> None:
        """Of all peers that come in this round, how: what the records say, and what a replay does."""
        self.coming = {}
        for process, one in told.items():
            if process in plan.coming or process in before:
                way = before[process] if process in before else self._way(plan, process, one.checkpoints, next_turn(before))
                for peer in self.transport.hosts[process]:
                    self.coming[str(peer)] = {**way, "of": way["of"][str(peer)]} if way["from"] == "neighbours" else way

    def _way(self, plan: Plan, process: int, checkpoints: Sequence[int], turn: int) -> dict[str, Any]:
        """How a process comes into round plan.round: with its own last checkpoint where that is of this round, or where others' rows
        do not fit; else with the mean of its neighbours' rows. The same at all processes.

        A checkpoint counts where the run had these peers in the round before it: else the others went another way from there.
        turn: after all that came in this round before, and may have taken the row that this one had until then.
        """
        peers, t = list(self.transport.hosts[process]), plan.round
        held = [c for c in checkpoints if c <= t and (plan.start or c == 0 or set(peers) <= set(self.living.alive(c - 1)))]
        if t in held or not self._takes_rows() and held:
            return {"round": t, "turn": turn, "from": "checkpoint", "of": max(held)}
        if not self._takes_rows():
            raise FaultError(process, "has no checkpoint, and others' rows do not fit: ranks or residuals are each peer's own")
        coming = [peer for other in plan.coming for peer in self.transport.hosts[other]]
        rows = {str(peer): neighbours_of(self.living, t, peer, coming) for peer in peers}
        of = {peer: {str(j): w for j, w in row.items()} for peer, row in rows.items()}
        return {"round": t, "turn": turn, "from": "neighbours", "of": of}

    def _hand_over(self, plan: Plan) -> None:
        """The rows that peers which come begin with."""
        t, hosts = plan.round, self.transport.hosts
        ways = {peer: self.coming[str(peer)] for process in plan.coming for peer in hosts[process]}
        wanted = {peer: {int(j): weight for j, weight in way["of"].items()} for peer, way in ways.items()
                  if way["from"] == "neighbours"}
        mine, x = self.run.peers.ids, self.run.peers.common_scale()
        due = {j: sorted(peer for peer, row in wanted.items() if j in row) for j in mine}
        packets = {j: Packet({"x": x[k].clone().view(torch.uint8)}, {"x": x.shape[1]}, {}) for k, j in enumerate(mine) if due[j]}
        due = {j: peers for j, peers in due.items() if peers}
        expected = {peer: sorted(wanted[peer]) for peer in mine if peer in wanted}
        self.transport.round = t
        arrived = self.transport.exchange(t, packets, due, due, expected, HAND_OVER)
        for peer in expected:
            rows = {j: arrived[peer][j].payload["x"].view(torch.float32) for j in wanted[peer]}
            begin_at(self.run, peer, mean_of(rows, wanted[peer]))

    def _rewind(self, t: int) -> None:
        """The record without the rounds that are run again."""
        lines = self.record.lines
        lines.close()
        self.record.lines = JsonLines(self.output / "metrics.jsonl", keep_before=t + 1 if t else 0, guard=self.lease.check)

    def _record(self, line: dict) -> None:
        """One round is done here: told to stop, it is the place to leave."""
        came = {"came": self.coming} if self.coming and line["round"] else {}
        self.record.round(line | {"hosted": self.run.peers.ids, "alive": self.transport.alive} | came)
        if not line["round"]:
            return
        self.coming = {}
        if self.transport.agree(int(self.stop.received > 0), most=1):
            self._leave_or_stop()

    def _leave_or_stop(self) -> None:
        """Somebody was told to stop. What comes soon after that is the same wish: those who are told one after the other stop
        together, at this round."""
        until = time.monotonic() + ECHO_SECONDS
        while not self.stop.received and time.monotonic() < until:
            self.transport.check()
            time.sleep(LOOK_SECONDS)
        if not self.transport.agree(int(not self.stop.received), most=1):
            raise AllStop
        if self.stop.received:
            raise Left

    def _halted(self) -> bool:
        self.transport.check()
        return False

    def _save(self, alone: bool = False) -> None:
        with self.clock.measured():
            save(self.run, self.saver, alone)


class _Halt:
    """Between two local steps: the round is begun again as soon as the members have changed."""

    def __init__(self, transport: Survivors):
        self.transport = transport

    def begin(self) -> None:
        pass

    def __call__(self, steps_left: int) -> bool:
        self.transport.check()
        return False


def neighbours_of(living: Living, t: int, peer: int, coming: list[int]) -> dict[int, float]:
    """From whom a peer that comes in round t takes its row, with weights: its neighbours that do not come themselves, else the first
    of all that are there."""
    row = {j: weight for j, weight in living.neighbors(t, peer).items() if j != peer and j not in coming and weight > 0}
    if row:
        return row
    there = [j for j in living.alive(t) if j not in coming]
    return {there[0]: 1.0} if there else {}


def mean_of(rows: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """sum_j w_j x_j / sum_j w_j (D,), in ascending ids, in float64."""
    total = sum(weights[j] for j in sorted(rows))
    return torch.stack([weights[j] / total * rows[j].double() for j in sorted(rows)]).sum(0).float()


def begin_at(run: Run, peer: int, row: Tensor) -> None:
    """A peer begins anew with this row (D,): nothing else is known of it."""
    run.peers.x[run.peers.ids.index(peer)] = row
    run.gossip.state["rule"][str(peer)] = run.gossip.method.rule.init(row)
