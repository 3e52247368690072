"""Tables of plug-ins: a plain dictionary from name to factory; a wrong name or parameter becomes a clear error."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any


def first_line(factory: Callable) -> str:
    """The first sentence of a factory's docstring: what `dfl list` prints."""
    return inspect.getdoc(factory).split("\n")[0].strip()


def did_you_mean(name: str, known) -> str:
    close = get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def lookup(field: str, table: Mapping[str, Any], name: str) -> Any:
    """The entry called `name`; ValueError with the field and the list of known names otherwise."""
    if name not in table:
        raise ValueError(f"{field} = {name!r} is not known{did_you_mean(name, table)}; allowed: {', '.join(table)}")
    return table[name]


def parameters(factory: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a factory: what a recipe may set."""
    return {p.name: p for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY}


def check_parameters(kind: str, name: str, factory: Callable, given: Mapping[str, object]) -> None:
    """ValueError if `given` has a name that `factory` does not take, or lacks one without a default."""
    allowed = parameters(factory)
    for key in given:
        if key not in allowed:
            what = ", ".join(allowed) or "nothing beside name"
            raise ValueError(f"{kind}.{key} = {given[key]!r}: {name!r} has no such parameter"
                             f"{did_you_mean(key, allowed)}; allowed: {what}")
    missing = [p.name for p in allowed.values() if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"{kind}.{missing[0]} is missing: {name!r} needs {', '.join(missing)}")
