"""Peers of several processes as a user starts them: under torchrun, by the command itself, stopped by a signal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import workplace
from tiny_runs import adapter_digests, rows_of

from dfl.store.checkpoints import latest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: an every_rule is there too
import kill_loop

pytestmark = [pytest.mark.launch, pytest.mark.timeout(300)]


def test_readme_on_a_peer_of_several_processes(tmp_path):
    """As written; torchrun's processes have no group of their own, those of the command meet in a file."""
    place = workplace.make(tmp_path, rounds=4)
    for block in workplace.readme_blocks("A peer of several processes"):
        workplace.run(place, "bash", "-euc", block, timeout=240)
    found = [adapter_digests(place / "runs" / name) for name in ("parts", "plain-parts")]
    assert len(found[0]) == 5 and found[0] == found[1]
    workplace.plain_digests(place)
    rows = [rows_of(latest(place / "runs" / name), 4) for name in ("parts", "plain")]
    torch.testing.assert_close(*rows, rtol=0, atol=1e-5)


def test_a_signal_to_one_stops_all_and_nothing_is_lost(tmp_path):
    place = workplace.make(tmp_path)
    words = [sys.executable, "-m", "dfl", "train", "my.yaml", "--processes", "4", "--processes_per_peer", "2", "--output"]
    job = subprocess.Popen([*words, "runs/halves"], cwd=place, env=workplace.ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    workplace.wait_for(lambda: workplace.rounds_recorded(place / "runs/halves") > 5, 120, lambda: job.poll())
    os.kill(max(kill_loop.children(job.pid)), signal.SIGTERM)  # the last one that was forked, which serves process 2
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 75, said
    workplace.run(place, *words, "runs/halves", "--resume", timeout=200)
    workplace.run(place, *words, "runs/whole", timeout=200)
    assert adapter_digests(place / "runs/halves") == adapter_digests(place / "runs/whole")
