"""What packages outside this one put into the tables of plug-ins, by entry points or by a module that a recipe names.

An entry point in the group dfl.rules, dfl.schedules, dfl.triggers, dfl.codecs, dfl.channels, dfl.networks, dfl.guards,
dfl.wrappers, dfl.topologies, dfl.tasks, dfl.metrics or dfl.adapters has the name that a recipe uses and points to the
factory, of an adapter to its row (CONTRIBUTING.md). `plugins: [module]` in a recipe imports a module, which puts its own
into the tables (`dfl.codecs.CODECS["mine"] = mine`). A rule is a method of its own name as well.
"""

import os
import sys
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dfl.plugins import first_line


def load(modules: Iterable[str] = ()) -> None:
    """Fill the tables. ValueError for an entry point that cannot be loaded or whose name is taken, and for a module that cannot be
    imported."""
    installed()
    for module in modules:
        if os.getcwd() not in sys.path:  # as `python -m dfl` has it, the command `dfl` has not
            sys.path.insert(0, os.getcwd())
        try:
            import_module(module)
        except Exception as error:  # whatever their code does
            raise ValueError(f"plugins = {module!r} cannot be imported: {type(error).__name__}: {error}") from error
    adopt_rules()


@cache
def installed() -> None:
    """Everything that installed packages name; once a process."""
    for group, table in _tables().items():
        for point in entry_points(group=f"dfl.{group}"):
            if point.name in table:
                raise ValueError(f"entry point dfl.{group}: {point.name} = {point.value!r}: the name is taken; allowed: a name "
                                 f"that is not one of {', '.join(table)}")
            table[point.name] = _made(group, point)


def adopt_rules() -> None:
    """Every rule is a method of its own name, under the schedule that it can be mixed under."""
    from dfl.methods import METHODS, Row
    from dfl.rules import RULES
    for name in RULES:
        if name not in METHODS and name != "average":
            METHODS[name] = Row(name)


def _made(group: str, point: EntryPoint) -> Any:
    try:
        found = point.load()
    except Exception as error:  # whatever their code does
        raise ValueError(f"entry point dfl.{group}: {point.name} = {point.value!r} cannot be loaded: {type(error).__name__}: "
                         f"{error}") from error
    if group != "topologies":
        return found
    from topologies.registry import Entry
    return found if isinstance(found, Entry) else Entry(found, first_line(found))


def _tables() -> dict[str, dict[str, Any]]:
    from dfl.adapters.kinds import KINDS
    from dfl.methods import SLOTS
    from dfl.metrics import METRICS
    from dfl.tasks import TASKS
    from topologies.catalogue import TOPOLOGIES
    return {**{f"{slot}s": table for slot, table in SLOTS.items()}, "topologies": TOPOLOGIES, "tasks": TASKS,
            "metrics": METRICS, "adapters": KINDS}
