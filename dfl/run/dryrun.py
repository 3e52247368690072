"""`dfl train --dry-run`: everything that a start would refuse and that needs no weights, the resolved recipe, its data and its memory.

Nothing is written, no callback is executed, and no hub is asked; modules in `plugins` are imported, for the names in them.
"""

from pathlib import Path

import yaml

from dfl import tasks
from dfl.config import Config
from dfl.run import callbacks, workers
from dfl.run.advice import advice
from dfl.run.build import check, data_seed, divide
from dfl.run.folder import look
from dfl.run.preflight import memory_lines, ready
from dfl.run.runtime import Place, check_backend, choose_device, launched, of_team, place_from_environment
from dfl.tasks.models import folder_of, locate
from dfl.tasks.tables import encode_labels
from dfl.transport import hosting


def dry_run(config: Config, *, resume: bool = False, overwrite: bool = False) -> str:
    """The resolved recipe as YAML, with what there is to say about it as comments. ValueError as the start gives it."""
    topology = check(config)
    for reference in config.callbacks:
        callbacks.locate(reference)
    place = planned_place(config)
    hosting(config.peers, place.size)
    device = choose_device(config, place)
    if place.size > 1:
        check_backend(config, device)
    look(config, resume, overwrite)
    missing, parts, data = _elsewhere(config), None, []
    if missing:
        missing.append("what depends on it is not checked here")
        _check_tables(config)
    else:
        examples, parts = ready(config, topology, device, place)
        prepared = examples.prepared
        data = tasks.summary_lines(tasks.summarise(prepared.kind.name, prepared.train, prepared.valid, config.data))
    told = [*_code(config), *advice(config), *missing]
    return "".join([*_comments(told), yaml.safe_dump(config.to_dict(), sort_keys=False),
                    *_comments(data), *_comments(memory_lines(parts, device, place) if parts else [])])


def _comments(lines: list[str]) -> list[str]:
    return [f"# {line}\n" for line in lines]


def planned_place(config: Config) -> Place:
    """As which of how many processes a run would start."""
    number = 1 if launched() else workers.count(config, automatic=True)
    return of_team(place_from_environment() if launched() else Place(0, number, 0, number), config.processes_per_peer)


def _code(config: Config) -> list[str]:
    notes = []
    if config.plugins:
        notes.append(f"plugins = {', '.join(config.plugins)}: this recipe names code, which this dry run has imported and executed "
                     "with your rights, to learn the names in it")
    if config.callbacks:
        notes.append(f"callbacks = {', '.join(config.callbacks)}: this recipe names code, which a run imports and executes with your "
                     "rights; this dry run has looked for it and executed nothing")
    return notes


def _elsewhere(config: Config) -> list[str]:
    """What a run would have to ask a hub for."""
    found = []
    if _data_elsewhere(config):
        found.append(f"data.name = {config.data.name!r} is no folder here: a run takes it from the hub's cache or the network")
    if folder_of(locate(config.model)) is None:
        found.append(f"model.name = {config.model.name!r} is not here: a run asks the hub for it, which needs the network")
    return found


def _data_elsewhere(config: Config) -> bool:
    return config.data.source == "hub" and bool(config.data.name) and not Path(config.data.name).expanduser().exists()


def _check_tables(config: Config) -> None:
    """Of data that are here: the columns, the labels and the partition, without the model's tokenizer."""
    if _data_elsewhere(config):
        return
    kind, names, (train, _), _ = tasks.read_tables(config.model, config.data, data_seed=data_seed(config))
    labels = encode_labels(train, config.data.label, names) if kind.labelled else [0] * len(train)
    divide(config, labels, train.columns, names)
