"""The ways to start a run that outlives its processes, as launch/SURVIVORS.md has them."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import workplace
import yaml
from ports import free_ports

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


class Services:
    """What systemd makes of the file: its lines, as they stand there, for process %i, but with / at `root`."""

    def __init__(self, root: Path):
        self.root, self.running = root, {}
        lines = (ROOT / "launch/dfl@.service").read_text().splitlines()
        self.fields = [tuple(line.split("=", 1)) for line in lines if "=" in line and not line.startswith("#")]

    def of(self, name: str, process: int) -> list[str]:
        found = [value.replace("%i", str(process)) for key, value in self.fields if key == name]
        return [re.sub("/(?=etc/dfl|var/lib/dfl|opt/dfl)", f"{self.root}/", value) for value in found]

    def start(self, process: int) -> None:
        env = {}
        for file in self.of("EnvironmentFile", process):
            path = Path(file.removeprefix("-"))
            if path.exists() or not file.startswith("-"):
                env |= dict(line.split("=", 1) for line in path.read_text().splitlines())
        [command], [folder] = self.of("ExecStart", process), self.of("WorkingDirectory", process)
        with (self.root / f"log-{process}.txt").open("a") as log:
            self.running[process] = subprocess.Popen(shlex.split(command), cwd=folder, env=workplace.ENVIRONMENT | env, stdout=log,
                                                     stderr=log, stdin=subprocess.DEVNULL)

    def said(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.root.glob("log-*.txt")))


@pytest.fixture
def services(place, tmp_path):
    """Three of them, which know the address of the first."""
    for folder in ("etc/dfl", "opt/dfl/bin", "var/lib"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "var/lib/dfl").symlink_to(place)
    (tmp_path / "opt/dfl/bin/dfl").symlink_to(shutil.which("dfl", path=workplace.ENVIRONMENT["PATH"]))
    [port] = free_ports(1)
    recipe = yaml.safe_load((place / "my.yaml").read_text())
    recipe |= {"membership": {"mode": "survive", "patience": 5}, "output": "runs/service"}
    recipe["train"]["rounds"] = 10**6
    (place / "service.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "etc/dfl/run.env").write_text(f"DFL_SIZE=3\nDFL_RECIPE=service.yaml\nDFL_MEMBERS=127.0.0.1:{port}\n")
    (tmp_path / "etc/dfl/process-0.env").write_text(f"DFL_LISTEN=127.0.0.1:{port}\n")
    made = Services(tmp_path)
    yield made
    for process in made.running.values():
        process.kill()


def test_the_line_of_the_service_starts_a_process_and_starts_it_again(place, services):
    def last(process: int) -> dict:
        path = place / f"runs/service/process-{process}/metrics.jsonl"
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        return json.loads(lines[-1]) if lines else {"round": -1, "alive": []}

    for process in range(3):
        services.start(process)
    workplace.wait_for(lambda: last(0)["round"] >= 5 and last(0)["alive"] == [0, 1, 2, 3], 120, services.said)
    services.running[0].kill()
    workplace.wait_for(lambda: last(1)["alive"] == last(2)["alive"] == [2, 3], 60, services.said)
    assert services.running[0].wait(10) == -signal.SIGKILL and services.of("Restart", 0) == ["on-failure"]
    services.start(0)
    workplace.wait_for(lambda: last(0)["alive"] == last(1)["alive"] == [0, 1, 2, 3], 120, services.said)
    for process in range(3):
        services.running[process].terminate()  # as a stop does
    assert [services.running[process].wait(60) for process in range(3)] == [75] * 3, services.said()
    assert not re.search("Traceback|terminate called", services.said()), services.said()
    (place / "service.yaml").write_text("peers: none\n")
    services.start(0)
    assert str(services.running[0].wait(60)) in services.of("RestartPreventExitStatus", 0)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze; on Debian: apt-get install systemd")
def test_the_service_is_one(tmp_path):
    unit = tmp_path / "dfl@.service"
    unit.write_text((ROOT / "launch/dfl@.service").read_text().replace("/opt/dfl/bin/dfl", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    assert str(unit) not in done.stderr and "dfl@" not in done.stderr, done.stderr
