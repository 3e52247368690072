"""A run that loses processes and gets them back, for hours: kills, stops, cut cables and returns by a seeded schedule.

    python benchmarks/soak.py --minutes 120              # eight processes, an event about every half a minute
    python benchmarks/soak.py --transport zenoh          # with certificates, in place of TCP

Eight processes with a peer each and `membership: survive`, each on a host of its own (network namespaces, so it needs root; without,
on one host and with no cuts). One event follows another: SIGKILL of one to three at once; SIGSTOP, or a cable out of the switch,
for less than `patience` or for more; SIGTERM of one. Who has gone is started again a while later with --resume, the next event
does not always wait for that, and at least two processes are left. In the end all are told to stop, and from what they wrote:

- one writer a folder: the rounds of every record ascend by one where their process was there;
- all that were there in a round have recorded the same living, and W among them is doubly stochastic;
- records agree with checkpoints: a replay comes to the same losses in every round, and to the same bits of every row;
- nobody waited longer than `patience` and the time to settle (--late) for a round after an event;
- the loss has fallen by at least NEAR of what it falls in a run of as many rounds that nobody disturbed.
"""

import argparse
import ctypes
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import hosts as hosts_
import members
import numpy as np
import tiny_models
import tiny_runs
from stamp import write

from dfl.config import from_dict
from dfl.engine.living import Living
from dfl.run import build
from dfl.run.replay import replay
from dfl.run.train import train
from dfl.store.collect import History, collect, history
from dfl.store.records import read_lines
from dfl.training.phase import ModelTrainer
from dfl.transport import certificates

SIZE, PAUSE = 8, 0.1  # processes; seconds that a local phase takes beside its steps, as it would with a model that is not tiny
PATIENCE, NEAR = 3.0, 0.75
KINDS = {"kill one": 6, "kill several": 2, "short stop": 4, "long stop": 4, "short cut": 3, "long cut": 4, "term": 3}
STOPPED = 75


class OnHost(members.Group):
    """The processes of a group, each in the network of a host of its own; on the loopback interface where `hosts` is None."""

    def __init__(self, folder: Path, words: list[str], size: int, hosts: hosts_.Hosts | None, pause: float,
                 env: dict[str, str]):
        super().__init__(folder, words, size, env)
        self.hosts, self.pause = hosts, pause

    def start(self, process: int, resume: bool = False, **more: str) -> None:
        inside = None if self.hosts is None else self.hosts.network(self.hosts.names[process])
        places = [f"127.0.0.1:{port}" if inside is None else f"10.77.0.{k + 1}:29700" for k, port in enumerate(self.ports)]
        env = {"DFL_PROCESS": f"{process}/{self.size}", "DFL_MEMBERS": ",".join(places), "DFL_LISTEN": places[process], **self.env,
               **more}
        self.workers[process] = members.begin(_slowly, inside, self.pause, self.tree, env, str(self.log_of(process)), resume)

    def running(self, process: int) -> bool:
        return self.workers[process].exitcode is None


def _slowly(network: str | None, pause: float, *args) -> None:
    """A process of a run, in another network, whose local phases take `pause` seconds longer."""
    if network is not None:
        with open(network) as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):  # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), f"could not enter {network}")
    train = ModelTrainer.run

    def slowly(*args, **kwargs):
        time.sleep(pause)
        return train(*args, **kwargs)

    ModelTrainer.run = slowly
    members._work(*args)


