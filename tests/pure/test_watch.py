"""The live view: what a frame says, lines in a pipe, runs that have not begun, grow, are torn, or are replaced on resume."""

import fcntl
import io
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from made_up_runs import record, write_run, write_sweep

from dfl.cli import main
from dfl.report import live
from dfl.store.checkpoints import folder_of
from dfl.store.records import JsonLines
from dfl.store.runs import read_run

pytest.importorskip("rich")
ROOT = Path(__file__).parents[2]
RECORDS = [record(0, [0.1, 0.1], 0.1), record(1), record(2, [0.4, 0.6], 0.55)]


def once(folder, capsys) -> str:
    capsys.readouterr()
    assert main(["watch", str(folder), "--once"]) == 0
    return capsys.readouterr().out


def test_a_frame_says_how_far_a_run_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = once(write_run(tmp_path / "run", RECORDS, rounds=10), capsys)
    # twelve seconds a round, eight rounds to go
    assert "2/10, left 1:36" in text and "loss 0.500  trains A+B  distance 1.5" in text
    assert "accuracy 0.5000 (0.4000 to 0.6000)  consensus 0.5500  sent 0.0 MB" in text
    assert [line.split() for line in text.splitlines()[-4:]] == [
        ["mean", "0.5000", "0.5000", "▁█"], ["consensus", "0.5500", "0.5500", "▁█"], ["0", "0.4000", "0.4000", "▁█"],
        ["1", "0.6000", "0.6000", "▁█"]]
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    run = write_run(tmp_path / "r", [record(t, [0.5] * 30, 0.5) for t in range(90)], rounds=100, peers=30)
    sweep = write_sweep(tmp_path / "s", {"a-run-with-a-long-name-p0.5-seed3": {"seed": 0}, "b": {"seed": 1}})
    for folder in (run, sweep):
        lines = once(folder, capsys).splitlines()
        assert max(map(len, lines)) <= width
        assert len(lines) > 4


def test_a_sparkline_spans_lowest_to_highest():
    assert live.sparkline([0.0, 0.5, 1.0], 10) == "▁▅█" and live.sparkline([1.0, None, 0.0, 1.0], 3) == " ▁█"
    assert live.sparkline([2.0, 2.0], 5) == "▁▁" and live.sparkline([None], 5) == " " and live.sparkline([], 5) == ""
    assert live.sparkline([1.0, 2.0], 0) == ""


def test_what_was_not_finite_and_what_is_not_there_yet(tmp_path, capsys):
    text = once(write_run(tmp_path / "run", [record(1, [None, 0.5], train_loss={"mean": None}, measures=None)], rounds=2), capsys)
    assert "accuracy – (0.5000 to 0.5000)" in text and "loss" not in text
    assert "no round is recorded yet" in once(write_run(tmp_path / "new", [], rounds=2), capsys)
    bare = write_run(tmp_path / "bare", [], rounds=2)
    (bare / "metrics.jsonl").unlink()
    assert "no round is recorded yet" in once(bare, capsys)


def test_a_run_that_has_fallen_silent_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", RECORDS, rounds=10)
    assert "nothing new" not in once(run, capsys)
    os.utime(run / "metrics.jsonl", (time.time() - 600, time.time() - 600))
    assert "nothing new for 10:0" in once(run, capsys)
    write_run(run, RECORDS)  # ended: silence is what it should be
    os.utime(run / "metrics.jsonl", (time.time() - 600, time.time() - 600))
    assert "nothing new" not in once(run, capsys)


def test_more_peers_than_lines(tmp_path):
    from rich.console import Console
    run = read_run(write_run(tmp_path / "run", [record(1, [0.5] * 50)], rounds=2, peers=50))
    console = Console(file=io.StringIO(), width=80, height=24)
    console.print(live.run_frame(run, run.folder, 80, 24))
    text = console.file.getvalue()
    assert "38 more" in text and len(text.splitlines()) <= 24


def test_a_run_that_has_ended_waits_for_its_baseline(tmp_path):
    run = write_run(tmp_path / "run", RECORDS, baseline="local")
    assert not live.ended(read_run(run))
    write_run(run / "baseline-local", RECORDS[:2], method="local", rounds=2)
    assert not live.ended(read_run(run))
    write_run(run / "baseline-local", RECORDS, method="local")
    assert live.ended(read_run(run))


def test_lines_follow_a_run_from_before_it_begins_through_a_resume_to_its_end(tmp_path):
    folder, said = tmp_path / "run", []
    follower = threading.Thread(target=lambda: [said.append(line) for line in live.lines(folder, 0.01)], daemon=True)
    follower.start()

    def until(text):
        deadline = time.monotonic() + 30
        while text not in " ".join(said) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert text in " ".join(said), said

    until("waiting for the run to begin")
    write_run(folder, [], rounds=4)
    until("no round is recorded yet")
    lines = JsonLines(folder / "metrics.jsonl")
    lines.write(record(0, [0.1, 0.1]))
    lines.write(record(1, [0.2, 0.4]))
    until("round 1/4  loss 1.000  trains A+B  distance 3  accuracy 0.3000 (0.2000 to 0.4000)  sent 0.0 MB  left 0:36")
    lines.write(record(2, [0.3, 0.4]))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"round": 3, "eval"')  # torn by a kill
    until("accuracy 0.3500")
    lines.close()
    lines = JsonLines(folder / "metrics.jsonl", keep_before=2)  # a resume writes a new file
    until("left 0:36")
    lines.write(record(2, [0.3, 0.6]))
    until("accuracy 0.4500")
    lines.write(record(3))
    lines.write(record(4, [0.9, 0.9]))
    lines.close()
    until("round 4/4")
    follower.join(10)
    assert not follower.is_alive() and "0.9000" in said[-1] and "left" not in said[-1]


