"""Users' own hooks in a run, in the manner of transformers' TrainerCallback: they see every round, and may end the run."""

import ast
import copy
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

from dfl.plugins import did_you_mean, lookup


class CallbackError(RuntimeError):
    """A callback raised; the message names it, the event, and where. It is raised on all processes."""


@dataclass
class Control:
    """What a callback may ask for. The run ends with the round after: all processes agree on it before that round is mixed."""

    should_training_stop: bool = False


class RunView:
    """A run as its callbacks see it: to be read. `round`: the rounds that are done."""

    def __init__(self, run, output: Path, process: int, processes: int):
        self._run, self._output, self._place = run, output, (process, processes)
        self._round = run.completed - (run.pending is not None)  # whose record is still to come

    @property
    def config(self):
        return self._run.config

    @property
    def output(self) -> Path:
        return self._output

    @property
    def round(self) -> int:
        return self._round

    @property
    def resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self._run.resumed

    @property
    def process(self) -> int:
        return self._place[0]

    @property
    def processes(self) -> int:
        return self._place[1]

    @property
    def peers(self) -> tuple[int, ...]:
        """The peers of this process."""
        return tuple(self._run.peers.ids)

    @property
    def primary(self) -> str:
        """The name of the metric that the run is about: `evaluation[run.primary]["mean"]` is its mean over the peers."""
        return self._run.evaluator.primary

    def higher_is_better(self, metric: str | None = None) -> bool:
        """Whether more of a metric, or of the primary one, is better. ValueError for one that is not evaluated."""
        ways = self._run.evaluator.better()
        return lookup("metric", ways, metric or self.primary) == "higher"

    @property
    def model(self):
        """The base model with its adapter, through which every peer of this process passes: for forward hooks of your own.

        What a hook draws from torch's generator is seeded for each peer and round, so that a run with it repeats and goes on. It
        is in training mode (`module.training`) while peers train alone. Its factors are not to be changed.
        """
        return self._run.peers.adapted.model

    def row(self, peer: int):
        """A copy of the trained numbers (D,) of a peer of this process, float32. ValueError for another peer."""
        if peer not in self.peers:
            raise ValueError(f"peer = {peer!r} is not of this process; allowed: {', '.join(map(str, self.peers))}")
        return self._run.peers.x[self._run.peers.ids.index(peer)].clone()


class Callback:
    """Override what you need. Every event comes on every process, with the record of the round or its evaluation.

    Means, least and largest values in it are those of all peers; lists by peer are of the peers `hosted` by the process, or
    of all where no `hosted` is in the record.

    A record is a line of metrics.jsonl. Asking for a stop on one process is enough: `control.should_training_stop = True`.
    Peers' factors are not to be changed here: a run would not repeat.
    """

    def on_train_begin(self, run: RunView, control: Control) -> None:
        """Before the first round, or the first after a resumption."""

    def on_round_end(self, run: RunView, control: Control, record: dict) -> None:
        """A round has been trained, mixed and recorded."""

    def on_evaluate(self, run: RunView, control: Control, evaluation: dict) -> None:
        """The models were evaluated: after `on_round_end` of that round, and once before the first round."""

    def on_save(self, run: RunView, control: Control, folder: Path) -> None:
        """A checkpoint is complete in `folder`."""

    def on_train_end(self, run: RunView, control: Control) -> None:
        """After the last round; also where a signal or a callback has ended the run before it."""


class Callbacks:
    """All callbacks of a run on this process. After every event the processes agree on what was asked for, and on errors."""

    def __init__(self, callbacks: Sequence[Callback], view: RunView, transport):
        self.callbacks, self.view, self.transport, self.control = callbacks, view, transport, Control()
        self.asked_by: str | None = None  # the callback that ends the run
        self._new = not view.resumed

    def call(self, event: str, *given) -> None:
        """CallbackError on all processes when one of the callbacks raises on one of them."""
        if not self.callbacks:
            return
        error, failure, asked = None, "", ""
        for callback in self.callbacks:
            try:
                getattr(callback, event)(self.view, self.control, *copy.deepcopy(given))
            except Exception as raised:
                place = f"callback {name_of(callback)} failed in {event} after round {self.view.round}"
                error, failure = raised, f"{place}: {_where(raised)}"
                break
            if self.control.should_training_stop and not asked:
                asked = name_of(callback)
        if self.transport.agree(bool(failure or asked)):  # else nobody has anything to say
            said = [data.decode().partition("\n") for data in self.transport.share(f"{failure}\n{asked}".encode())]
            for text, _, _ in said:
                if text:
                    raise CallbackError(text) from error
            self.asked_by = self.asked_by or next((asked for _, _, asked in said if asked), None)
        self.control.should_training_stop = self.asked_by is not None

    def saved(self, rounds: int, folder: Path) -> None:
        self.view._round = rounds
        self.call("on_save", folder)

    def record(self, record: dict) -> None:
        """A round is done, or the evaluation before the first."""
        evaluation = record.get("eval")
        if self._new:
            self._new = False
            self.call("on_evaluate", evaluation)
            return
        self.view._round += 1
        self.call("on_round_end", record)
        config = self.view.config
        every, last = config.eval.every, self.view.round == config.train.rounds
        if last or (every and self.view.round % every == 0):
            self.call("on_evaluate", evaluation)


