"""A run whose messages go over zenoh: the bits of any other, and it goes on without whoever is lost."""

import signal
import subprocess
import sys
import time

import pytest
from members import Group, tree_of
from tiny_runs import adapter_digests, arguments, make_folder

from dfl.config import from_dict
from dfl.run.replay import replay
from dfl.run.train import train
from dfl.store.collect import collect
from dfl.transport.certificates import make

pytest.importorskip("zenoh", reason="needs zenoh: pip install 'dfl[zenoh]'")
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("zenoh"))


def group(place, tmp_path, size=3, env=None, **fields) -> Group:
    given = {"peers": 3, "membership__mode": "survive", "membership__transport": "zenoh", "membership__patience": 1.5,
             "train__rounds": 30, "eval__every": 10} | fields
    return Group(tmp_path, arguments(place / "bert", place / "data.csv", tmp_path / "run", **given), size, env)


def with_certificates(tmp_path) -> dict[str, str]:
    make(tmp_path / "certificates", 3)
    return {"DFL_CERTIFICATES": str(tmp_path / "certificates")}


@pytest.mark.parametrize("certificates", [False, True])
def test_nobody_leaves_and_the_bits_are_those_of_a_run_over_gloo(place, tmp_path, certificates):
    words = arguments(place / "bert", place / "data.csv", tmp_path / "fixed", peers=3, train__rounds=4)
    assert train(from_dict(tree_of(words))) == 0
    with group(place, tmp_path, env=with_certificates(tmp_path) if certificates else None, train__rounds=4) as run:
        for process in range(3):
            run.start(process)
        assert [run.wait(process) for process in range(3)] == [0] * 3, run.everything()
    assert collect(tmp_path / "run") == (4, [0, 1, 2])
    assert adapter_digests(tmp_path / "run") == adapter_digests(tmp_path / "fixed")


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_others_go_on_within_patience_and_who_was_lost_comes_back(place, tmp_path, how):
    """Killed, it is known to be gone at once; stopped, after the patience, and it is told so when it goes on."""
    with group(place, tmp_path, env=with_certificates(tmp_path), train__rounds=10**6, eval__every=10**6) as run:
        for process in range(3):
            run.start(process)
        run.until_round(1, 3)
        run.kill(0, signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        until_alive(run, 1, [1, 2])
        if how == "stopped":
            assert "has shown no life for 1.5 s" in run.said(1) + run.said(2), run.everything()
            run.kill(0, signal.SIGCONT)
        assert run.wait(0) != 0
        run.start(0, resume=True)
        until_alive(run, 1, [0, 1, 2])
        for process in range(3):
            run.kill(process, signal.SIGTERM)
        assert [run.wait(process) for process in range(3)] == [75] * 3, run.everything()
        for process in range(3):
            assert "Traceback" not in run.said(process) and "panicked" not in run.said(process), run.everything()
        assert replay(tmp_path / "run").all


CODE = """
import os, signal, subprocess, sys, time
from dfl.transport.zenoh_mail import ZenohMail
process, port = int(sys.argv[1]), int(sys.argv[2])
mail = ZenohMail(process, 2, secret=b"", about={}, check=lambda *_: "", patience=2.0)
mail.meet([("127.0.0.1", port)] if port else [])
if process:
    time.sleep(120)
other = subprocess.Popen([sys.executable, sys.argv[3], "1", str(mail.book[0][1])])
while not mail.connected():
    time.sleep(0.01)
os.kill(other.pid, signal.SIGSTOP)
mail.send(1, bytes(50_000_000))
time.sleep(0.5)
mail.close()
other.kill()
print("closed")
"""


@pytest.mark.clock
def test_a_process_ends_cleanly_beside_one_that_is_stopped_and_takes_nothing(tmp_path):
    """A thread that waits for it within zenoh may not be there any more when the interpreter ends, which would abort the process."""
    script = tmp_path / "script.py"
    script.write_text(CODE)
    done = subprocess.run([sys.executable, str(script), "0", "0", str(script)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


def until_alive(run: Group, process: int, alive: list[int], seconds: float = 60.0) -> None:
    """Until the last round that a process has recorded had these."""
    until = time.monotonic() + seconds
    while run.lines(process)[-1]["alive"] != alive:
        assert time.monotonic() < until and run.workers[process].is_alive(), run.everything()
        time.sleep(0.02)
