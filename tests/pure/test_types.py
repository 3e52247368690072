"""Which modules mypy checks strictly, and of which it shows no errors yet (pyproject.toml)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PUBLIC = ["dfl", "dfl.interface", "dfl.result", "dfl.slots", "dfl.methods", "dfl.config.schema", "dfl.store.runs",
          "dfl.store.manifest", "dfl.transport.base", "dfl.rules.base", "dfl.schedules.phases", "dfl.triggers.event",
          "dfl.codecs.int8", "dfl.channels.lossy", "dfl.guards.norm", "dfl.networks.links", "dfl.wrappers.base",
          "dfl.engine.gossip", "dfl.simulation"]


def lists() -> list[list[str]]:
    """The modules of each section of overrides."""
    text = (ROOT / "pyproject.toml").read_text()
    return [re.findall(r'"([^"]+)"', found) for found in re.findall(r"^module = \[(.*?)^\]", text, re.M | re.S)]


def covers(pattern: str, module: str) -> bool:
    return module == pattern or pattern.endswith(".*") and f"{module}.".startswith(pattern[:-1])


@pytest.mark.parametrize("module", PUBLIC)
def test_what_users_and_plugins_call_is_checked_strictly(module):
    strict, not_yet, _ = lists()
    assert any(covers(pattern, module) for pattern in strict)
    assert not any(covers(pattern, module) for pattern in not_yet)


def test_no_module_of_the_lists_is_gone():
    """mypy says nothing of a name that is none: after a move the module would be checked leniently, or not at all."""
    strict, not_yet, _ = lists()
    assert not any(name.endswith("*") for name in not_yet)
    for name in [*strict, *not_yet]:
        path = ROOT / name.removesuffix(".*").replace(".", "/")
        assert path.is_dir() if name.endswith(".*") else path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_the_types_are_checked_with_the_style():
    assert '"$VENV/bin/mypy"' in (ROOT / "launch/test.sh").read_text()
    assert (ROOT / "dfl/py.typed").is_file()