def test_a_pipe_gets_plain_lines_through_the_command(tmp_path):
    run = write_run(tmp_path / "run", RECORDS)
    done = subprocess.run([sys.executable, "-m", "dfl", "watch", str(run)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == ("round 2/2  loss 0.500  trains A+B  distance 1.5  accuracy 0.5000 (0.4000 to 0.6000)  consensus 0.5500  "
                           "sent 0.0 MB\n")


def on_a_terminal(*words: str, columns: int = 80):
    """The process and the other end of its terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-m", "dfl", "watch", *words], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
                               env=environment, start_new_session=True)
    os.close(theirs)
    return process, ours


def read_until(ours: int, text: str, seconds: float = 60) -> str:
    found, deadline = "", time.monotonic() + seconds
    while text not in found and select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            found += os.read(ours, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            break
    assert text in found, found[-500:]
    return found


@pytest.mark.timeout(120)
def test_a_terminal_gets_a_frame_that_grows_and_the_view_leaves_with_the_run(tmp_path):
    run = write_run(tmp_path / "run", RECORDS[:2], rounds=2)
    process, ours = on_a_terminal(str(run), "--every", "0.05")
    try:
        read_until(ours, "1/2")
        lines = JsonLines(run / "metrics.jsonl")
        lines.write(RECORDS[2])
        lines.close()
        assert "0.6000" in read_until(ours, "\x1b[?25h")  # the cursor is shown again
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("every", ["0.001", "100"])
def test_ctrl_c_leaves_quietly(tmp_path, every):
    """In the middle of a frame as well as between two, and without waiting for the next."""
    process, ours = on_a_terminal(str(tmp_path / "not-yet"), "--every", every)
    try:
        read_until(ours, "waiting")
        process.send_signal(signal.SIGINT)
        rest = read_until(ours, "\x1b[?25h")
        assert process.wait(30) == 0 and "Traceback" not in rest
    finally:
        process.kill()
        os.close(ours)


INTERRUPTED = """
from dfl.report.live import _between_frames

while True:
    with _between_frames() as interrupted_within:
        print("waits", flush=True)
        while not interrupted_within(1e-9):
            pass
"""


@pytest.mark.timeout(60)
def test_ctrl_c_between_any_two_steps_of_the_wait_for_it_is_heard():
    """At a thousand places of it. A lock that the wait holds and the handler takes would never be free again."""
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED], cwd=ROOT, stdout=subprocess.PIPE, bufsize=0)
    try:
        for turn in range(1000):
            assert select.select([process.stdout], [], [], 20)[0] and process.stdout.readline() == b"waits\n"
            until = time.monotonic() + 1e-6 * (turn % 100)
            while time.monotonic() < until:
                pass
            process.send_signal(signal.SIGINT)
    finally:
        process.kill()
        process.wait()


def finish(run: Path, rounds: int) -> None:
    """A checkpoint after `rounds` rounds: a sweep takes a run for finished by it."""
    folder = folder_of(run, rounds)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"rounds": rounds, "sha256": {}}))


def test_a_sweep_ends_when_all_runs_have_ended_or_failed(tmp_path, capsys):
    sweep = write_sweep(tmp_path / "sweep", {name: {"seed": k} for k, name in enumerate("abc")})
    finish(write_run(sweep / "a", RECORDS), 2)
    write_run(sweep / "b", RECORDS[:2], rounds=2, seed=1)
    text = once(sweep, capsys)
    assert "1 finished, 1 begun, 1 waiting of 3 runs" in text
    cells = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:2] in ("a ", "b ", "c ")}
    assert cells == {"a": ["finished", "2/2", "–", "0.5000"], "b": ["begun", "1/2", "0:12", "0.1000"], "c": ["waiting", "–", "–", "–"]}
    said = []
    follower = threading.Thread(target=lambda: [said.append(line) for line in live.lines(sweep, 0.01)], daemon=True)
    follower.start()
    finish(write_run(sweep / "b", RECORDS, seed=1), 2)
    (sweep / "logs").mkdir()
    (sweep / "logs" / "c.failed.json").write_text('{"error": "no data"}')
    follower.join(30)
    assert not follower.is_alive() and said[-1] == "2 finished, 1 failed of 3 runs"
    assert "c: no data" in once(sweep, capsys)


@pytest.mark.parametrize("words, said", [
    (["{none}", "--once"], "none' holds no run (no recipe.yaml in it)"), (["{file}"], "is a file, not the folder of a run"),
    (["{none}", "--every", "0"], "every = 0.0 must be more than 0 seconds")])
def test_what_cannot_be_watched_is_refused_in_one_line(words, said, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["watch", *(word.format(none=tmp_path / "none", file=tmp_path / "file") for word in words)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dfl: ") and err.count("\n") == 1 and said in err
