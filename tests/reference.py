"""The configuration reference, from the schema and its comments: `python tests/reference.py` writes dfl/config/README.md anew."""

import ast
import dataclasses
import inspect
import io
import re
import tokenize
from pathlib import Path

from dfl import methods, partition
from dfl.adapters import kinds
from dfl.config import aliases, schema
from dfl.metrics import METRICS
from dfl.metrics.choice import describe
from dfl.plugins import first_line, parameters

README = Path(__file__).parent.parent / "dfl" / "config" / "README.md"
_BLOCK = re.compile(r"(<!-- fields: .*? -->\n).*?(<!-- end of fields -->)", re.S)
# fields whose comment in the schema is missing, as their names say enough to whoever reads code
SAID = {
    "peers": "participants; any number in one process",
    "seed": "of adapters, heads, batches, dropout and whatever a rule draws",
    "data_seed": "of the partition, the validation split, the subsets and the order of examples; null: seed",
    "partition": "who holds which examples",
    "output": "the run's folder",
    "device": "auto: a GPU where torch sees one",
    "backend": "of torch.distributed; auto: by the device",
    "model.task": "sequence_classification, sequence_regression, causal_lm or image_classification",
    "data.valid": "as data.train; null: a part of train is taken off",
    "data.text": "the column of the text",
    "data.pair": "the column of a second text, as in entailment",
    "data.label": "the column of the label, a word or a number; of a regression, of the number",
    "data.prompt": "causal_lm: the column of the prompt, which has no loss",
    "data.response": "causal_lm: the column of what is to be learnt, with data.prompt",
    "data.image": "the column of the image: a path beside the file, or an image",
    "data.max_valid": "examples",
    "lora.dropout": "of the adapters' input, from a generator for each peer",
    "lora.head": "a new head: frozen and common, mixed as the factors are, or local",
    "lora.rank.choices": "ranks to draw from, one for each peer",
    "train.rounds": "of local training and one exchange",
    "train.local_steps": "optimiser steps of each peer in a round",
    "train.batch_size": "examples of one peer in a step",
    "train.accumulation": "batches whose gradients make one step",
    "train.optimizer": "of each peer alone",
    "train.lr": "learning rate",
    "train.weight_decay": "decoupled for adamw",
    "train.betas": "of adamw",
    "train.eps": "of adamw",
    "train.momentum": "of sgd",
    "train.schedule": "of the learning rate over the run",
    "train.autocast": "of the forward pass; auto: bfloat16 on a GPU",
    "train.executor": "hosted peers one after the other, or stacked in one pass; auto chooses",
    "train.lr_ratio.A": "of A",
    "train.lr_ratio.B": "of B",
    "train.lr_ratio.head": "of a head that is trained",
    "eval.batch_size": "examples in a pass",
}
# choices by name, beside the methods
PLUGINS = {**methods.SLOTS, "partition": partition.PARTITIONS, "eval.metrics": METRICS}
OPENS = {"method": "fills the slots of a round; what to choose: [dfl/rules](../rules/README.md)",
         "topology": "names and parameters: [topologies](../../topologies/README.md)"}


def comments(cls: type) -> dict[str, str]:
    """By field, the comment in the lines above it and behind it; of a nested section, its docstring's first sentence."""
    source = inspect.getsource(cls)
    said = {token.start[0]: token.string.lstrip("# ") for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT}
    code = source.splitlines()
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above, line = [], node.lineno - 1
            while line in said and code[line - 1].strip().startswith("#"):
                above.insert(0, said[line])
                line -= 1
            found[node.target.id] = " ".join([*above, *([said[node.end_lineno]] if node.end_lineno in said else [])])
    return found


def sections() -> list[tuple[str, type]]:
    """The dataclasses of a recipe with their dotted names, in the order in which they stand there; the root first."""
    found: list[tuple[str, type]] = [("", schema.Config)]

    def below(prefix: str, cls: type) -> None:
        for entry in dataclasses.fields(cls):
            inner = _section(entry.type)
            if inner is not None:
                found.append((prefix + entry.name, inner))
                below(f"{prefix}{entry.name}.", inner)

    below("", schema.Config)
    return found


def _section(annotation) -> type | None:
    for part in (annotation, *getattr(annotation, "__args__", ())):
        if dataclasses.is_dataclass(part) and part is not schema.Plugin:
            return part
    return None


def kind(annotation) -> str:
    """A type as a recipe's author sees it."""
    if annotation is schema.Plugin:
        return "name, or {name: ..., parameters}"
    if dataclasses.is_dataclass(annotation):
        return "section"
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation)) \
        if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    for pattern, plain in ((r"typing\.", ""), (r"tuple\[[\w.]*\bPlugin, \.\.\.\]", "list of names, or of {name: ..., parameters}"),
                           (r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace(", ", " / ")),
                           (r"[\w.]*\bPlugin\b", "name, or {name: ..., parameters}"), (r"[\w.]+\.(\w+)Config", "section"),
                           (r"Optional\[(.*)\]", r"\1 or null"), (r"tuple\[(\w+), \.\.\.\]", r"list of \1"),
                           (r"tuple\[float, float\]", "two numbers"), (r"\bstr\b", "text"),
                           (r"\bint\b", "whole number"), (r"\bfloat\b", "number"), (r"\bbool\b", "true / false"), ("None", "null"),
                           (r" \| ", " or ")):
        text = re.sub(pattern, plain, text)
    return text


def default(entry: dataclasses.Field) -> str:
    value = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()
    value = schema.plain(value)
    if isinstance(value, dict):
        value = value["name"] if set(value) == {"name"} else "see below"
        return value if value == "see below" else f"`{value}`"
    return f"`{plain(value)}`"


def names_elsewhere() -> dict[str, str]:
    """What transformers and PEFT call a field, by our dotted name."""
    found: dict[str, list[str]] = {}
    for prefix, table in (("", aliases.ALIASES), ("lora.", getattr(aliases, "LORA_ALIASES", {}))):
        for name, alias in table.items():
            found.setdefault(alias.own, []).append(prefix + name)
    return {own: ", ".join(f"`{name}`" for name in names) for own, names in found.items()}


def table(prefix: str, cls: type) -> str:
    said, other = comments(cls), names_elsewhere()
    lines = ["| field | value | default | meaning |", "| --- | --- | --- | --- |"]
    for entry in dataclasses.fields(cls):
        name = f"{prefix}.{entry.name}" if prefix else entry.name
        if dataclasses.is_dataclass(entry.type) and entry.type is not schema.Plugin:
            continue  # a section: its own table
        about = [said[entry.name] or SAID.get(name, ""), OPENS.get(name, "")]
        about += [f"also called {other[name]}"] if name in other else []
        meaning = "; ".join(part.rstrip(".") for part in about if part)
        for theirs, plain in (("|", "\\|"), ("None:", "null:"), ("RankConfig", "a section")):
            meaning = meaning.replace(theirs, plain)
        lines.append(f"| `{name}` | {kind(entry.type)} | {default(entry)} | {meaning} |")
    return "\n".join(lines)


def reference() -> str:
    parts = []
    for prefix, cls in sections():
        about = "" if cls.__doc__.startswith(f"{cls.__name__}(") else "\n\n" + " ".join(inspect.getdoc(cls).split())
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
