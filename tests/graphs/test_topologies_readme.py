"""What the documents say is true: every command runs, every example gives what it shows, the tables are the registries.

``python tests/graphs/test_topologies_readme.py`` writes the tables of the README anew.
"""

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import topologies
from topologies import cli, gallery
from topologies.catalogue import STATIC, TOPOLOGIES
from topologies.weights import RULES

README = Path(topologies.__file__).parent / "README.md"
GALLERY = README.parent / "gallery"


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def commands():
    lines = [line for path in (README, GALLERY / "README.md") for block in blocks(path, "sh") for line in block.splitlines()]
    return [line for line in lines if line.strip()]


@pytest.mark.long
@pytest.mark.parametrize("command", commands())
def test_every_command_runs(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "topologies"]
    extra = ["--names", "ring", "base_graph"] if words[3:] == ["gallery"] else []  # all 53 pictures take a while
    assert cli.main([*words[3:], *extra]) == 0
    assert capsys.readouterr().out.strip()
    if "--output" in words:
        assert (tmp_path / words[words.index("--output") + 1]).stat().st_size > 1000


def test_every_python_block_runs():
    for block in blocks(README, "python"):
        names = {}
        exec(block, names)
        assert names["row"] == pytest.approx({2: 1 / 3, 3: 1 / 3, 4: 1 / 3})
        assert names["spectrum"].slem(names["W"]) == pytest.approx(0.8047, abs=1e-4)
        assert names["spectrum"].contraction(names["sparse"]) == pytest.approx(0.6343, abs=1e-4)


def modules():
    return ["topologies", *(m.name for m in pkgutil.walk_packages(topologies.__path__, "topologies.") if "__main__" not in m.name)]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def tables():
    static = [f"| `{name}` | {TOPOLOGIES[name].about} |" for name in STATIC]
    moving = [f"| `{name}` | {TOPOLOGIES[name].about} |" for name in TOPOLOGIES if name not in STATIC]
    names = ["| static graph | |", "| --- | --- |", *static, "", "| sequence | |", "| --- | --- |", *moving]
    rules = ["| rule | |", "| --- | --- |", *(f"| `{name}` | {about} |" for name, (_, about, _) in RULES.items())]
    return {"names": "\n".join(names), "weights": "\n".join(rules)}


def with_tables(text):
    for name, table in tables().items():
        pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- end of {name} -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text, flags=re.S)
    return text


def test_the_tables_are_the_registries():
    assert README.read_text() == with_tables(README.read_text()), "run python tests/graphs/test_topologies_readme.py"


def test_the_files_of_the_readme_are_the_files():
    said = set(re.findall(r"`([a-z_]+\.py)`", README.read_text()))
    assert said == {path.name for path in README.parent.glob("*.py")} - {"__init__.py", "__main__.py"}


def test_the_gallery_shows_every_topology_and_stays_small():
    page = (GALLERY / "README.md").read_text()
    # random families come from networkx, whose draws may differ between its versions
    said, found = (re.sub(r"rate \d\.\d+", "rate", text) for text in (page, gallery.page()))
    assert said == found, "run python -m topologies gallery"
    assert re.findall(r"^!\[.*\]\((.*)\.png\)", page, re.M) == list(TOPOLOGIES)
    pictures = list(GALLERY.glob("*.png"))
    assert {path.stem for path in pictures} == set(TOPOLOGIES)
    assert sum(path.stat().st_size for path in pictures) < 1_500_000


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
