"""How two configurations differ, field by field: for whoever is refused because of it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dfl.config.schema import plain


class _Missing:
    """In the place of a value that a plug-in was not given."""

    def __repr__(self) -> str:
        return "(not given)"


MISSING = _Missing()


class Difference(NamedTuple):
    """A dotted field with its two values; MISSING where it was not given."""

    field: str
    before: Any
    now: Any


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[Difference]:
    """The fields of two trees (`Config.to_dict`) that differ, in the order of `now`; inside a section only those that do."""
    for key in {**now, **before}:
        old, new = before.get(key, MISSING), now.get(key, MISSING)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{key}.")
        elif plain(old) != plain(new):
            yield Difference(f"{prefix}{key}", plain(old), plain(new))


def described(found: Iterable[Difference]) -> str:
    """`train.lr = 0.5 differs from 0.001, seed = 1 from 0`, for a sentence that says what was begun so."""
    first, *others = found
    return ", ".join([f"{first.field} = {first.now!r} differs from {first.before!r}",
                      *(f"{other.field} = {other.now!r} from {other.before!r}" for other in others)])
