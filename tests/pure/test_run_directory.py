"""Nothing that a run did not write is ever removed: what --overwrite takes away, what it leaves, and what it refuses."""

import os
import shutil
from pathlib import Path

import pytest
import tiny_runs

from dfl.cli import main
from dfl.run import checkpoint
from dfl.store import directory
from dfl.transport import InProcess


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("directory"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A run with all that a run may leave."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(words(root, output, **ALL)) == 0 and main(["report", str(output)]) == 0
    return output


ALL = {"train__rounds": 2, "checkpoint__every": 1, "baseline": "local", "model__layers": 1}


def words(root, output, *more, **fields):
    return ["train", *tiny_runs.arguments(root / "bert", root / "data.csv", output, **({"train__rounds": 1} | fields)), *more]


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, links not followed."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()}


def refused(argv, capsys) -> str:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dfl: ") and err.count("\n") == 1
    return err


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's own folder, with a recipe in it, under version control."""
    folder = tmp_path / "project"
    for name in (".git/HEAD", ".git/objects/ab/cd", "recipe.yaml", "train.py", "data/mine.csv", "checkpoints/mine.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("seed: 1\n" if name == "recipe.yaml" else name)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("more", [["--overwrite"], [], ["--resume"], ["--overwrite", "--resume"]])
@pytest.mark.parametrize("output", [".", "../project", "{absolute}"])
def test_a_project_folder_is_left_as_it_was(root, project, capsys, output, more):
    before = contents(project)
    line = refused(words(root, output.replace("{absolute}", str(project)), *more), capsys)
    assert "recipe.yaml" in line and "no run is known to have made it" in line and "--output" in line
    assert contents(project) == before


def test_each_name_that_a_run_writes_is_refused(root, tmp_path, capsys):
    for name in ("recipe.yaml", "run.json", "metrics.jsonl", "ended.json", "checkpoints", "baseline-local/recipe.yaml"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        for more in ([], ["--overwrite"]):
            assert name in refused(words(root, folder, *more, baseline="local"), capsys)
        assert contents(folder) == {name: b"mine"}


def test_a_run_beside_a_users_own_files_replaces_itself_only(root, project, capsys):
    for name in ("recipe.yaml", "checkpoints/mine.bin"):
        (project / name).unlink()
    (project / "checkpoints").rmdir()
    mine = contents(project)
    assert main(words(root, ".")) == 0
    (project / "checkpoints/round-00001/notes.txt").write_text("good one")
    capsys.readouterr()
    assert main(words(root, ".", "--overwrite", seed=5)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dfl: left in '.'")]
    assert len(said) == 1
    for name in (".git/", "data/", "train.py", "checkpoints/round-00001/notes.txt"):
        assert name in said[0]
    assert "recipe.yaml" not in said[0] and ".dfl" not in said[0]
    after = contents(project)
    assert {name: after[name] for name in mine} == mine
    assert after["checkpoints/round-00001/notes.txt"] == b"good one" and b"seed: 5" in after["recipe.yaml"]
    checkpoint.verify(project / "checkpoints/round-00001")


def test_what_a_run_has_written_goes_without_a_rest(root, finished, tmp_path, capsys):
    """A file that a later version writes as well has to be added to the list of what may be removed."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    ours = {path.relative_to(run).as_posix() for path in directory.written(run)}
    assert ours | {".dfl/marker.json"} == contents(run).keys()
    assert {"report.html", "report.md", "baseline-local/recipe.yaml"} <= ours
    assert directory.clear(run) == []
    assert contents(run).keys() == {".dfl/marker.json"} and os.listdir(run) == [".dfl"]


def test_replaced_a_run_leaves_no_trace(root, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    capsys.readouterr()
    assert main(words(root, run, "--overwrite")) == 0
    assert "left in" not in capsys.readouterr().err
    assert main(words(root, tmp_path / "fresh")) == 0
    assert contents(run).keys() == contents(tmp_path / "fresh").keys()


def test_links_are_not_followed(root, finished, tmp_path, capsys):
    """The folder itself a link, its checkpoints, one checkpoint, a folder in it, the recipe: nothing behind them goes."""
    real = tmp_path / "real"
    shutil.copytree(finished, real)
    (tmp_path / "link").symlink_to(real)
    before = contents(real)
    assert "symbolic link" in refused(words(root, tmp_path / "link", "--overwrite"), capsys)
    assert contents(real) == before
    for name in ("checkpoints", "recipe.yaml", "baseline-local"):
        run = tmp_path / f"run-{name}"
        shutil.copytree(finished, run)
        (run / name).rename(tmp_path / f"moved-{name}")
        (run / name).symlink_to(tmp_path / f"moved-{name}")
        before = contents(run), (tmp_path / f"moved-{name}").is_file() or contents(tmp_path / f"moved-{name}")
        assert name in refused(words(root, run, "--overwrite", baseline="local"), capsys)
        assert (contents(run), (tmp_path / f"moved-{name}").is_file() or contents(tmp_path / f"moved-{name}")) == before


def test_links_inside_are_left_and_named(root, finished, tmp_path, capsys):
    run, away = tmp_path / "run", tmp_path / "away"
    shutil.copytree(finished, run)
    shutil.move(run / "checkpoints/round-00001", away / "round-00001")
    (run / "checkpoints/round-00001").symlink_to(away / "round-00001")
    shutil.move(run / "checkpoints/round-00002/peer-1", away / "peer-1")
    (run / "checkpoints/round-00002/peer-1").symlink_to(away / "peer-1")
    (run / "report.md").unlink()
    (run / "report.md").symlink_to(finished / "report.md")
    before = contents(away), contents(finished)
    left = directory.clear(run)
    assert left == ["checkpoints/round-00001", "checkpoints/round-00002/peer-1", "report.md"]
    assert (contents(away), contents(finished)) == before


def test_a_manifest_cannot_name_what_lies_elsewhere(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (tmp_path / "mine").write_text("mine")
    manifest = run / "checkpoints/round-00002/manifest.json"
    for name in ("../../../mine", str(tmp_path / "mine"), "", ".", "..", "peer-0/../../../../mine"):
        manifest.write_text(f'{{"rounds": 2, "sha256": {{"{name}": ""}}}}')
        assert directory.checkpoint_files(manifest.parent) == [manifest]
    (run / "checkpoints/round-00001/state-7.safetensors").write_text("no manifest names it")
    left = directory.clear(run)
    assert "checkpoints/round-00001/state-7.safetensors" in left and (tmp_path / "mine").read_text() == "mine"


def test_files_that_had_no_name_yet_when_their_writer_was_killed_are_its_own(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for folder in ("checkpoints/.round-00003.0a1b2c3d.draft", "checkpoints/.round-00003.draft/peer-0",
                   "best/.peer-1.0123456789abcdef.draft"):
        (run / folder).mkdir(parents=True)
        (run / folder / ".tmpa1B2c3").write_text("half of a file")
    (run / "best/.tmpa1B2c3").write_text("mine")
    assert directory.clear(run) == ["best/.tmpa1B2c3"]


def test_a_folder_of_that_name_without_a_marker_is_not_a_baseline_of_ours(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copytree(run / "baseline-local", run / "baseline-mine")
    shutil.rmtree(run / "baseline-mine/.dfl")
    mine = contents(run / "baseline-mine")
    assert directory.clear(run) == ["baseline-mine/"] and contents(run / "baseline-mine") == mine


def test_a_start_that_is_refused_leaves_the_run_that_was_there(root, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = contents(run)
    for fields in ({"data__label": "lable"}, {"model__name": "/nowhere"}, {"lora__targets": "[nothing]"}):
        refused(words(root, run, "--overwrite", **fields), capsys)
        assert contents(run) == before


def test_the_baseline_of_a_run_is_no_place_for_another(root, finished, capsys):
    before = contents(finished)
    for more in ([], ["--resume"], ["--overwrite"]):
        assert "belongs to the run in" in refused(words(root, finished / "baseline-local", *more), capsys)
    assert contents(finished) == before


def test_pruning_and_replacing_leave_what_is_not_of_the_checkpoint(root, tmp_path):
    run, loaded = tiny_runs.make_run(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path))
    writer = checkpoint.Checkpointer(tmp_path, InProcess(), 0, "base", 1)

    def save(rounds):
        writer.save(rounds, loaded.adapted, run.peers.ids, run.peers.x, run.rows(), {}, None)

    save(1)
    notes = tmp_path / "checkpoints/round-00001/peer-0/notes.txt"
    notes.write_text("mine")
    save(1)  # replaced
    assert notes.read_text() == "mine" and checkpoint.verify(notes.parent.parent) == 1
    save(2)  # pruned
    assert contents(tmp_path / "checkpoints/round-00001") == {"peer-0/notes.txt": b"mine"}
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["round-00002"]


def test_trackers_files_go_and_others_in_their_folders_stay(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    ours = ("tensorboard/events.out.tfevents.1.host.2.0", "wandb/offline-run-1/files/config.yaml", "wandb/offline-run-1/run-1.wandb")
    for name in (*ours, "tensorboard/plot.png", "wandb/settings"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    (run / "wandb/latest-run").symlink_to("offline-run-1")
    (run / "wandb/debug.log").symlink_to(tmp_path / "elsewhere.log")
    (tmp_path / "elsewhere.log").write_text("kept")
    assert directory.clear(run) == ["tensorboard/plot.png", "wandb/settings"]
    assert (tmp_path / "elsewhere.log").read_text() == "kept"


def test_a_report_of_somebody_else_is_neither_removed_nor_replaced(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "report.md").write_text("# what I think of this run\n")
    assert "was not made by dfl report" in refused(["report", run], capsys)
    assert directory.clear(run) == ["report.md"]
    assert (run / "report.md").read_text() == "# what I think of this run\n"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/abs", "a\\b", "a\0b", ".dfl", 3, None])
def test_what_is_no_plain_name(name):
    assert not directory.is_plain_name(name) and directory.is_plain_name("tad-T=5__lr=0.01")
