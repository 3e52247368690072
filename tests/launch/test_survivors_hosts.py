"""A run that outlives its processes on several hosts, which are network namespaces: slow links, and links that are cut, one way or
both ways, for shorter or longer than the patience. Over TCP, and over zenoh with certificates."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import hosts as network
import pytest
import workplace
from tiny_runs import adapter_digests

pytestmark = [pytest.mark.launch, pytest.mark.clock, pytest.mark.timeout(600)]
PATIENCE = 4.0
NAMES = ("host1", "host2", "host3")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return workplace.make(tmp_path_factory.mktemp("sites"))


class Sites:
    """A process on each of three hosts, which know the address of the first and have no folder in common."""

    def __init__(self, hosts: network.Hosts, place: Path, transport: str, rounds: int):
        self.hosts, self.place, self.running, self.rounds = hosts, place, {}, rounds
        self.root = place / f"{transport}-{len(list(place.glob(f'{transport}-*')))}"
        self.root.mkdir()
        self.words = ["--membership", "survive", "--membership.transport", transport, "--membership.patience", str(PATIENCE),
                      "--train.rounds", str(rounds), "--eval.every", "1000"]
        if transport == "zenoh":
            workplace.run(place, "dfl", "certificates", str(self.root), "--peers", "3")
            for process, name in enumerate(NAMES):
                folder = self.root / name / "certificates"
                folder.mkdir(parents=True)
                for file in ("authority.pem", f"process-{process}.pem", f"process-{process}.key"):
                    shutil.copy2(self.root / "certificates" / file, folder)

    def start(self, *names: str) -> "Sites":
        for name in names:
            process = NAMES.index(name)
            env = {"DFL_PROCESS": f"{process}/3", "DFL_LISTEN": f"{name}:29700", "DFL_MEMBERS": "host1:29700"}
            command = ["dfl", "train", "my.yaml", *self.words, "--output", str(self.root / name), "--resume"]
            with self.log_of(name).open("a") as log:
                self.running[name] = self.hosts.start(name, *command, cwd=self.place, env=workplace.ENVIRONMENT | env, stdout=log,
                                                      stderr=subprocess.STDOUT)
        return self

    def log_of(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def said(self) -> str:
        return "\n".join(f"--- {name}\n{self.log_of(name).read_text()}" for name in NAMES if self.log_of(name).exists())

    def output(self, name: str) -> Path:
        return self.root / name / f"process-{NAMES.index(name)}"

    def lines(self, name: str) -> list[dict]:
        path = self.output(name) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []

    def wait_for(self, ready, seconds: float = 90.0) -> None:
        workplace.wait_for(ready, seconds, self.said)

    def reach(self, name: str, more: int) -> None:
        """So many more rounds."""
        wanted = len(self.lines(name)) + more
        self.wait_for(lambda: len(self.lines(name)) >= wanted)

    def alive(self, name: str) -> list[int]:
        return self.lines(name)[-1]["alive"]

    def stop(self, *names: str) -> None:
        """All of them at the same round, with their state saved."""
        for name in names:
            for pid in self.hosts.processes(name):
                os.kill(pid, signal.SIGTERM)
        assert [self.running[name].wait(90) for name in names] == [75] * len(names), self.said()

    def check(self, *names: str) -> None:
        """They have recorded the same, and nobody has seen anything but lines of ours."""
        told = [[(line["round"], line["alive"]) for line in self.lines(name)] for name in names]
        assert all(one == told[0] for one in told) and [number for number, _ in told[0]] == list(range(len(told[0])))
        assert not re.search("Traceback|terminate called|panicked|zenoh::", self.said()), self.said()

    def __enter__(self) -> "Sites":
        return self

    def __exit__(self, *_) -> None:
        for name in self.running:
            for pid in self.hosts.processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=["tcp", "zenoh"])
def sites(request, place):
    if network.missing():
        pytest.skip(f"no hosts: {network.missing()}")
    if request.param == "zenoh":
        pytest.importorskip("zenoh", reason="needs zenoh: pip install 'dfl[zenoh]'")
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(network.Hosts(3))
        yield lambda rounds: stack.enter_context(Sites(hosts, place, request.param, rounds))


@pytest.fixture
def steady(sites):
    """All three at work, in a run without an end."""
    made = sites(10**6).start(*NAMES)
    made.wait_for(lambda: made.lines("host1"))
    made.reach("host1", 5)
    assert made.alive("host1") == [0, 1, 2, 3], made.said()
    return made


def test_a_slow_link_changes_no_bit_and_costs_nobody(sites, place):
    run = sites(workplace.ROUNDS)
    run.hosts.limit(50)
    with run.start(*NAMES):
        assert [run.running[name].wait(300) for name in NAMES] == [0, 0, 0], run.said()
    run.check(*NAMES)
    assert "going on without" not in run.said()
    workplace.run(place, "dfl", "collect", str(run.root / "all"), *(str(run.output(name)) for name in NAMES))
    assert adapter_digests(run.root / "all") == workplace.plain_digests(place)


def test_a_cut_that_is_shorter_than_the_patience_costs_nobody(steady):
    steady.hosts.plug("host3", False)
    time.sleep(0.4 * PATIENCE)
    steady.hosts.plug("host3", True)
    steady.reach("host1", 5)
    steady.stop(*NAMES)
    steady.check(*NAMES)
    assert "going on without" not in steady.said()
    assert all(line["alive"] == [0, 1, 2, 3] for line in steady.lines("host1"))


def test_after_a_longer_cut_the_smaller_side_ends_and_comes_back(steady):
    """Each side goes on alone until they hear each other again."""
    steady.hosts.plug("host3", False)
    steady.wait_for(lambda: steady.alive("host1") == steady.alive("host2") == [0, 1, 2] and steady.alive("host3") == [3])
    steady.hosts.plug("host3", True)
    steady.wait_for(lambda: steady.running["host3"].poll() is not None)
    assert steady.running["host3"].returncode == 1, steady.said()
    assert "the others go on without this process: 2 with process " in steady.log_of("host3").read_text()
    steady.reach("host1", 5)
    assert steady.alive("host1") == steady.alive("host2") == [0, 1, 2], steady.said()
    steady.start("host3")
    steady.wait_for(lambda: steady.alive("host1") == [0, 1, 2, 3])
    steady.stop(*NAMES)
    steady.check("host1", "host2")


def test_a_host_that_vanishes_without_a_word_is_absent_within_patience_and_comes_back(steady):
    """The connections of the others stay half open: nothing says that they lead nowhere."""
    steady.hosts.plug("host3", False)
    begun = time.monotonic()
    for pid in steady.hosts.processes("host3"):
        os.kill(pid, signal.SIGKILL)
    steady.wait_for(lambda: steady.alive("host1") == steady.alive("host2") == [0, 1, 2])
    assert f"has shown no life for {PATIENCE:g} s" in steady.said()
    assert 0.5 * PATIENCE < time.monotonic() - begun < 5 * PATIENCE  # and not the time-out, which is half an hour
    steady.hosts.plug("host3", True)
    steady.start("host3")
    steady.wait_for(lambda: steady.alive("host1") == [0, 1, 2, 3])
    steady.stop(*NAMES)
    steady.check("host1", "host2")


def test_of_two_that_hear_each_other_one_way_alone_one_is_left_out_and_says_so(steady):
    """host3 hears host1, which does not hear it; host2 hears both."""
    steady.hosts.lose("host3", "host1")
    steady.wait_for(lambda: any(steady.running[name].poll() is not None for name in ("host1", "host3")))
    [left_out] = [name for name in ("host1", "host3") if steady.running[name].poll() is not None]
    others = [name for name in NAMES if name != left_out]
    assert steady.running[left_out].returncode == 1 and "the others go on without this process" in steady.log_of(left_out).read_text()
    steady.reach("host2", 5)
    assert len({tuple(steady.alive(name)) for name in others}) == 1
    steady.hosts.mend("host3", "host1")
    steady.start(left_out)
    steady.wait_for(lambda: steady.alive("host2") == [0, 1, 2, 3])
    steady.stop(*NAMES)
    steady.check(*others)


def test_who_knew_the_first_address_alone_finds_the_others_when_that_one_has_gone(steady):
    """host2 and host3 have met through host1, and know of each other what it has told them."""
    for pid in steady.hosts.processes("host1"):
        os.kill(pid, signal.SIGKILL)
    steady.wait_for(lambda: steady.alive("host2") == steady.alive("host3") == [2, 3])
    steady.hosts.plug("host3", False)
    steady.wait_for(lambda: steady.alive("host2") == [2] and steady.alive("host3") == [3])
    time.sleep(3 * PATIENCE)  # until no end has a link any more
    steady.hosts.plug("host3", True)
    steady.wait_for(lambda: steady.running["host3"].poll() is not None)
    assert "the others go on without this process: 1 with process 1" in steady.log_of("host3").read_text()
    steady.start("host3")
    steady.wait_for(lambda: steady.alive("host2") == steady.alive("host3") == [2, 3])
    steady.stop("host2", "host3")
    steady.check("host2")
