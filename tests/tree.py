"""The list of rooms in dfl/README.md, from the first sentence of each: `python tests/tree.py` writes it anew."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
# rooms that are no packages, or more than one
SAID = {"benchmarks": "a configuration in, one stamped JSON out; what was measured",
        "dfl": "the framework; modules that belong to no room below lie in it",
        "launch": "start scripts, Slurm scripts, recipes",
        "tests": "pure, several processes, launchers, real data"}
# rooms that share a line
SLOTS = ("schedules", "triggers", "codecs", "channels", "networks", "guards", "wrappers")
_BLOCK = re.compile(r"(## Rooms\n.*?```text\n).*?(```)", re.S)


def rooms(root: Path = ROOT) -> list[str]:
    """The folders at the top that hold committed files, and the packages in dfl, in the order of the list."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True,
                          check=True)
    folders = {Path(path).parent for path in done.stdout.split("\n") if path and (root / path).exists()}
    top = {folder.parts[0] for folder in folders if folder.parts} - {".ci"}
    packages = {f"dfl/{folder.parts[1]}" for folder in folders if folder.parts[:1] == ("dfl",) and len(folder.parts) > 1}
    order = ("topologies", "dfl", "launch", "benchmarks", "tests")
    return sorted(top | packages, key=lambda room: (order.index(room.split("/")[0]) if room.split("/")[0] in order else 9, room))


def sentence(room: str) -> str:
    """What a room is for: its own first sentence."""
    if room in SAID:
        return SAID[room]
    said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) or ""
    said = " ".join(said.split("\n\n")[0].split())
    first = re.split(r"(?<=[a-z0-9)`])\. |: (?=a table|`)|: one module", said)[0].rstrip(".")
    return first if len(first) <= 100 else first[:100].rpartition(", ")[0]


def tree() -> str:
    lines = []
    for room in rooms():
        if room == "dfl/schedules":
            lines.append("    " + " ".join(f"{slot}/" for slot in SLOTS) + "  the other slots of a round")
        if room.removeprefix("dfl/") in SLOTS:
            continue
        name = f"    {room.split('/')[1]}/" if "/" in room else f"{room}/"
        lines.append(f"{name.ljust(18)}  {sentence(room)}".rstrip())
    return "\n".join(lines)


def with_tree(text: str) -> str:
    return _BLOCK.sub(lambda found: f"{found[1]}{tree()}\n{found[2]}", text)


if __name__ == "__main__":
    (ROOT / "dfl" / "README.md").write_text(with_tree((ROOT / "dfl" / "README.md").read_text()))
