"""What only a process of its own shows: a disk that fills up, a kill between two lines, what an import loads."""

import contextlib
import ctypes
import gc
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_runs
import torch
from processes import begin, run_alone
from safetensors.torch import load_file

from dfl.cli import main
from dfl.run import checkpoint
from dfl.store.records import JsonLines, read_lines
from dfl.transport.group import Group

CLONE_NEWNS = 0x20000


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("own"))


def words(root, output, **fields):
    return ["train", *tiny_runs.arguments(root / "bert", root / "data.csv", output, **fields)]


def on_a_disk_of(size: str, folder: Path, argv: list[str]) -> tuple[int, str, list[str]] | None:
    """`dfl argv` with a tmpfs of `size` at `folder`, which is copied to `folder`.copy before it vanishes: the status, standard
    error, the files left. None where no private mounts are permitted."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return None
    for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]):
        if subprocess.run(command, capture_output=True).returncode:
            return None
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(argv)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    shutil.copytree(folder, f"{folder}.copy")
    return status, said.getvalue(), files


def on_a_small_disk(folder, size, argv):
    folder.mkdir()
    found = run_alone(on_a_disk_of, size, folder, argv)
    if found is None:
        pytest.skip("a private mount namespace is not permitted here")
    status, said, files = found
    errors = [line for line in said.splitlines() if line.startswith("dfl: ")]
    assert status == 1 and len(errors) == 1 and "Traceback" not in said
    assert "No space left" in errors[0] and str(folder / "run") in errors[0]
    return files


def test_a_disk_that_fills_up_keeps_the_last_whole_checkpoint(tmp_path):
    # of three layers: room for the records and a few checkpoints of about 80 kB
    tiny_runs.make_folder(tmp_path, layers=3)
    disk, fields = tmp_path / "disk", {"train__rounds": 12, "lora__targets": "all-linear"}
    often = fields | {"checkpoint__every": 1, "checkpoint__keep": 20}
    on_a_small_disk(disk, "400k", words(tmp_path, disk / "run", **often))
    run = Path(f"{disk}.copy") / "run"
    last = checkpoint.latest(run)
    assert last is not None and checkpoint.complete(run)[-1] == last  # no half checkpoint is among them
    assert not list((run / "checkpoints").glob(".*"))
    assert [r["round"] for r in read_lines(run / "metrics.jsonl")][-1] >= int(last.name[-5:])
    # with room again it goes on, and ends like a run that always had room
    assert main([*words(tmp_path, run, **often), "--resume"]) == 0
    assert main(words(tmp_path, tmp_path / "roomy", **fields)) == 0
    one, other = (load_file(checkpoint.latest(p) / "state-0.safetensors") for p in (run, tmp_path / "roomy"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_disk_without_any_room_is_one_line_and_no_run(root, tmp_path):
    disk = tmp_path / "disk"
    # one block is taken by the folder of the run itself; nothing is left that a second start would take for a run
    assert on_a_small_disk(disk, "4k", words(root, disk / "run")) == []


def write_without_end(path: Path) -> None:
    lines = JsonLines(path)
    for t in itertools.count():
        lines.write({"round": t, "values": list(range(300))})


def test_what_a_killed_process_wrote_is_valid(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = begin(write_without_end, path)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (path.exists() and path.stat().st_size > 50_000):
            time.sleep(0.002)
    finally:
        writer.kill()
        writer.join()
    records = read_lines(path)
    assert len(records) > 20 and [r["round"] for r in records] == list(range(len(records)))
    assert len(path.read_bytes().split(b"\n")[-1]) < len(json.dumps(records[-1])) + 1  # at most the last line is torn
    JsonLines(path, keep_before=10).close()
    assert read_lines(path) == records[:10]


def loaded() -> set[str]:
    return set(sys.modules)


def test_trackers_are_not_imported_unless_asked_for():
    found = run_alone(loaded)  # the server these are forked from has imported dfl.run.train
    assert "dfl.run.train" in found and not {"tensorboard", "wandb", "mlflow", "torch.utils.tensorboard"} & found


def test_a_mistake_is_one_line_of_the_real_command_without_a_trace(root, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "DFL_TRACEBACK"}
    done = subprocess.run([sys.executable, "-m", "dfl", *words(root, tmp_path / "run", data__label="lable")],
                          cwd=Path(__file__).parents[2], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("dfl: data.label = 'lable'") and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def _trains_without_a_collection(argv: list[str]) -> list[str]:
    gc.disable()
    assert main(argv) == 0
    left = [type(one).__name__ for one in gc.get_objects() if isinstance(one, Group)]
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("dfl-")]
    for thread in threads:
        thread.join(5)
    return left + [thread.name for thread in threads if thread.is_alive()]


def test_a_group_and_its_threads_go_with_their_run(root, tmp_path):
    """In a circle it would go with a garbage collection, behind the file where the processes met; its store opens that once more when
    it goes, and C++ ends the process where it cannot."""
    assert run_alone(_trains_without_a_collection, words(root, tmp_path / "run", processes=2, train__rounds=2)) == []