class Schedule:
    """Events on a group, by a seed. `log`: (seconds since the start, kind, processes); `waits`: seconds until all that an event left
    had a round of afterwards."""

    def __init__(self, group: OnHost, seed: int, every: float, late: float):
        self.group, self.rng, self.every, self.late = group, random.Random(seed), every, late
        self.kinds = {kind: weight for kind, weight in KINDS.items() if group.hosts is not None or "cut" not in kind}
        self.back: dict[int, float] = {}  # processes that are started again, and when
        self.undo: list[tuple[float, Callable[[], None]]] = []
        self.touched: set[int] = set()  # stopped, or without a cable
        self.log: list[tuple[float, str, list[int]]] = []
        self.waits: list[float] = []
        self.returns = 0
        self.began = time.monotonic()

    def run(self, seconds: float) -> None:
        """Events until so much time has passed, and then until all have come back."""
        then = time.monotonic() + self.every
        while time.monotonic() < self.began + seconds:
            self._pass()
            if time.monotonic() >= then:
                self._event()
                then = time.monotonic() + self.every * self.rng.uniform(0.5, 1.5)
        until = time.monotonic() + 240
        while self.back or self.undo or not self._all_there():
            assert time.monotonic() < until, f"not all came back: {self._newest()}\n{self.group.everything()[-8000:]}"
            self._pass()

    def _pass(self) -> None:
        """What is due now: ends of stops and cuts, and processes that come back."""
        now, group = time.monotonic(), self.group
        for one in [one for one in self.undo if one[0] <= now]:
            self.undo.remove(one)
            one[1]()
        for process, worker in group.workers.items():
            if worker.exitcode is not None and process not in self.back and process not in self.touched:
                assert worker.exitcode in (1, STOPPED, -signal.SIGKILL), (process, worker.exitcode, group.said(process)[-3000:])
                self.back[process] = now + self.rng.uniform(0, 2 * PATIENCE)
        for process in [process for process, when in self.back.items() if when <= now]:
            del self.back[process]
            group.start(process, resume=True)
            self.returns += 1
        time.sleep(0.1)

    def _event(self) -> None:
        free = [k for k in range(self.group.size) if self.group.running(k) and k not in self.touched and k not in self.back]
        if len(free) < 4:
            return
        kind = self.rng.choices(list(self.kinds), list(self.kinds.values()))[0]
        chosen = self.rng.sample(free, self.rng.randint(2, min(3, len(free) - 2)) if kind == "kill several" else 1)
        before = self._newest()
        self.log.append((round(time.monotonic() - self.began, 1), kind, chosen))
        with (self.group.folder / "events.txt").open("a") as file:
            print(*self.log[-1], f"newest round {before}", file=file)
        long = PATIENCE * (self.rng.uniform(2.5, 4) if kind.startswith("long") else self.rng.uniform(0.1, 0.5))
        for process in chosen:
            if kind in ("kill one", "kill several", "term"):
                self.group.kill(process, signal.SIGTERM if kind == "term" else signal.SIGKILL)
            elif kind.endswith("stop"):
                self.group.kill(process, signal.SIGSTOP)
                self._later(process, long, lambda p=process: self.group.kill(p, signal.SIGCONT))
            else:
                name = self.group.hosts.names[process]
                self.group.hosts.plug(name, False)
                self._later(process, long, lambda n=name: self.group.hosts.plug(n, True))
        self._wait([k for k in free if k not in chosen], before)

    def _later(self, process: int, seconds: float, undo: Callable[[], None]) -> None:
        def end() -> None:
            undo()
            self.touched.discard(process)
        self.touched.add(process)
        self.undo.append((time.monotonic() + seconds, end))

    def _wait(self, others: list[int], before: int) -> None:
        """Until the others have come two rounds further, or have themselves gone."""
        started = time.monotonic()
        while any(self.group.running(k) and self._round_of(k) < before + 2 for k in others):
            waited = time.monotonic() - started
            assert waited < PATIENCE + self.late, (waited, self.log[-1], self.group.everything()[-9000:])
            self._pass()
        self.waits.append(time.monotonic() - started)

    def _round_of(self, process: int) -> int:
        return (last_line(self.group.output(process)) or {"round": 0})["round"]

    def _newest(self) -> int:
        return max(map(self._round_of, range(self.group.size)))

    def _all_there(self) -> bool:
        lines = [last_line(self.group.output(k)) for k in range(self.group.size)]
        return all(line and line["alive"] == list(range(self.group.size)) for line in lines)


