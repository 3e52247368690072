"""One writer a folder: who gets a lease, who is refused, whose lease is taken over and when, and what a lost one stops."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dfl.store import lease
from dfl.store.lease import LeaseLostError, acquiring, owners
from dfl.transport import InProcess

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def fast(monkeypatch):
    """Twenty times as fast as for users, in the same proportions."""
    for name in ("HEARTBEAT_SECONDS", "EXPIRY_SECONDS", "DOUBT_SECONDS", "DYING_SECONDS"):
        monkeypatch.setattr(lease, name, getattr(lease, name) / 20)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.01)


def hold(folder):
    return lease.hold(folder, InProcess())


def held_by(folder: Path, **changes) -> Path:
    """The file of a lease of somebody else."""
    (folder / ".dfl").mkdir(parents=True, exist_ok=True)
    owner = lease._this_process(1)._replace(**changes)
    lease._put(folder, owner)
    return folder / ".dfl" / "lease-00000001.json"


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_lease_is_given_back_and_nothing_is_left(folder):
    held = hold(folder / "a" / "b")
    held.check()
    assert [owner.pid for owner in owners(folder / "a" / "b")] == [os.getpid()]
    held.release()
    assert not folder.exists()  # nothing was begun


def test_a_folder_with_a_run_or_of_somebody_stays(folder):
    held = hold(folder)
    (folder / "recipe.yaml").write_text("")
    held.release()
    assert sorted(os.listdir(folder)) == [".dfl", "recipe.yaml"] and owners(folder) == []
    mine = folder.parent / "mine"
    mine.mkdir()
    hold(mine).release()
    assert mine.is_dir() and os.listdir(mine) == []


def test_a_living_owner_is_named_and_keeps_its_lease(folder, fast):
    held = hold(folder)
    with pytest.raises(ValueError, match=rf"in use by another run: process {os.getpid()} on .+, since \d{{4}}-.*--output"):
        hold(folder)
    held.check()
    held.release()
    hold(folder).release()


def test_a_living_process_keeps_its_lease_without_a_heartbeat(folder, fast):
    """It may be stopped, or at work for long: on its own machine its process decides, not a clock."""
    path = held_by(folder)
    os.utime(path, (0, 0))
    with pytest.raises(ValueError, match="in use"):
        hold(folder)


@pytest.mark.parametrize("changes", [{"pid": None}, {"started": 17}])
def test_a_dead_owner_on_this_machine_is_followed_at_once(folder, changes):
    """Its process has gone, or another has its number now."""
    held_by(folder, **(changes if changes.get("started") else {"pid": dead_process()}))
    started = time.monotonic()
    held = hold(folder)
    assert time.monotonic() - started < 0.5
    assert [owner.token for owner in owners(folder)] == [held.token] and held.number == 2
    held.release()


def test_a_process_that_is_just_ending_is_waited_for(folder):
    """As after SIGKILL of a launcher: its worker dies a moment later."""
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    held_by(folder, pid=worker.pid, started=lease.started(worker.pid))
    threading.Timer(0.4, worker.kill).start()
    held = hold(folder)
    held.release()
    worker.wait()


def test_what_is_on_its_way_out_is_told_from_what_is_stopped():
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    worker.send_signal(signal.SIGSTOP)
    assert not lease.ending(worker.pid) and not lease.ending(2 ** 22 + 1)
    worker.kill()
    while lease.started(worker.pid):
        time.sleep(0.01)
    assert lease.ending(worker.pid)  # a zombie, until it is waited for
    worker.wait()


ELSEWHERE = [{"boot": "another"}, {"namespace": "pid:[1]"}, {"boot": "another", "host": "elsewhere"}]


@pytest.mark.long
@pytest.mark.parametrize("changes", ELSEWHERE)
def test_an_owner_that_cannot_be_seen_is_followed_after_the_stated_time(folder, fast, capsys, changes):
    """A host of the same name, a container of the same machine, another host: process numbers mean nothing there."""
    held_by(folder, pid=dead_process(), **changes)
    started = time.monotonic()
    hold(folder).release()
    assert 0.9 * lease.EXPIRY_SECONDS < time.monotonic() - started < 2 * lease.EXPIRY_SECONDS
    assert "cannot be seen from here; it is taken over unless that run shows a heartbeat within 3 s" in capsys.readouterr().err


@pytest.mark.parametrize("by", [-3600, -30, 0, 3600])
def test_a_heartbeat_keeps_a_lease_whatever_the_clocks_say(folder, fast, by):
    """The clock of the file system, or of the owner, is wrong by an hour; the heartbeat goes on."""
    path, ended = held_by(folder, boot="another"), threading.Event()

    def beat():
        while not ended.wait(lease.HEARTBEAT_SECONDS):
            os.utime(path, (time.time() + by, time.time() + by))

    os.utime(path, (time.time() + by, time.time() + by))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match="in use by another run"):
            hold(folder)
    finally:
        ended.set()
        thread.join()


def test_a_lease_that_was_silent_for_hours_is_watched_for_a_short_time_only(folder, fast):
    os.utime(held_by(folder, boot="another"), (0, 0))
    started = time.monotonic()
    hold(folder).release()
    assert 0.9 * lease.DOUBT_SECONDS < time.monotonic() - started < 0.9 * lease.EXPIRY_SECONDS


def test_the_owner_shows_heartbeats(folder, fast):
    held = hold(folder)
    first = held._path.stat().st_mtime_ns
    time.sleep(3 * lease.HEARTBEAT_SECONDS)
    assert held._path.stat().st_mtime_ns > first
    held.release()


def test_who_was_taken_over_writes_nothing_more(folder):
    """As after a sleep of its machine: the successor is named, and the late release does not take its lease away."""
    held = hold(folder)
    text = json.loads(held._path.read_text())
    held._path.write_text(json.dumps(text | {"boot": "another", "pid": dead_process()}))
    path = folder / ".dfl" / "lease-00000002.json"
    path.write_text(json.dumps(text | {"token": "other", "pid": 77}))
    held._path.unlink()
    with pytest.raises(LeaseLostError, match="no longer this run's: process 77 on .* writes there"):
        held.check()
    held.release()
    assert path.exists()


def test_a_folder_that_was_removed_is_noticed(folder):
    held = hold(folder)
    for path in (*(folder / ".dfl").iterdir(), folder / ".dfl", folder):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(LeaseLostError, match="its lease was removed"):
        held.check()
    held.release()
    assert not folder.exists()


def test_one_of_many_gets_the_lease_of_a_dead_one(folder, monkeypatch):
    """In every order of their steps: each looks, and all find the owner dead, before the first takes over."""
    monkeypatch.setattr(lease, "lives", lambda owner: False if owner.token == "dead" else True)
    monkeypatch.setattr(lease, "DYING_SECONDS", 0.2)
    for number in range(5):
        here = folder / str(number)
        held_by(here, token="dead", pid=dead_process())
        barrier, got, refused = threading.Barrier(8), [], []

        def contend(here=here, barrier=barrier, got=got, refused=refused):
            barrier.wait()
            try:
                got.append(next(one for one in acquiring(here) if one is not None))
            except ValueError:
                refused.append(1)

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1 and len(refused) == 7
        got[0].check()
        assert len(owners(here)) == 1
        got[0].release()


def test_a_file_system_without_links(folder, monkeypatch):
    def no_links(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    held = hold(folder)
    held.check()
    assert lease._create(folder, [], ()) is None  # it is there, and not replaced
    held.check()
    held.release()


def test_a_link_is_no_place_for_a_lease(folder):
    folder.mkdir()
    (folder.parent / "else").mkdir()
    (folder / ".dfl").symlink_to(folder.parent / "else")
    with pytest.raises(ValueError, match="symbolic link"):
        hold(folder)
    assert os.listdir(folder.parent / "else") == []