def name_of(callback) -> str:
    cls = callback if isinstance(callback, type) else type(callback)
    return f"{cls.__module__}:{cls.__qualname__}"


def _where(error: Exception) -> str:
    """The error in a line, with the place in the user's code."""
    ours = ("<frozen", __file__, sys.modules["importlib"].__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def load_callbacks(references: Sequence[str], given: Sequence = ()) -> list[Callback]:
    """A callback for each `package.module:Class`, also of the working directory, and those given as they are or as classes.

    ValueError for what is none.
    """
    loaded = [_make(find(reference), reference) for reference in references]
    for one in given:
        if not (isinstance(one, Callback) or isinstance(one, type) and issubclass(one, Callback)):
            raise ValueError(f"callbacks: {one!r} is no dfl.Callback")
        loaded.append(_make(one, name_of(one)) if isinstance(one, type) else one)
    return loaded


def _split(reference: str) -> tuple[str, str]:
    """Module and class of `package.module:Class`, which may lie in the working directory."""
    module_name, _, class_name = reference.partition(":")
    if not module_name or not class_name.isidentifier():
        raise ValueError(f"callbacks = {reference!r} names no class; allowed: package.module:Class")
    if os.getcwd() not in sys.path:  # as `python -m dfl` has it, the command `dfl` has not
        sys.path.insert(0, os.getcwd())
    return module_name, class_name


def locate(reference: str) -> Path | None:
    """The file that `package.module:Class` names, which is looked into but not executed; None where it is no Python source.

    ValueError, in the words of `find`, for a module that is not there or does not define the class.
    """
    module_name, class_name = _split(reference)
    spec, where = None, None
    for depth in range(len(parts := module_name.split("."))):
        spec = PathFinder.find_spec(name := ".".join(parts[:depth + 1]), where)
        if spec is None:
            if name in sys.builtin_module_names:
                return None
            raise ValueError(f"callbacks = {reference!r}: the module cannot be imported: ModuleNotFoundError: No module named "
                             f"{name!r}")
        where = spec.submodule_search_locations
    if spec.origin is None or not spec.origin.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError, ValueError) as error:
        raise ValueError(f"callbacks = {reference!r}: the module cannot be imported: {_where(error)}") from error
    names = _defined(tree)
    if names is not None and class_name not in names:
        raise ValueError(f"callbacks = {reference!r}: the module has no {class_name!r}{did_you_mean(class_name, names)}")
    return Path(spec.origin)


def _defined(tree: ast.Module) -> set[str] | None:
    """The names that a module may have; None where they cannot be told without running it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return None if names & {"*", "__getattr__", "globals"} else names


def find(reference: str) -> type:
    """The class that `package.module:Class` names. ValueError where there is none."""
    module_name, class_name = _split(reference)
    try:
        module = import_module(module_name)
    except Exception as error:  # whatever somebody's module does when it is read
        raise ValueError(f"callbacks = {reference!r}: the module cannot be imported: {_where(error)}") from error
    cls = getattr(module, class_name, None)
    if cls is None:
        raise ValueError(f"callbacks = {reference!r}: the module has no {class_name!r}{did_you_mean(class_name, vars(module))}")
    if not (isinstance(cls, type) and issubclass(cls, Callback)):
        raise ValueError(f"callbacks = {reference!r} is no subclass of dfl.Callback")
    return cls


def _make(cls: type, reference: str) -> Callback:
    try:
        return cls()
    except Exception as error:
        raise ValueError(f"callbacks = {reference!r} cannot be made without arguments: {_where(error)}") from error
