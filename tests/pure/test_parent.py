"""A worker ends with the launcher that started it, and a process of nobody's does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dfl.run import parent

LAUNCHER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(worker.pid, flush=True)
worker.wait()
"""
WORKER = """
import sys, time
from dfl.run import parent
{asked}
print("ready", flush=True)
time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start(asked: str, **environment: str) -> tuple[subprocess.Popen, int]:
    """A launcher, and the process id of its worker, which does `asked` before it says that it is ready."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, WORKER.format(asked=asked)], stdout=subprocess.PIPE, text=True,
                                env=os.environ | environment, start_new_session=True)
    pid = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "ready\n"
    return launcher, pid


def gone_after_kill(launcher: subprocess.Popen, pid: int, seconds: float) -> bool:
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not alive(pid)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc")
@pytest.mark.parametrize("asked", ["parent.end_with_launcher()",
                                   "sys.platform = 'other'; parent.end_with_launcher()"])
def test_a_worker_of_torchrun_is_gone_a_second_after_its_agent(asked):
    """Told by the kernel, and on a system that has to be asked."""
    assert gone_after_kill(*start(asked, TORCHELASTIC_RUN_ID="none"), 1.5)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="looks for processes in /proc")
def test_a_process_of_a_shell_outlives_it():
    launcher, pid = start("parent.end_with_launcher()")
    try:
        assert not gone_after_kill(launcher, pid, 0.8)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_parent_that_has_gone_before_is_noticed():
    done = subprocess.run([sys.executable, "-c", "from dfl.run import parent; parent.end_with(2 ** 22 + 1); print('here')"],
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and done.stdout == ""


@pytest.mark.parametrize("first, launcher", [
    ("/sbin/init\0", False), ("/usr/bin/tini\0--\0torchrun\0", False), ("bash\0", False),
    ("/usr/bin/python3.12\0-m\0torch.distributed.run\0", True), ("/opt/bin/torchrun\0", True)])
def test_process_1_is_a_launcher_or_adopts_orphans(tmp_path, first, launcher):
    (tmp_path / "cmdline").write_text(first)
    assert parent._init_is_launcher(tmp_path / "cmdline") is launcher
