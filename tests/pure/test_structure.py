"""Imports point one way: topologies <- dfl <- launch, benchmarks, tests; the pure rooms import no other room."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# rooms of dfl whose functions are tensors in, tensors or floats out, and what of dfl they may import
PURE = {
    "slots": {"factors"},
    "rules": {"rules", "slots", "factors", "lowrank", "cores", "plugins", "seeds", "schedules"},
    "schedules": {"schedules", "slots", "factors", "plugins", "seeds"},
    "triggers": {"triggers", "slots", "plugins"},
    "codecs": {"codecs", "slots", "plugins"},
    "channels": {"channels", "slots", "plugins"},
    "guards": {"guards", "slots", "plugins"},
    "wrappers": {"wrappers", "slots", "rules", "plugins"},
    "methods": {"rules", "schedules", "triggers", "codecs", "channels", "guards", "wrappers", "slots", "factors", "plugins"},
    "engine": {"engine", "extensions", "methods", "guards", "rules", "slots", "transport", "factors", "masks", "measures", "seeds",
               "topology"},
    "factors": set(),
    "lowrank": set(),
    "measures": {"factors", "lowrank"},
    "diagnostics": {"factors", "lowrank"},
    "moments": {"factors", "lowrank"},
    "masks": {"factors"},
    "cores": {"factors"},
    "partition": {"partition", "plugins"},
    "seeds": set(),
    "dropout": set(),
    "plugins": set(),
}


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(room: str) -> list[Path]:
    folder = ROOT / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_topologies_know_neither_torch_nor_dfl():
    for path in files("topologies"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("torch", "dfl", "transformers", "peft")}, path


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_import_no_other_room(room):
    for path in files(f"dfl/{room}"):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("dfl.")}
        assert rooms <= PURE[room], path
        assert room == "schedules" or not {name for name in imports(path) if name.split(".")[0] == "topologies"}, path


def test_only_transport_and_runtime_speak_to_other_processes():
    for path in files("dfl"):
        if "torch.distributed" in imports(path):
            assert path.relative_to(ROOT).as_posix() in ("dfl/runtime.py", "dfl/transport/distributed.py")


def test_dfl_imports_neither_launch_nor_tests():
    for path in files("dfl"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("launch", "benchmarks", "tests")}


def test_help_and_those_who_only_read_runs_wait_for_no_torch():
    program = ("import sys; from dfl.cli import make_parser; make_parser(); import dfl.topology, dfl.report.build, dfl.report.live; "
               "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_no_pickle():
    """Nothing that executes what it reads: safetensors, JSON and raw tensors only."""
    for path in files("dfl") + files("topologies"):
        text = path.read_text()
        assert "pickle" not in imports(path) and "torch.load(" not in text and "torch.save(" not in text, path
