"""What the validator found, as one sentence of ours: the field, its value, what is allowed, and the nearest name for an unknown one.

Not for what a type allows (`types`), nor for names of other trainers (`foreign`).
"""

import re
from typing import Any, NamedTuple

from pydantic import ValidationError

from dfl.config.aliases import suggest
from dfl.config.schema import Config, plain, section_of
from dfl.config.types import NOT_ALLOWED

# kinds of errors of the validator's whose words say less than these
_ALLOWED = {"tuple_type": "a list", "model_type": "a mapping of fields", "bool_type": "true or false"}


class _Found(NamedTuple):
    """An error at a dotted field; allowed: what the field may be, None where `said` is the whole sentence."""

    field: str
    value: Any
    allowed: str | None
    said: str = ""


def refusal(error: ValidationError) -> ValueError:
    """Of all that is wrong the first; in a field of several kinds, what is wrong inside the kind that was given, else all kinds."""
    found = [_read(one) for one in error.errors(include_url=False)]
    first = found[0]
    inside = [one for one in found if one.field.startswith((f"{first.field}.", f"{first.field}["))]
    if first.allowed is None or inside:
        return ValueError((inside or found)[0].said or str(wrong(*(inside or found)[0][:3])))
    kinds = dict.fromkeys(one.allowed for one in found if one.field == first.field)
    return wrong(first.field, first.value, ", or ".join(filter(None, kinds)))


def wrong(field: str, value: Any, allowed: str | None) -> ValueError:
    return ValueError(f"{field} = {plain(value)!r} is not allowed; allowed: {allowed}")


def _read(error: Any) -> _Found:
    kind, value = error["type"], error["input"]
    unknown = kind in ("extra_forbidden", "invalid_key")
    field = ""
    section: Any = Config
    for step in error["loc"][:-1] if unknown else error["loc"]:
        if isinstance(step, int):
            field += f"[{step}]"
        elif section is not None and step in section.model_fields:  # else the name of one of the kinds that a field may have
            field = f"{field}.{step}" if field else step
            section = section_of(section.model_fields[step].annotation)
    if unknown:
        key = error["loc"][-1]
        name = f"{field}.{key}" if field else str(key)
        return _Found(name, value, None, f"unknown key {name!r} = {value!r}{suggest(field, key, section.model_fields)}")
    if kind == "value_error":
        return _Found(field, value, None, f"{field} = {value!r}: {error['ctx']['error']}")
    return _Found(field, value, _allowed(error))


def _allowed(error: dict[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == NOT_ALLOWED:
        return context["text"]
    if kind == "literal_error":
        return ", ".join(re.findall("'([^']*)'", context["expected"]))
    if kind in ("too_short", "too_long"):
        return f"a list of {context.get('min_length', context.get('max_length'))}"
    return _ALLOWED.get(kind, error["msg"])
