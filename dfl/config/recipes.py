"""Recipes as text: YAML and `--dotted.key value` overrides become one tree of plain values."""

import re
from pathlib import Path
from typing import Any

import yaml


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: of two `train:` sections the first would be lost silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if keys.count(key.value) > 1 and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """The tree of a recipe; that of a run's own folder in today's form. ValueError for a file that holds none."""
    tree = _read_yaml(path)
    return upgraded(tree) if path.name == "recipe.yaml" and any((path.parent / name).exists() for name in _OF_A_RUN) else tree


# what stands beside the recipe in the folder of a run
_OF_A_RUN = ("run.json", "metrics.jsonl", "checkpoints")


def upgraded(tree: dict) -> dict:
    """A resolved recipe in today's form: before `rule` was a slot of its own, the method stood there, and no recipe lacked it."""
    if "method" in tree or not isinstance(tree.get("rule"), dict):
        return tree
    return {"method" if key == "rule" else key: value for key, value in tree.items()}


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"recipe {str(path)!r} is not a file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, a date that is none
        raise ValueError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {str(path)!r} must hold a mapping of fields, got {type(tree).__name__}")
    return tree


def parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    """`--a.b 1 --c=2` as [("a.b", 1), ("c", 2)]; values are read as YAML."""
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ValueError(f"argument {word!r} is not an override; write --dotted.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"override --{key} lacks a value; write --{key} value")
            text = rest.pop(0)
        if not text.strip():  # YAML reads nothing as null; it is mostly a shell variable that is not set
            raise ValueError(f"override --{key} = {text!r} is empty; give a value, or null where the field may have none")
        try:
            pairs.append((key, yaml.safe_load(text)))
        except (yaml.YAMLError, ValueError):
            raise ValueError(f"override --{key} = {text!r} is not a valid YAML value") from None
    return pairs


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; people mean a number."""
    if isinstance(value, str):
        return float(value) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value) else value
    if isinstance(value, list):
        return [number(v) for v in value]
    if isinstance(value, dict):
        return {k: number(v) for k, v in value.items()}
    return value


# the field that a word in place of a section stands for, where it is not the name of a choice: `membership: survive`
SHORT_FOR = {"membership": "mode"}


def set_field(tree: dict, dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for key in path:
        child = tree.get(key)
        if isinstance(child, str):  # `method: tad` then --method.T 5
            child = {SHORT_FOR.get(key, "name"): child}
        if not isinstance(child, (dict, type(None))):
            raise ValueError(f"override --{dotted} = {value!r}: {key} = {child!r} has no fields of its own")
        tree[key] = child = dict(child or {})
        tree = child
    tree[last] = value
