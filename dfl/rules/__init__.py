"""How to combine what arrives: `build(name, layout, **parameters) -> Rule`."""

from collections.abc import Callable, Mapping

from dfl.factors import Layout
from dfl.plugins import check_parameters, first_line, lookup
from dfl.rules.alternating import adf, rolora, tad
from dfl.rules.base import Round, Rule
from dfl.rules.factors import ffa, local, lora
from dfl.rules.products import decaf

RULES: dict[str, Callable[..., Rule]] = {
    "lora": lora,
    "ffa": ffa,
    "rolora": rolora,
    "adf": adf,
    "tad": tad,
    "decaf": decaf,
    "local": local,
}

__all__ = ["RULES", "Round", "Rule", "build", "check", "describe"]


def check(name: str, params: Mapping[str, object]) -> None:
    """ValueError for an unknown rule or parameter, before anything is loaded."""
    check_parameters("rule", name, lookup("rule.name", RULES, name), params)


def build(name: str, layout: Layout, **params) -> Rule:
    """The rule `name` for rows of `layout`. ValueError names an unknown rule or parameter and what is allowed."""
    check(name, params)
    return RULES[name](layout, **params)


def describe() -> dict[str, str]:
    return {name: first_line(factory) for name, factory in RULES.items()}
