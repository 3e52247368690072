"""Every command into a pipe that nobody reads: no word on standard error, and the status of a program that SIGPIPE has ended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_runs import record, write_run

from dfl.cli import main

ROOT = Path(__file__).parent.parent.parent
COMMANDS = {"help": ["--help"], "help of a command": ["train", "--help"], "list": ["list"], "report": ["report", "run"],
            "watch": ["watch", "run"], "frame of watch": ["watch", "run", "--once"]}


def into_nothing(folder, words, **streams) -> subprocess.CompletedProcess:
    """What a command does whose streams without a value here are a pipe that is closed at the other end."""
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run([sys.executable, "-m", "dfl", *words], cwd=folder, stdin=subprocess.DEVNULL, timeout=120,
                              env=os.environ | {"PYTHONPATH": str(ROOT)},
                              **{name: write if stream is None else stream for name, stream in streams.items()})
    finally:
        os.close(write)


@pytest.mark.long
@pytest.mark.parametrize("name, unbuffered", [*((name, "") for name in COMMANDS), ("help", "1")])
def test_a_command_ends_without_a_word(tmp_path, monkeypatch, name, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    write_run(tmp_path / "run", [record(0, [0.5, 0.5]), record(1, [0.6, 0.6])])
    done = into_nothing(tmp_path, COMMANDS[name], stdout=None, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr.decode()) == (141, "")


@pytest.mark.long
def test_nobody_reads_the_errors_either(tmp_path):
    assert into_nothing(tmp_path, ["report", "nowhere"], stdout=None, stderr=None).returncode == 141
    assert into_nothing(tmp_path, ["report", "nowhere"], stdout=subprocess.DEVNULL, stderr=None).returncode == 141
    done = into_nothing(tmp_path, ["report", "nowhere"], stdout=None, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.startswith(b"dfl: 'nowhere' holds no run")  # nothing was to be written there


def test_another_broken_pipe_is_an_error_like_others(monkeypatch, capsys):
    from dfl.cli import listing

    def broken(args, overrides):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(listing, "run", broken)
    assert main(["list"]) == 1 and capsys.readouterr().err == "dfl: [Errno 32] Broken pipe\n"
