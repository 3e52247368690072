"""Tables of plug-ins: a plain dictionary from name to factory; a wrong name or parameter becomes a clear error."""

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


def first_line(factory: Callable) -> str:
    """The first sentence of a factory's docstring: what `dfl list` prints."""
    return (inspect.getdoc(factory) or "").split("\n")[0].strip()


def did_you_mean(name: str, known: Iterable[object]) -> str:
    close = get_close_matches(str(name), [str(one) for one in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def lookup(field: str, table: Mapping[str, Any], name: str) -> Any:
    """The entry called `name`; ValueError with the field and the list of known names otherwise."""
    if name not in table:
        raise ValueError(f"{field} = {name!r} is not known{did_you_mean(name, table)}; allowed: {', '.join(table)}")
    return table[name]


def parameters(factory: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a factory: what a recipe may set."""
    return {p.name: p for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY}


def check_parameters(kind: str, name: str, factory: Callable, given: Mapping[str, object], hidden: Collection[str] = ()) -> None:
    """ValueError if `given` has a name that `factory` does not take, or lacks one without a default. hidden: parameters that are not
    the user's."""
    allowed = {key: parameter for key, parameter in parameters(factory).items() if key not in hidden}
    for key in given:
        if key not in allowed:
            what = ", ".join(allowed) or "nothing beside name"
            raise ValueError(f"{kind}.{key} = {given[key]!r}: {name!r} has no such parameter"
                             f"{did_you_mean(key, allowed)}; allowed: {what}")
    missing = [p.name for p in allowed.values() if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(f"{kind}.{missing[0]} is missing: {name!r} needs {', '.join(missing)}")


def check_choice(field: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: {', '.join(allowed)}")


def check_count(field: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: a whole number from {least}")


def check_share(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: a number above 0, up to 1")


def check_fraction(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: a number from 0 up to, not including, 1")


def check_number(field: str, value: object, least: float = 0.0, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most or math.isinf(value):
        upto = "" if math.isinf(most) else f" to {most:g}"
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: a number from {least:g}{upto}")


def check_positive(field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{field} = {value!r} is not allowed; allowed: a number above 0")


def by_peer(field: str, given: Any, peers: int | None, check: Callable[[str, object], None] = check_number) -> Callable[[int], float]:
    """peer -> its number, from one for all or one for each. ValueError for what `check` refuses, and for another number of them."""
    if not isinstance(given, (list, tuple)):
        check(field, given)
        return lambda peer: given
    for value in given:
        check(field, value)
    if peers is not None and len(given) != peers:
        raise ValueError(f"{field} has {len(given)} numbers for {peers} peers; allowed: one number, or one for each peer")
    return lambda peer: given[peer]


def by_link(field: str, given: Any, peers: int | None, least: float = 0.0, most: float = math.inf) -> Callable[[int, int], float]:
    """(sender, receiver) -> the number of a link, from one for all, a matrix [receiver][sender] or a file of one,
    comma-separated. ValueError for what is none, has another size than `peers`, or is out of range."""
    if not isinstance(given, (str, list, tuple)):
        check_number(field, given, least, most)
        return lambda sender, receiver: given
    import numpy as np  # here, as the command line reads this module before it knows what is wanted
    try:
        table = np.loadtxt(given, delimiter=",", ndmin=2) if isinstance(given, str) else np.array(given, dtype=float)
    except (OSError, ValueError) as error:
        raise ValueError(f"{field} = {str(given)[:60]!r} is no matrix of numbers: {error}; allowed: a number, rows of numbers, or a "
                         "file of comma-separated rows") from None
    size = len(table) if peers is None else peers
    if table.shape != (size, size):
        raise ValueError(f"{field} has the shape {table.shape}; allowed: a row and a column for each of {size} peers")
    links = table[~np.eye(size, dtype=bool)]
    if not ((links >= least) & (links <= most) & np.isfinite(links)).all():
        wrong = links[~((links >= least) & (links <= most) & np.isfinite(links))][0]
        check_number(field, float(wrong), least, most)
        raise ValueError(f"{field} has {wrong}; allowed: numbers")
    return lambda sender, receiver: float(table[receiver, sender])
