"""Which tests of launchers are due: the table is true, every file of them keeps a core, and a change brings its tests along."""

import os
import re
import subprocess
from collections import Counter
from types import SimpleNamespace

import pytest
import rooms
from rooms import HOURS, ROOMS, ROOT

SLOW = sorted(path.relative_to(ROOT).as_posix() for room in ("launch", "real") for path in ROOT.glob(f"tests/{room}/test_*.py"))
ROOMS_OF_TOY = {"tests/test_far.py": ("far",), "tests/test_near.py": ("near/file.py", "nearby")}


def test_every_test_of_launchers_has_its_rooms_and_every_room_is_there():
    assert sorted(ROOMS) == SLOW
    for test, parts in ROOMS.items():
        assert parts and all((ROOT / part).exists() for part in parts), (test, [p for p in parts if not (ROOT / p).exists()])


def test_no_two_files_of_tests_have_one_name():
    """pytest could not run them together."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []


def test_the_core_has_one_of_each_kind():
    core = {test for test in SLOW if re.search(r"mark\.core\b", (ROOT / test).read_text())}
    kinds = ("launch", "survival", "slurm", "sweep_commands", "report_browser")
    assert {f"tests/launch/test_{kind}.py" for kind in kinds} | {"tests/real/test_real_runs.py"} <= core


def test_of_a_file_that_is_not_due_only_the_core_runs():
    def item(file, *markers):
        return SimpleNamespace(path=ROOT / file, get_closest_marker=lambda name: name in markers)

    slurm, other = "tests/launch/test_slurm.py", "tests/launch/test_launch.py"
    items = [item(slurm), item(slurm, "core"), item(other), item(other, "core"), item("tests/distributed/test_lost.py")]
    kept, resting = rooms.split(items, due=[other])
    assert resting == items[:1] and kept == items[1:]
    assert rooms.split(items, due=list(ROOMS)) == (items, [])
    night = [item("tests/pure/test_grid.py"), item("tests/pure/test_grid.py", "nightly"), item(other, "nightly")]
    assert rooms.split(night, due=list(ROOMS)) == (night[:1], night[1:])


def test_long_tests_run_when_what_they_import_changed():
    def item(*markers):
        return SimpleNamespace(path=ROOT / "tests/pure/test_toy_oracle.py", get_closest_marker=lambda name: name in markers)

    items, all_due = [item(), item("long")], list(ROOMS)
    assert rooms.split(items, all_due, {"README.md", "dfl/export/card.py"}) == (items[:1], items[1:])
    for file in ("tests/pure/test_toy_oracle.py", "tests/toy.py", "dfl/engine/gossip.py", "dfl/methods.py"):
        assert rooms.split(items, all_due, {file}) == (items, []), file
    assert rooms.split(items, all_due, None) == (items, [])


def test_what_a_test_is_about_is_what_it_and_its_helpers_import(tmp_path):
    for name, text in {"dfl/rules/average.py": "", "dfl/codecs.py": "", "dfl/cli/main.py": "", "topologies/ring.py": "",
                       "tests/helper.py": "import topologies.ring\nimport second", "tests/second.py": "from dfl import codecs",
                       "tests/pure/test_it.py": "import torch\nfrom helper import x\nfrom dfl.rules.average import average"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert rooms.subjects(tmp_path / "tests/pure/test_it.py", tmp_path) == {
        "tests/pure/test_it.py", "tests/helper.py", "tests/second.py", "dfl/rules", "dfl/codecs.py", "topologies", *rooms.HEART}


class History:
    """A repository whose commits say when they were made, in hours."""

    def __init__(self, folder):
        self.folder = folder

    def clone(self, folder, *words):
        self.git("clone", "--quiet", *words, f"file://{self.folder}", str(folder))
        return History(folder)

    def git(self, *words, hour=0.0):
        when = f"{int(1_700_000_000 + 3600 * hour)} +0000"
        names = {f"GIT_{who}_{what}": "x@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        dates = {"GIT_AUTHOR_DATE": "1600000000 +0000", "GIT_COMMITTER_DATE": when}  # a rebase dates the second anew
        subprocess.run(["git", *words], cwd=self.folder, check=True, capture_output=True, env=os.environ | names | dates)

    def commit(self, hour, *files):
        for file in files:
            self.write(file, f"of hour {hour}")
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "x", hour=hour)

    def write(self, file, text):
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def due(self):
        return [test[len("tests/test_"):-len(".py")] for test in rooms.due(self.folder, ROOMS_OF_TOY)]


@pytest.fixture
def history(tmp_path):
    made = History(tmp_path)
    made.git("init", "--quiet", "--initial-branch=main")
    made.commit(0, "far/a.py", "near/file.py", "tests/test_far.py", "README.md")
    return made


def test_all_are_due_where_the_past_is_not_known(history, tmp_path_factory):
    assert history.due() == ["far", "near"]  # all of it is young
    nothing = tmp_path_factory.mktemp("nothing")
    assert rooms.changed(nothing) is None and rooms.due(nothing) == list(ROOMS)
    history.commit(100, "README.md")
    assert history.due() == []
    assert history.clone(tmp_path_factory.mktemp("shallow"), "--depth=1").due() == ["far", "near"]


def test_commits_of_the_last_day_count_however_many_they_are(history):
    history.commit(100, "far/a.py")
    history.commit(100 + HOURS - 1, "near/other.py", "README.md")
    assert history.due() == ["far"]
    history.commit(100 + HOURS + 1, "nearby/deep/b.py")
    assert history.due() == ["near"]
    history.commit(300, "tests/test_far.py")
    assert history.due() == ["far"]
    history.commit(400, "farther.py")
    assert history.due() == []


def test_what_is_not_committed_and_what_a_branch_has_before_it_lands_count(history, tmp_path_factory):
    history.commit(100, "README.md")
    history.write("near/file.py", "changed")
    assert history.due() == ["near"]
    history.git("checkout", "near/file.py")
    history.write("far/new.py", "not yet added")
    assert history.due() == ["far"]
    (history.folder / "far/new.py").unlink()
    there = history.clone(tmp_path_factory.mktemp("clone"))
    assert there.due() == []
    there.commit(200, "far/a.py")
    there.commit(400, "README.md")
    assert there.due() == ["far"]
