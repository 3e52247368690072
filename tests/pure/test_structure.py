"""Imports point one way: topologies <- dfl <- launch, benchmarks, tests; the pure rooms import no other room."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent.parent
# rooms of dfl whose functions are tensors in, tensors or floats out, and what of dfl they may import
PURE = {
    "slots": {"adapters"},
    "rules": {"rules", "slots", "adapters", "plugins", "seeds", "schedules"},
    "schedules": {"schedules", "slots", "adapters", "plugins", "seeds"},
    "triggers": {"triggers", "slots", "adapters", "plugins"},
    "codecs": {"codecs", "slots", "plugins", "adapters"},
    "channels": {"channels", "slots", "plugins", "seeds"},
    "guards": {"guards", "slots", "plugins", "adapters"},
    "networks": {"networks", "slots", "plugins", "transport"},
    "wrappers": {"wrappers", "slots", "rules", "plugins", "adapters", "seeds"},
    "methods": {"rules", "schedules", "triggers", "codecs", "channels", "networks", "guards", "wrappers", "slots",
                "adapters", "plugins"},
    "engine": {"engine", "methods", "channels", "networks", "rules", "slots", "transport", "adapters", "training", "seeds"},
    "adapters": {"adapters", "config", "plugins", "seeds"},
    "partition": {"partition", "plugins"},
    "store": {"store", "config", "plugins", "transport"},
    "report": {"report", "store", "config"},
    "seeds": set(),
    "plugins": set(),
    "version": set(),
}
# modules of rooms that also know a model, whose functions are tensors in, tensors or floats out
PURE_MODULES = {
    "adapters/layout": {"adapters.batched"},
    "adapters/batched": set(),
    "adapters/lowrank": {"adapters.batched"},
    "adapters/cores": {"adapters.layout"},
    "adapters/peft_layers": {"adapters.layout", "config"},
    "adapters/kinds": {"adapters.cores", "adapters.peft_layers", "config", "plugins"},
    "metrics/products": {"adapters.batched", "adapters.layout", "adapters.lowrank", "seeds", "transport.base"},
    "metrics/measures": {"adapters.batched", "adapters.layout", "adapters.lowrank", "metrics.products", "transport.base"},
    "metrics/layers": {"adapters.layout", "adapters.lowrank", "metrics.measures", "transport.base"},
    "training/moments": {"adapters.layout", "adapters.lowrank"},
    "training/masks": {"adapters.layout"},
    "training/dropout": set(),
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
        asks_topologies = any(name.split(".")[0] == "topologies" for name in imports(path))
        assert room in ("schedules", "config", "report") or not asks_topologies, path


@pytest.mark.parametrize("module", PURE_MODULES)
def test_pure_modules_import_no_model(module):
    known = {f"dfl.{one}" for one in PURE_MODULES[module]}
    for name in imports(ROOT / f"dfl/{module}.py"):
        assert not name.startswith("dfl.") or any(name == one or name.startswith(f"{one}.") for one in known), name


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files("dfl")}


def innermost(names: set[str]) -> set[str]:
    """Without the packages whose modules are named as well."""
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def circles(edges: set[tuple[str, str]]) -> list[set[str]]:
    return [found for found in networkx.strongly_connected_components(networkx.DiGraph(edges)) if len(found) > 1]


@pytest.mark.long
def test_imports_have_no_circle_neither_of_modules_nor_of_rooms():
    """Also those inside of functions. `dfl/__init__.py` is left out: it shows what lies below."""
    known = modules()
    edges = {(module, name) for module, path in known.items() if module != "dfl"
             for name in innermost(imports(path) & known.keys()) if name not in ("dfl", module)}
    assert not circles(edges)
    assert not circles({(a.split(".")[1], b.split(".")[1]) for a, b in edges if a.split(".")[1] != b.split(".")[1]})
    assert circles({("a", "b"), ("b", "a")})  # and would be found


def test_only_transport_and_runtime_speak_to_other_processes():
    for path in files("dfl"):
        if "torch.distributed" in imports(path):
            assert path.relative_to(ROOT).as_posix() in ("dfl/run/runtime.py", "dfl/transport/group.py", "dfl/transport/team.py")


def test_dfl_imports_neither_launch_nor_tests():
    for path in files("dfl"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("launch", "benchmarks", "tests")}


def test_help_and_those_who_only_read_runs_wait_for_no_torch():
    program = ("import sys; from dfl.cli import make_parser; make_parser(); "
               "assert not {'numpy', 'pydantic', 'yaml'} & set(sys.modules); import dfl.config.topology, dfl.report.build; "
               "import dfl.report.live; "
               "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.long
def test_no_pickle():
    """Nothing that executes what it reads: safetensors, JSON and raw tensors only."""
    for path in files("dfl") + files("topologies"):
        text = path.read_text()
        assert "pickle" not in imports(path) and "torch.load(" not in text and "torch.save(" not in text, path


def test_nothing_is_timed_by_a_clock_that_jumps():
    """The wall clock says when certificates are valid, and how old a file is that a reader shows; seconds pass by another one."""
    wall = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|today)\(|\butcnow\(|from time import")
    found = {path.relative_to(ROOT).as_posix() for path in files("dfl") if wall.search(path.read_text())}
    assert found == {"dfl/report/live.py", "dfl/transport/certificates.py"}
