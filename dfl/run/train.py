"""`dfl train`: from a configuration to a run folder with adapters."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dfl.config import Config, from_dict
from dfl.report import closing_table
from dfl.run import workers
from dfl.run.build import Loaded, adapted_for, assemble, check, in_parts, load, together_on
from dfl.run.callbacks import Callback, Callbacks, RunView, load_callbacks, name_of
from dfl.run.checkpoint import Checkpointer, choose
from dfl.run.folder import OwnRecords, Recording, begin, check_shared, continued, describe_data, enter, make_room
from dfl.run.loop import Hooks, Run, run_rounds
from dfl.run.pace import SaveClock
from dfl.run.parent import end_with_launcher
from dfl.run.preflight import memory_lines, ready
from dfl.run.runtime import Runtime, Worker, start
from dfl.run.saving import STOPPED, clock_of, restore, save
from dfl.run.survive import train_on
from dfl.run.watching import own_callbacks
from dfl.store import manifest
from dfl.store.directory import ENDED
from dfl.store.lease import Lease
from dfl.training.together import Together
from dfl.transport.agreement import together
from dfl.transport.handshake import check_contents, check_secret, check_settings, contents, settings
from dfl.transport.stopping import Halt, Stopped, StopSignal


def train(config: Config, *, resume: bool = False, overwrite: bool = False,
          callbacks: Sequence[Callback | type[Callback]] = (),
          spread: bool = False) -> int:
    """Run a configuration to its end (or to a signal); the exit status. Process 0 writes the run folder and prints the table.

    callbacks: beside those that the configuration names; the same on all processes. spread: where the recipe does not say on how many
    processes, take as many as there are cores, as the command does.
    """
    end_with_launcher()
    topology = check(config)
    callbacks = load_callbacks(config.callbacks, callbacks)

    def work(worker: Worker | None) -> int:
        stop = StopSignal()
        try:
            return _train_here(config, worker, topology, resume, overwrite, callbacks, stop)
        finally:
            stop.restore()

    return workers.run(workers.count(config, automatic=spread), work)


def _train_here(config: Config, worker: Worker | None, topology, resume: bool, overwrite: bool, callbacks: Sequence[Callback],
                stop: StopSignal) -> int:
    if config.membership.mode == "survive":
        try:
            return train_on(config, worker, topology, resume, overwrite, stop)
        except Stopped as asked:
            print(f"{asked} before it joined the others; --resume begins, or goes on", file=sys.stderr, flush=True)
            return STOPPED
    runtime = start(config, worker)
    if runtime.team is not None:
        runtime.team.watch(runtime.transport.leave)
    if runtime.team is not None and not runtime.team.speaks:
        return _serve(config, runtime, topology, stop)
    try:
        finished = _train_all(config, runtime, topology, resume, overwrite, callbacks, stop)
    except Stopped as asked:
        _leave(runtime, asked)
        if runtime.place.rank == 0:
            print(f"{asked} before the first round; --resume begins, or goes on", file=sys.stderr, flush=True)
        return STOPPED
    except BaseException as error:
        _leave(runtime, error)
        raise
    status = 0 if finished else STOPPED
    if runtime.team is not None:
        Together.end(runtime.team, status)
        runtime.team.close()
    runtime.transport.close()
    return status


def _leave(runtime: Runtime, error: BaseException) -> None:
    runtime.transport.leave(error)
    if runtime.team is not None:
        runtime.team.leave(error)


def _serve(config: Config, runtime: Runtime, topology, stop: StopSignal) -> int:
    """The run of a process that is not the first of its team: it reads what that one reads, and passes its examples through its part
    of the model. Folder, records, messages and mixing are the first one's."""
    team = runtime.team
    try:
        with stop.at_once():
            loaded = load(config, runtime.device, ready(config, topology, runtime.device, runtime.place)[0])
        in_parts(config, runtime, loaded)
        adapted = adapted_for(config, runtime, loaded, topology)
        status = together_on(config, runtime, loaded, adapted, lambda: stop.received > 0).serve()
    except Stopped as asked:
        team.leave(asked)
        return STOPPED
    except BaseException as error:
        team.leave(error)
        raise
    team.close()
    return status


def _train_all(config: Config, runtime: Runtime, topology, resume: bool, overwrite: bool, callbacks: Sequence[Callback],
               stop: StopSignal) -> bool:
    """The run and its baseline, which has no callbacks. False when a signal came before the end."""
    transport, output = runtime.transport, Path(config.output)
    check_secret(transport)
    transport.watch(lambda: stop.received > 0)
    check_settings(transport, settings(config, resume=resume, overwrite=overwrite) | {"callbacks": list(map(name_of, callbacks))})
    lease, resumed_from = enter(config, output, runtime, resume, overwrite)
    try:
        return _train_held(config, runtime, topology, lease, resumed_from, resume, overwrite, callbacks, stop)
    except BaseException as error:
        transport.leave(error)  # before the folder is free: the others are to hear this, and not that they have lost it
        raise
    finally:
        if transport.rank == 0:
            lease.release()


