"""What a table of plug-ins holds, and how parameters are checked before a factory is called."""

from __future__ import annotations

import inspect
import numbers
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Keyword arguments that ``build`` hands to the factories that take them; everything else is the user's.
FROM_BUILD = ("seed", "rule", "build", "static_graph", "allow_disconnected")


class Entry(NamedTuple):
    """A factory, one line about it, and parameters that make a good example (drawings, comparisons, tests)."""

    factory: Callable
    about: str
    example: Mapping[str, Any] = {}
    example_peers: int = 16


def parameters(factory: Callable) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters that a user gives; the rest comes from ``build``."""
    found = inspect.signature(factory).parameters.values()
    return {p.name: p for p in found if p.kind is p.KEYWORD_ONLY and p.name not in FROM_BUILD}


def takes(factory: Callable, name: str) -> bool:
    return name in inspect.signature(factory).parameters


def call(name: str, factory: Callable, num_peers: int, given: Mapping, **from_build):
    """factory(num_peers, **given) with what it takes of ``from_build``; ValueError for a wrong or missing parameter."""
    known = parameters(factory)
    for param in given:
        if param not in known:
            raise ValueError(f"topology {name!r} has no parameter {param!r}; it takes: {', '.join(known) or 'none'}")
        check_kind(f"topology {name!r}", known[param], given[param])
    for param, spec in known.items():
        if spec.default is spec.empty and param not in given:
            raise ValueError(f"topology {name!r} needs the parameter {param!r}")
    return factory(num_peers, **given, **{k: v for k, v in from_build.items() if takes(factory, k)})


# Annotation of a parameter: what a value must be, and how that is called. bool is no number here.
KINDS = {"int": (numbers.Integral, "an integer"), "float": (numbers.Real, "a number"), "str": ((str, os.PathLike), "text")}
KINDS["bool"] = (bool, "true or false")


def check_kind(owner: str, spec: inspect.Parameter, value) -> None:
    """ValueError when a value is not of the kind that the parameter's annotation names; others are let through."""
    kind, _, optional = str(spec.annotation).partition(" | ")
    if kind not in KINDS or (optional == "None" and value is None):
        return
    wanted, called = KINDS[kind]
    if not isinstance(value, wanted) or (kind != "bool" and isinstance(value, bool)):
        raise ValueError(f"{owner}: {spec.name} must be {called}, got {value!r}")


def refuse(name: str, needs: str, got, hint: str = "") -> ValueError:
    """The one shape of a complaint about a topology's parameters."""
    return ValueError(f"topology {name!r} needs {needs}, got {got}" + (f"; {hint}" if hint else ""))
