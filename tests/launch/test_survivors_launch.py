"""The ways to start a run that outlives its processes, as launch/SURVIVORS.md has them."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import workplace
from members import free_ports

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]
ROOT = workplace.ROOT
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "launch/SURVIVORS.md").read_text(), re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return workplace.make(tmp_path_factory.mktemp("survivors"), rounds=40)


def test_the_trial_on_one_machine(place):
    said = workplace.run(place, "bash", "-ec", BLOCKS[0])
    assert "40 rounds; losses the same in 40; rows of peers 0, 1, 2, 3 at the end: the same bits" in said
    # with nobody lost, the bits of a run that cannot lose anybody
    import tiny_runs
    assert tiny_runs.adapter_digests(place / "runs/many") == workplace.plain_digests(place)


def test_several_sites_on_one_machine(place):
    pytest.importorskip("zenoh", reason="needs zenoh: pip install 'dfl[zenoh]'")
    [block] = [block for block in BLOCKS if "dfl certificates" in block]
    ports = free_ports(3)
    block = block.replace("127.0.0.1:29710", f"127.0.0.1:{ports[0]}").replace("2971$k", "${ports[$k]}")
    workplace.run(place, "bash", "-ec", f"ports=({' '.join(map(str, ports))})\n{block}", timeout=300)
    import tiny_runs
    assert tiny_runs.adapter_digests(place / "runs/wide") == workplace.plain_digests(place)
    assert "certificates" in {path.name for path in (place / "runs/wide").iterdir()}
    assert workplace.run(place, "dfl", "collect", "runs/wide").startswith("runs/wide: 40 rounds")  # again, and nothing is lost
    assert (place / "runs/wide/certificates/process-2.key").is_file()


def children(pid: int) -> list[int]:
    return [int(word) for word in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


def test_processes_started_one_by_one_and_again(place):
    """A killed process is started again by what watches it, and comes back; with `member.sh` and an agent of torchrun for itself."""
    [block] = [block for block in BLOCKS if "member.sh" in block]
    [port] = free_ports(1)
    block = block.replace("29700", str(port)).replace("my.yaml", "long.yaml")
    recipe = (place / "my.yaml").read_text().replace("rounds: 40", "rounds: 600")
    (place / "long.yaml").write_text(recipe)
    job = subprocess.Popen(["bash", "-c", block], cwd=place, env=workplace.ENVIRONMENT, stdout=subprocess.DEVNULL,
                           stderr=open(place / "log.txt", "w"), start_new_session=True)
    try:
        def log() -> str:
            return (place / "log.txt").read_text()

        workplace.wait_for(lambda: workplace.rounds_recorded(place / "runs/alone/process-1") > 5, 120, log)
        scripts = [pid for pid in children(job.pid) if "member.sh" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(children(scripts[0])[0], signal.SIGKILL)
        workplace.wait_for(lambda: "0, 1 came" in log(), 120, log)
        came = workplace.rounds_recorded(place / "runs/alone/process-1")
        workplace.wait_for(lambda: workplace.rounds_recorded(place / "runs/alone/process-0") > 12, 60, log)
        assert came < 590
        assert "Traceback" not in log() and "terminate called" not in log(), log()
    finally:
        try:
            os.killpg(job.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    done = subprocess.run(["dfl", "replay", "runs/alone"], cwd=place, env=workplace.ENVIRONMENT, capture_output=True, text=True)
    rounds, same = re.match(r"(\d+) rounds; losses the same in (\d+);", done.stdout).groups()  # the last checkpoint is an older one
    assert rounds == same and int(rounds) >= came, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze; on Debian: apt-get install systemd")
def test_the_service_is_one(tmp_path):
    unit = tmp_path / "dfl@.service"
    unit.write_text((ROOT / "launch/dfl@.service").read_text().replace("/opt/dfl/bin/dfl", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert str(unit) not in done.stderr and "dfl@" not in done.stderr, done.stderr
