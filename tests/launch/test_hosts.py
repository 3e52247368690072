"""torchrun over several hosts, which are network namespaces of this machine: the same bits, slow links, hosts that come and go."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
from pathlib import Path

import hosts as network
import pytest
import workplace
from tiny_runs import adapter_digests

pytestmark = [pytest.mark.launch, pytest.mark.clock, pytest.mark.timeout(600)]
# seconds after which a silent host counts as lost, and that are waited for one more host where fewer would do
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return workplace.make(tmp_path_factory.mktemp("hosts"))


@pytest.fixture
def hosts():
    if network.missing():
        pytest.skip(f"no hosts: {network.missing()}")
    with network.Hosts(2) as made:
        yield made


@contextlib.contextmanager
def torchrun(hosts: network.Hosts, name: str, place: Path, output: str, *words: str, nodes: str = "2", restarts: str = "0"):
    """A host's part of a run, and what it prints in a file; whatever is left of it ends with the block."""
    command = ["torchrun", "--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host1:29500",
               "--rdzv-id", "my", "--rdzv-conf", QUICK, "--max-restarts", restarts, "-m", "dfl", "train", "my.yaml",
               "--output", output, "--resume", *words]
    with (place / f"{name}.log").open("w") as log:
        process = hosts.start(name, *command, cwd=place, env=workplace.ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        yield process
        for pid in hosts.processes(name):
            os.kill(pid, signal.SIGKILL)


def said(place: Path, name: str) -> str:
    return (place / f"{name}.log").read_text()


def reach(place: Path, output: str, rounds: int) -> None:
    """Wait until a run has recorded so many rounds and is still at it."""
    workplace.wait_for(lambda: workplace.rounds_recorded(place / output) >= rounds, 120,
                       lambda: [path.read_text() for path in place.glob("host*.log")])
    assert workplace.rounds_recorded(place / output) < workplace.ROUNDS


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][1:]


def test_two_hosts_and_a_slow_link(place, hosts):
    """The bits of the plain run. Every byte crosses the link, so a slow one takes at least its length's time."""
    megabits = 1.0
    with torchrun(hosts, "host1", place, "runs/hosts") as first, torchrun(hosts, "host2", place, "runs/hosts") as second:
        reach(place, "runs/hosts", 15)
        hosts.limit(megabits)
        limited_from = workplace.rounds_recorded(place / "runs/hosts") + 3  # rounds that were under way, and the burst
        assert (first.wait(300), second.wait(300)) == (0, 0), said(place, "host1") + said(place, "host2")
        rounds = records(place / "runs/hosts")
        assert hosts.sent("host1") + hosts.sent("host2") > sum(r["wire_bytes"] for r in rounds)
    assert "4 peers on 2 process(es)" in said(place, "host1") + said(place, "host2")
    assert adapter_digests(place / "runs/hosts") == workplace.plain_digests(place)
    seconds = [r["seconds"]["exchange"] for r in rounds]
    fast, slow = statistics.median(seconds[:15]), statistics.median(seconds[limited_from:])
    assert slow > 0.5 * rounds[0]["wire_bytes"] / 2 / (megabits * 1e6 / 8), (slow, rounds[0])
    assert slow > 3 * fast, (slow, fast)


def test_killed_worker_is_restarted(place, hosts):
    """Its host restarts it, the other one joins, and both go on from the last checkpoint."""
    output = "runs/killed"
    with (torchrun(hosts, "host1", place, output, restarts="2") as first,
          torchrun(hosts, "host2", place, output, restarts="2") as second):
        reach(place, output, 12)
        [worker] = [pid for pid in hosts.processes("host2") if b"\0-u\0-m\0dfl\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(worker, signal.SIGKILL)
        assert (first.wait(300), second.wait(300)) == (0, 0), said(place, "host1") + said(place, "host2")
    assert adapter_digests(place / output) == workplace.plain_digests(place)
    assert workplace.rounds_recorded(place / output) == workplace.ROUNDS


def test_hosts_come_and_go(place, hosts):
    """Between one and two hosts: the second joins in the middle, and vanishes before the end."""
    output = "runs/elastic"
    with torchrun(hosts, "host1", place, output, nodes="1:2", restarts="2") as first:
        reach(place, output, 8)
        with torchrun(hosts, "host2", place, output, nodes="1:2", restarts="2"):
            workplace.wait_for(lambda: "4 peers on 2 process(es)" in said(place, "host1") + said(place, "host2"), 120,
                               lambda: said(place, "host1") + said(place, "host2"))
            reach(place, output, workplace.rounds_recorded(place / output) + 5)
        assert first.wait(300) == 0, said(place, "host1")
    assert said(place, "host1").count("4 peers on 1 process(es)") == 2
    assert adapter_digests(place / output) == workplace.plain_digests(place)


@pytest.mark.core
def test_readme_has_no_block_that_is_not_run():
    sections = ("One machine", "A peer of several processes", "Several machines", "Slurm")
    blocks = [block for section in sections for block in workplace.readme_blocks(section)]
    assert len(blocks) == (workplace.ROOT / "launch/README.md").read_text().count("```bash") > 0


def test_readme_on_one_machine(tmp_path):
    """As written; the plain command is one of them."""
    place = workplace.make(tmp_path, rounds=4)
    for block in workplace.readme_blocks("One machine"):
        workplace.run(place, "bash", "-euc", block, timeout=240)
    found = [adapter_digests(place / "runs" / name) for name in ("one", "two", "restarted")]
    assert len(found[0]) == 5 and found[0] == found[1] == found[2]


def test_readme_on_several_machines(tmp_path, hosts):
    """The first block on both hosts, as written; the second makes its own."""
    place = workplace.make(tmp_path, rounds=4)
    both, alone = workplace.readme_blocks("Several machines")
    started = [hosts.start(name, "bash", "-euc", both, cwd=place, env=workplace.ENVIRONMENT) for name in hosts.names]
    assert [process.wait(240) for process in started] == [0, 0]
    workplace.run(place, "bash", "-euc", alone, timeout=240)
    assert len(adapter_digests(place / "runs/hosts")) == 5
    assert adapter_digests(place / "runs/hosts") == adapter_digests(place / "runs/slow")
