"""The configuration reference, from the schema: `python tests/reference.py` writes dfl/config/README.md anew."""

import inspect
import re
import types
import typing
from pathlib import Path

from dfl import methods, partition
from dfl.adapters import kinds
from dfl.config import aliases, schema
from dfl.config.types import Allowed
from dfl.metrics import METRICS
from dfl.metrics.choice import describe
from dfl.plugins import first_line, parameters

README = Path(__file__).parent.parent / "dfl" / "config" / "README.md"
_BLOCK = re.compile(r"(<!-- fields: .*? -->\n).*?(<!-- end of fields -->)", re.S)
# choices by name, beside the methods
PLUGINS = {**methods.SLOTS, "partition": partition.PARTITIONS, "eval.metrics": METRICS}


def sections() -> list[tuple[str, type]]:
    """The sections of a recipe with their dotted names, in the order in which they stand there; the root first."""
    found: list[tuple[str, type]] = [("", schema.Config)]

    def below(prefix: str, cls: type) -> None:
        for name, field in cls.model_fields.items():
            inner = schema.section_of(field.annotation)
            if inner is not None:
                found.append((prefix + name, inner))
                below(f"{prefix}{name}.", inner)

    below("", schema.Config)
    return found


def kind(annotation) -> str:
    """A type as a recipe's author sees it."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return next((one.text for one in args if isinstance(one, Allowed)), kind(args[0]))
    if origin is typing.Literal:
        return " / ".join(args)
    if origin is tuple:
        return "list of " + re.sub(r"(^|or )a (whole |positive |)number", r"\1\2numbers", kind(args[0])).replace("name,", "names,")
    if origin in (typing.Union, types.UnionType):
        kinds = [kind(one) for one in args]
        return (", or " if any(" or " in one or "," in one for one in kinds) else " or ").join(kinds)
    return "null" if annotation is type(None) else "name, or {name: ..., parameters}" if annotation is schema.Plugin else "section"


def default(value) -> str:
    value = schema.plain(value)
    if isinstance(value, dict):
        return f"`{value['name']}`" if set(value) == {"name"} else "see below"
    return f"`{plain(value)}`"


def names_elsewhere() -> dict[str, str]:
    """What transformers and PEFT call a field, by our dotted name."""
    found: dict[str, list[str]] = {}
    for name, alias in aliases.ALIASES.items():
        found.setdefault(alias.own, []).append(name)
    return {own: ", ".join(f"`{name}`" for name in names) for own, names in found.items()}


def table(prefix: str, cls: type) -> str:
    other, hints = names_elsewhere(), typing.get_type_hints(cls, include_extras=True)
    lines = ["| field | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in cls.model_fields.items():
        name = f"{prefix}.{key}" if prefix else key
        if schema.section_of(field.annotation) is field.annotation:
            continue  # a section: its own table
        meaning = field.description.rstrip(".") + (f"; also called {other[name]}" if name in other else "")
        lines.append(f"| `{name}` | {kind(hints[key])} | {default(field.default)} | {meaning} |")
    return "\n".join(lines)


def reference() -> str:
    parts = []
    for prefix, cls in sections():
        about = f"\n\n{' '.join(inspect.getdoc(cls).split())}" if cls.__doc__ else ""
        parts.append(f"### {f'`{prefix}`' if prefix else 'At the top'}{about}\n\n{table(prefix, cls)}")
    parts.append(f"### Names for `method`\n\n{named_methods()}")
    parts.append(f"### Names for `lora.adapter`\n\n{_table((name, {}, about) for name, about in kinds.describe().items())}")
    parts += [f"### Names for `{field}`\n\n{choices(field)}" for field in PLUGINS]
    return "\n\n".join(parts)


def choices(field: str) -> str:
    """The names that a field takes, each with its parameters and their defaults (none: it has to be given)."""
    about = describe() if field == "eval.metrics" else {name: first_line(factory) for name, factory in PLUGINS[field].items()}
    return _table((name, given(factory), about[name]) for name, factory in PLUGINS[field].items())


def named_methods() -> str:
    """The names that `method` takes: parameters go to the rule or to the schedule, whichever takes them."""
    about, rows = methods.describe(), []
    for name, row in methods.METHODS.items():
        own = given(methods.RULES[row.rule]) | given(methods.SCHEDULES[row.schedule])
        rows.append((f"{name}", own | {key: value for key, value in row.fixed.items() if key in own}, about[name]))
    return _table(rows)


def given(factory) -> dict[str, object]:
    """What a recipe may give, with defaults; what the run knows itself is left out."""
    return {key: p.default for key, p in parameters(factory).items() if key not in methods.OF_THE_RUN | {"seed", "ends"}}


def _table(rows) -> str:
    lines = ["| name | parameters | |", "| --- | --- | --- |"]
    for name, params, about in rows:
        shown = [f"`{key}`" if value is inspect.Parameter.empty else f"`{key}: {plain(value)}`" for key, value in params.items()]
        lines.append(f"| `{name}` | {', '.join(shown)} | {about} |".replace("||", "\\|\\|"))
    return "\n".join(lines)


def plain(value) -> str:
    """A value as YAML has it."""
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


def with_reference(text: str) -> str:
    return _BLOCK.sub(lambda found: f"{found[1]}\n{reference()}\n\n{found[2]}", text)


if __name__ == "__main__":
    README.write_text(with_reference(README.read_text()))
