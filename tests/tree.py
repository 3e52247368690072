"""The README's file tree, from the first sentence of every file: `python tests/tree.py` writes it anew."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
# files that cannot say it themselves
SAID = {".gitignore": "what is not committed", "README.md": "this page",
        "setup.cfg": "metadata, dependencies with lower bounds, extras",
        "pyproject.toml": "build backend, style and test settings", ".ci/run": "what has to pass before anything lands",
        "topologies/README.md": "the library and the command, all names, how to choose",
        "benchmarks/README.md": "what was measured, how, and what came out", "launch/README.md": "torchrun, Slurm, sweeps, in full",
        "dfl/report/page.html": "the frame of a report", "dfl/report/page.css": "how it looks, light and dark, wide and narrow",
        "dfl/report/page.js": "draws the charts, reads values, no library",
        "dfl/rules/README.md": "all rules in one table, and how to choose",
        "tests/README.md": "which tests run when, and their markers"}
COLLAPSED = {"topologies/gallery/": "the drawn topologies, made by `python -m topologies gallery`",
             "tests/data/checkpoint_v1/": "a run as the first version of the checkpoint format left it"}
_ORDER = ("", "topologies", "dfl", "launch", "benchmarks", "tests", ".ci")


def sentence(path: str) -> str:
    """What a file is: its docstring's or first comment's first sentence."""
    text = (ROOT / path).read_text(errors="replace") if not path.endswith(".png") else ""
    if path in SAID:
        return SAID[path]
    if path.endswith(".py"):
        said = ast.get_docstring(ast.parse(text)) or ""
    elif path.endswith(".json"):
        return "measured, stamped, never edited"
    else:
        comments = re.findall(r"^#(?!!|SBATCH) ?(.*)$", text, re.M)
        said = comments[0] if comments else ""
    first = re.split(r"(?<=[a-z0-9)`])\. |\n\n", " ".join(said.split("\n\n")[0].split()))[0].rstrip(".")
    return first if len(first) <= 140 else first[:137] + "..."


def tree() -> str:
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    listed = done.stdout.split()
    folders: dict[str, list[str]] = {}
    for path in sorted(p for p in listed if (ROOT / p).exists()):
        folder, _, name = path.rpartition("/")
        folders.setdefault(f"{folder}/" if folder else "", []).append(name)
    lines = []
    for folder in sorted(folders, key=lambda f: (_ORDER.index(f.partition("/")[0]), f)):
        if any(folder.startswith(inner) and folder != inner for inner in COLLAPSED):
            continue
        names = ["*"] if folder in COLLAPSED else folders[folder]
        indent = "    " if folder else ""
        lines += [folder] if folder else []
        for name in names:
            said = COLLAPSED[folder] if name == "*" else sentence(folder + name)
            lines.append(f"{indent}{name.ljust(26)}  {said}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    readme = (ROOT / "README.md").read_text()
    block = re.compile(r"(## The tree\n.*?```text\n).*?(```)", re.S)
    (ROOT / "README.md").write_text(block.sub(lambda m: f"{m[1]}{tree()}\n{m[2]}", readme))
