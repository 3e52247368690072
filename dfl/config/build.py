"""From a tree of plain values to the dataclasses: unknown keys and values of the wrong type are refused."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dfl.config.aliases import suggest
from dfl.config.recipes import number
from dfl.config.schema import Plugin


def build(cls: type, tree: Any, where: str) -> Any:
    if tree is None:
        tree = {}
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where} = {tree!r} must be a mapping of fields")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ValueError(f"unknown key {_join(where, key)!r} = {value!r}{suggest(where, key, hints)}")
        values[key] = _coerce(hints[key], value, _join(where, key))
    return cls(**values)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if hint is Plugin:
        return _plugin(value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _coerce_union(hint, value, where)
    if typing.get_origin(hint) is Literal:
        if value is False and "off" in typing.get_args(hint):  # YAML 1.1 reads off as false
            value = "off"
        if value not in typing.get_args(hint):
            raise wrong(where, value, ", ".join(map(str, typing.get_args(hint))))
        return value
    if typing.get_origin(hint) is tuple:
        return _coerce_tuple(hint, value, where)
    return _coerce_scalar(hint, value, where)


def wrong(where: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{where} = {value!r} is not allowed; allowed: {allowed}")


def _plugin(value: Any, where: str) -> Plugin:
    if isinstance(value, Plugin):
        return value
    if isinstance(value, str):
        return Plugin(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise wrong(where, value, "a name, or a mapping with name and the plug-in's parameters")
    params = {k: (number(v)) for k, v in value.items() if k != "name"}
    return Plugin(value["name"], params)


def _coerce_union(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:
        return None
    structured = [option for option in options if dataclasses.is_dataclass(option) and option is not Plugin]
    if isinstance(value, Mapping) and structured:
        return build(structured[0], value, where)
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _coerce(option, value, where)
            except ValueError as error:
                errors.append(error)
    raise errors[-1]


def _coerce_tuple(hint: Any, value: Any, where: str) -> tuple:
    inner = typing.get_args(hint)
    if inner[-1] is Ellipsis and (isinstance(value, str) or inner[0] is Plugin and isinstance(value, Mapping)):
        value = [value]  # one name, or one choice, is a list of one
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise wrong(where, value, "a list")
    if inner[-1] is not Ellipsis and len(value) != len(inner):
        raise wrong(where, value, f"a list of {len(inner)}")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
    return tuple(_coerce(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float) and isinstance(value, str) and isinstance(number(value), float):
        return _coerce_scalar(hint, number(value), where)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is bool and isinstance(value, bool) or hint in (int, str) and type(value) is hint:
        return value
    if hint is str and type(value) in (int, float):
        return str(value)
    raise wrong(where, value, {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint])