def last_line(folder: Path) -> dict | None:
    """The last whole line of a record, without reading the rest."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 20000))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return None
    for line in reversed(lines[:-1]):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None


def words(folder: Path, output: Path, **fields) -> list[str]:
    """A run that goes on until it is told to stop."""
    given = {"peers": SIZE, "train__rounds": 1_000_000, "train__lr": 0.01, "eval__every": 20, "measure__every": 0}
    return tiny_runs.arguments(folder / "bert", folder / "data.csv", output, **given | fields)


def place_of(folder: Path) -> Path:
    tiny_models.save(folder / "bert", "bert", 1)
    tiny_runs.write_data(folder, copies=16)
    return folder


def soak(folder: Path, minutes: float, every: float, seed: int, late: float, hosts: hosts_.Hosts | None, pause: float,
         transport: str) -> dict:
    """A soak and its invariants: figures. AssertionError names what does not hold."""
    place, output, env = place_of(folder), folder / "run", {}
    survive = {"membership__mode": "survive", "membership__patience": PATIENCE, "membership__wait": 30,
               "membership__transport": transport, "checkpoint__every": 20}
    if transport == "zenoh":
        certificates.make(folder / "certificates", SIZE)
        env = {"DFL_CERTIFICATES": str(folder / "certificates")}
    with OnHost(folder, words(place, output, **survive), SIZE, hosts, pause, env) as group:
        for process in range(SIZE):
            group.start(process)
        group.until_round(0, 2, 120)
        schedule = Schedule(group, seed, every, late)
        schedule.run(60 * minutes)
        for process in range(SIZE):
            group.kill(process, signal.SIGTERM)
        codes = [group.wait(process, 120) for process in range(SIZE)]
        assert codes == [STOPPED] * SIZE, (codes, group.everything()[-8000:])
        for process in range(SIZE):
            said = group.said(process)
            assert "Traceback" not in said and "terminate called" not in said and "frame #" not in said, said[-4000:]
            assert "panicked" not in said, said[-4000:]
    found = history(output)
    check_records(found)
    check_weights(group.tree, found)
    again = replay(output)
    assert again.all, again
    near = compare(place, output)
    waits = sorted(schedule.waits)
    return {"events": len(schedule.log), "by_kind": dict(Counter(kind for _, kind, _ in schedule.log)), "returns": schedule.returns,
            "rounds": again.rounds, "rounds_without_all": sum(len(line["alive"]) < SIZE for line in found.lines.values()),
            "fewest_alive": min(len(line["alive"]) for line in found.lines.values()),
            "changes_of_the_living": changes(found), "seconds_to_the_next_rounds": {
                "median": round(statistics.median(waits), 2), "largest": round(waits[-1], 2)}, "replay": again._asdict(), **near}


def check_records(found: History) -> None:
    for process, lines in found.records.items():
        numbers = list(lines)
        assert numbers == sorted(set(numbers)), f"process {process} has recorded rounds out of order"
        for t, line in lines.items():
            if process in line["alive"] and process in found.lines[t]["alive"]:
                assert line["alive"] == found.lines[t]["alive"], f"round {t}: process {process} has other living"
    assert list(found.lines) == list(range(max(found.lines) + 1)), "a round is missing in all records"


def check_weights(tree: dict, found: History) -> None:
    """W among the living of every round: rows and columns sum to one."""
    topology = build.check(from_dict(tree))
    for alive in {tuple(line["alive"]) for line in found.lines.values()}:
        living = Living(topology)
        living.change(0, alive)
        w = living.matrix(0)[np.ix_(alive, alive)]
        assert (w >= 0).all() and np.allclose(w.sum(0), 1, atol=1e-12) and np.allclose(w.sum(1), 1, atol=1e-12), alive


def changes(found: History) -> int:
    alive = [tuple(line["alive"]) for line in found.lines.values()]
    return sum(one != two for one, two in zip(alive, alive[1:], strict=False))


def compare(place: Path, output: Path) -> dict:
    """The peers of the run at its last evaluation, against those of a run which nobody disturbed."""
    collect(output)
    last = [line for line in read_lines(output / "metrics.jsonl") if "eval" in line][-1]
    alone = words(place, place / "alone", train__rounds=last["round"], eval__every=0)
    assert train(from_dict(members.tree_of(alone))) == 0
    lines = [line for line in read_lines(place / "alone" / "metrics.jsonl") if "eval" in line]
    found = {name: {"accuracy": round(100 * line["eval"]["accuracy"]["mean"], 2), "loss": round(line["eval"]["loss"]["mean"], 5)}
             for name, line in (("before", lines[0]), ("disturbed", last), ("alone", lines[-1]))}
    before, disturbed, calm = (one["loss"] for one in found.values())
    learned = round((before - disturbed) / (before - calm), 3)
    assert learned >= NEAR, found
    return {"round": last["round"], **found, "learned_of_undisturbed": learned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=30, help="seconds between two events, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--late", type=float, default=30, help="seconds beyond patience until the next rounds, on a busy machine")
    parser.add_argument("--pause", type=float, default=PAUSE, help="seconds that a local phase takes beside its steps")
    parser.add_argument("--transport", default="tcp", choices=["tcp", "zenoh"])
    parser.add_argument("--folder", type=Path, help="keeps the run and what the processes said")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = run(args.folder or Path(folder), args.minutes, args.every, args.seed, args.late, args.pause, args.transport)
    about = {"minutes": args.minutes, "every": args.every, "seed": args.seed, "late": args.late, "pause": args.pause}
    name = "soak" if args.transport == "tcp" else f"soak_{args.transport}"
    write(name, about | {"processes": SIZE, "patience": PATIENCE, "near": NEAR}, found)


def run(folder: Path, minutes: float, every: float, seed: int, late: float, pause: float = PAUSE, transport: str = "tcp") -> dict:
    """A soak in an empty folder, on hosts where that is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    reason = hosts_.missing()
    if reason:
        return soak(folder, minutes, every, seed, late, None, pause, transport) | {"without_cuts": reason}
    with hosts_.Hosts(SIZE) as hosts:
        return soak(folder, minutes, every, seed, late, hosts, pause, transport)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
