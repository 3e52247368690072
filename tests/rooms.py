"""Which tests are due: of launchers a short core always, the rest of a file where something in its rooms changed; and the long ones
of pure functions where something changed that their file imports.

A test file that is not in ROOMS always runs, but for its long tests. `bash launch/test.sh` and .ci/run ask for what is due; plain
pytest, `bash launch/test.sh --all` and DFL_TEST_ALL=1 run everything.
"""

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A clone does not know what was tested last, and one landing is many commits. So whatever was committed in the hours before
# the newest commit counts as new: longer than a change waits between its last rebase and its landing. It is counted from
# that commit and not from today, so that a commit always has the same tests.
HOURS = 24
# what every run goes through, whatever a test imports
HEART = ("dfl/engine", "dfl/rules", "dfl/methods.py")
_RUN = ("launch/recipes/quickstart.yaml", "dfl/run/runtime.py", "dfl/run/workers.py", "dfl/run/parent.py", "dfl/run/train.py",
        "dfl/transport")
_WORKPLACE = ("launch/README.md", "tests/workplace.py")
# test file -> files and folders that it is about, beside itself and what it shares with every test
ROOMS: dict[str, tuple[str, ...]] = {
    "tests/launch/test_launch.py": (
        *_RUN, "README.md", "dfl/README.md", "dfl/tasks/README.md", "tests/documents.py", "setup.cfg", "launch/quickstart.sh",
        "launch/environment.sh", "launch/test.sh", "launch/recipes", "dfl/cli"),
    "tests/launch/test_survival.py": (
        *_RUN, "launch/torchrun.py", "benchmarks/kill_loop.py", "dfl/run/checkpoint.py", "dfl/run/folder.py", "dfl/store"),
    "tests/launch/test_own_workers.py": (*_RUN, "benchmarks/kill_loop.py", "dfl/cli/train.py"),
    "tests/launch/test_survivors_launch.py": (*_RUN, "launch/torchrun.py", "launch/dfl@.service", "dfl/engine", "dfl/store"),
    "tests/launch/test_survivors_hosts.py": (*_RUN, "tests/hosts.py", "dfl/run/survive.py", "dfl/run/joining.py", "dfl/store"),
    "tests/launch/test_soak.py": (
        "dfl/transport", "dfl/run/survive.py", "dfl/run/joining.py", "dfl/run/replay.py", "dfl/store/collect.py",
        "dfl/engine/living.py", "benchmarks/soak.py", "tests/members.py", "tests/hosts.py"),
    "tests/launch/test_teams_launch.py": (*_RUN, "dfl/training", "dfl/run", "dfl/script", "dfl/hf"),
    "tests/launch/test_own_scripts.py": (
        *_RUN, "dfl/hf", "dfl/script", "dfl/run/loop.py", "dfl/engine", "dfl/training", "tests/own_trainer.py", "setup.cfg"),
    "tests/launch/test_hosts.py": (*_RUN, *_WORKPLACE, "tests/hosts.py", "dfl/transport/handshake.py", "dfl/run/checkpoint.py"),
    "tests/launch/test_slurm.py": (
        *_WORKPLACE, "launch/slurm", "launch/torchrun.py", "tests/slurm_cluster.py", "dfl/run/runtime.py", "dfl/sweep",
        "dfl/cli/sweep.py", "dfl/run/survive.py", "dfl/run/joining.py"),
    "tests/launch/test_sweep_commands.py": (
        "launch/recipes/sweep.yaml", "dfl/sweep", "dfl/cli/sweep.py", "dfl/run/runtime.py", "dfl/run/folder.py"),
    "tests/launch/test_export_commands.py": ("dfl/export", "dfl/cli/export.py", "dfl/cli/evaluate.py", "dfl/metrics"),
    "tests/launch/test_gpu_rehearsal.py": (
        *_RUN, "benchmarks/gpu.sh", "benchmarks/gpu", "benchmarks/mixing.py", "dfl/adapters", "dfl/rules", "dfl/training",
        "tests/reads.py", "tests/rules_on_rows.py", "tests/pure/test_gpu.py"),
    "tests/launch/test_report_browser.py": ("dfl/report", "tests/launch/browser.py", "tests/made_up_runs.py"),
    "tests/real/test_own_trainers.py": (
        "dfl/hf", "dfl/script", "benchmarks/own_scripts.py", "dfl/run/loop.py", "dfl/transport", "setup.cfg"),
    "tests/real/test_real_runs.py": (
        "launch/recipes", "dfl/tasks", "dfl/partition", "dfl/training", "dfl/run/loop.py"),
}


def due(root: Path = ROOT, rooms: dict[str, tuple[str, ...]] = ROOMS) -> list[str]:
    """The files of `rooms` that run as a whole."""
    files = changed(root)
    return [test for test, parts in rooms.items() if _touched((test, *parts), files)]


def split(items: list, due: list[str], changed: set[str] | None = None) -> tuple[list, list]:
    """Those of pytest's items that run, and those that rest: for the night; of a file of ROOMS that is not due and not in its core;
    long, and nothing that their file imports is among the files `changed` (None: all are).
    """
    resting = {ROOT / test for test in ROOMS} - {ROOT / test for test in due}

    @functools.cache
    def long_rest(path: Path) -> bool:
        return not _touched(subjects(path), changed)

    def rests(item) -> bool:
        if item.get_closest_marker("nightly"):
            return True
        if item.path in resting and not item.get_closest_marker("core"):
            return True
        return bool(item.get_closest_marker("long")) and long_rest(item.path)

    rests = [rests(item) for item in items]
    return ([item for item, rest in zip(items, rests, strict=True) if not rest],
            [item for item, rest in zip(items, rests, strict=True) if rest])


def subjects(test: Path, root: Path = ROOT) -> set[str]:
    """What a test file is about: itself, the rooms that it and the helpers beside the tests that it uses import, and the heart."""
    found, left = set(HEART), [test]
    while left:
        path = left.pop()
        found.add(path.relative_to(root).as_posix())
        for name in _imported(path):
            helper = root / "tests" / f"{name}.py"
            if helper.exists() and helper.relative_to(root).as_posix() not in found:
                left.append(helper)
            parts = name.split(".")
            found |= {place for place in ("/".join(parts[:2]), f"{'/'.join(parts[:2])}.py")
                      if parts[0] == "dfl" and len(parts) > 1 and (root / place).exists()}
            found |= {"topologies"} & {parts[0]}
    return found


def _imported(path: Path) -> list[str]:
    """Names of modules, and of what is taken from packages, in dots."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def changed(root: Path) -> set[str] | None:
    """Files that the last HOURS of commits changed, those of a branch, and what is not committed; None where git cannot say."""
    try:
        newest = int(_git(root, "log", "-1", "--format=%ct"))
        before = _git(root, "rev-list", "-1", f"--before={newest - HOURS * 3600}", "HEAD")
        if not before:  # everything is younger, or the clone is shallow
            return None
        files = _git(root, "diff", "--name-only", before) + "\n" + _git(root, "ls-files", "--others", "--exclude-standard")
        if _git(root, "branch", "--remotes", "--list", "origin/main"):
            files += "\n" + _git(root, "diff", "--name-only", _git(root, "merge-base", "origin/main", "HEAD"))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None
    return set(files.split("\n")) - {""}


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return done.stdout.strip()


def _touched(parts, files: set[str] | None) -> bool:
    return files is None or any(_inside(file, part) for part in parts for file in files)


def _inside(file: str, part: str) -> bool:
    return file == part or file.startswith(f"{part}/")