def _train_held(config: Config, runtime: Runtime, topology, lease: Lease, resumed_from: Path | None, resume: bool, overwrite: bool,
                callbacks: Sequence[Callback], stop: StopSignal) -> bool:
    """The folder is ours."""
    transport, output = runtime.transport, Path(config.output)
    if resumed_from is not None:
        config = together(transport, lambda: continued(config, output))

    def load_here() -> Loaded:
        with stop.at_once():
            examples, parts = ready(config, topology, runtime.device, runtime.place)
            if parts and runtime.place.rank == 0 and resumed_from is None:
                print("\n".join(memory_lines(parts, runtime.device, runtime.place)), file=sys.stderr, flush=True)
            return load(config, runtime.device, examples)

    loaded = together(transport, load_here)
    loaded = together(transport, lambda: _with_contents(loaded, topology))
    check_settings(transport, loaded.contents)
    in_parts(config, runtime, loaded)
    # as late as can be: a start that is refused for its data or its model leaves the run that was there
    together(transport, lambda: make_room(output, resumed_from is None, overwrite, lease) if transport.rank == 0 else None)
    if runtime.place.rank == 0:
        describe_data(config, loaded, say=resumed_from is None)
    finished = own = _train_one(config, runtime, loaded, topology, output, resumed_from, callbacks, lease, stop)
    if finished and config.baseline:
        alone = _baseline(config)
        folder = Path(alone.output)
        before = choose(folder, transport) if resume else None
        together(transport, lambda: make_room(folder, before is None, False, lease) if transport.rank == 0 else None)
        finished = _train_one(alone, runtime, loaded, topology, folder, before, (), lease, stop)
    if runtime.place.rank == 0 and own:  # also where only the baseline was stopped, which the table says
        print(closing_table(output), flush=True)
    return finished


def _with_contents(loaded: Loaded, topology) -> Loaded:
    bundle = loaded.bundle
    return loaded._replace(contents=contents(loaded.adapted.model, bundle.train, bundle.valid, loaded.parts, topology))


def _baseline(config: Config) -> Config:
    """The same run without mixing, in a folder inside the run's: by the method's own slots, not by those that the run fills."""
    own = {"method": config.baseline, "rule": None, "schedule": None, "trigger": "always", "wrapper": "none"}
    tree = config.to_dict()
    tree["eval"]["patience"], tree["checkpoint"]["best"] = None, False
    tree |= own | {"baseline": None, "callbacks": [], "output": f"{config.output}/baseline-{config.baseline}"}
    return from_dict(tree)


def _train_one(config: Config, runtime: Runtime, loaded: Loaded, topology, output: Path, resumed_from: Path | None,
               callbacks: Sequence[Callback], lease: Lease, stop: StopSignal) -> bool:
    first, new = runtime.place.rank == 0, resumed_from is None
    if not new:
        together(runtime.transport, lambda: check_contents(manifest.read(resumed_from).contents, loaded.contents, config, output))
    run = assemble(config, runtime, loaded, topology, resumed_from)
    if not new:
        together(runtime.transport, lambda: restore(run, resumed_from))
    record = together(runtime.transport, lambda: begin(config, run, loaded, output, runtime, new, lease) if first else None)
    check_shared(output, runtime.transport, new, lease)
    if not first:  # process 0 has taken back what an earlier start has recorded
        record = OwnRecords(output, runtime.place.rank, lease)
    saver = Checkpointer(output, runtime.transport, runtime.place.rank, loaded.bundle.base_name, config.checkpoint.keep,
                         loaded.contents, lease)
    if first:
        lease.check()
        (output / ENDED).unlink(missing_ok=True)
    view = RunView(run, output, runtime.place.rank, runtime.place.size)
    watching = Callbacks([*own_callbacks(config, loaded.bundle.base_name), *callbacks], view, runtime.transport)
    clock = clock_of(run)
    try:
        watching.call("on_train_begin")
        finished = run_rounds(run, _hooks(run, saver, record, stop, watching, clock))
        if not finished and watching.asked_by and run.peers.part is None and run.pending is None:
            finished = True
            together(runtime.transport, lambda: _note_end(record, output, run.completed, watching.asked_by, lease) if first else None)
        watching.call("on_train_end")
    finally:
        record.close()
    if first and not finished:
        record.console.say(_stopped(run))
    return finished


def _stopped(run: Run) -> str:
    if not run.began:
        return "stopped before the first round; --resume begins"
    inside = " and in the middle of the next" if run.peers.part else ", before its evaluation" if run.pending is not None else ""
    return f"stopped after round {run.completed}{inside}; the state is saved, --resume goes on"


def _hooks(run: Run, saver: Checkpointer, record: Recording | OwnRecords, stop: StopSignal, watching: Callbacks,
           clock: SaveClock) -> Hooks:
    def record_round(line: dict) -> None:
        record.round(line)
        watching.record(line)

    def save_now() -> None:
        with clock.measured():
            folder = save(run, saver)
        watching.saved(run.completed, folder)

    def halted() -> bool:
        of_team = run.together is not None and run.together.told_to_stop
        return stop.received > 0 or run.transport.told_to_stop or of_team

    return Hooks(record_round, save_now, lambda: watching.control.should_training_stop, clock.due, halted, Halt(halted))


def _note_end(record: Recording, output: Path, rounds: int, callback: str, lease: Lease) -> None:
    """A run that a callback has ended is done, though it has not had all of its rounds."""
    lease.check()
    (output / ENDED).write_text(json.dumps({"round": rounds, "callback": callback}))
    record.console.say(f"ended after round {rounds}, as {callback} asked; the state is saved")
