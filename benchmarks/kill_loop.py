"""Kills at random moments: a run is killed, resumed and killed again, and in the end compared with one that was left alone.

    python benchmarks/kill_loop.py                       # sixty kills in processes that this script starts, as srun would
    python benchmarks/kill_loop.py --launcher torchrun --kills 12

A random process gets SIGKILL at a random moment: while the processes start, anywhere in the run, or inside the writing of a
checkpoint, which is recognised by the files that appear. The survivors have to leave by themselves with one line each (torchrun
may end them first); everything starts again with --resume. At the end adapters, run state and records have to be those of the
uninterrupted run, bit for bit.
"""

import argparse
import multiprocessing as mp
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny_runs
from ports import free_ports
from safetensors.torch import load_file

from dfl.store.checkpoints import latest
from dfl.store.records import read_lines

ROOT = Path(__file__).parent.parent
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does, and before torch is loaded
# what a kill waits for; `draft`, `manifest` and `published` are steps of the writing of a checkpoint
PHASES = ("start", "anywhere", "draft", "manifest", "published")
PATTERNS = {"draft": ".round-*.draft", "manifest": ".round-*.draft/manifest.json", "published": "round-*"}
ROUNDS, KILLS_PER_RUN = 12, 6
TIMEOUT, PATIENCE = 20, 60  # seconds: of the transport, and until survivors count as hanging


def words(folder: Path, output: Path, phases=()) -> list[str]:
    """The run: four peers, moments carried. A checkpoint every round where kills wait for one, else when it comes by itself."""
    fields = {"method": "{name: tad, T: 2}", "train__state": "carried", "train__rounds": ROUNDS, "eval__every": 3, "model__layers": 1,
              "timeout": TIMEOUT} | ({"checkpoint__every": 1} if set(phases) & set(PATTERNS) else {})
    return ["train", *tiny_runs.arguments(folder / "bert", folder / "data.csv", output, **fields), "--resume"]


class Forked:
    """Processes forked from a server that has torch loaded; they meet at process 0, and nobody ends those that survive."""

    def __init__(self, num: int, argv: list[str], log: Path):
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "dfl.run.train"])
        [port] = free_ports(1)
        self.logs = [log.with_suffix(f".{rank}") for rank in range(num)]
        self.processes = []
        for rank, path in enumerate(self.logs):
            path.write_text("")
            self.processes.append(context.Process(target=_work, args=(rank, num, port, argv, str(path))))
            self.processes[-1].start()

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.is_alive()]

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait_after_kill(self, victim: int) -> float:
        """Until the others have left; the seconds that took. AssertionError when they hang, or say more than a line."""
        started = time.monotonic()
        for process in self.processes:
            process.join(max(0, started + PATIENCE - time.monotonic()))
        seconds = time.monotonic() - started
        assert not self.running(), f"survivors hang {seconds:.0f} s after the kill of {victim}"
        for process, path in zip(self.processes, self.logs, strict=True):
            said = path.read_text()
            assert "Traceback" not in said and "frame #" not in said, said
            if process.pid != victim and process.exitcode:
                assert process.exitcode == 1 and said.count("dfl: process") == 1, (process.exitcode, said)
        return seconds

    def finish(self) -> None:
        for process in self.processes:
            process.join(300)
        assert [process.exitcode for process in self.processes] == [0] * len(self.processes), [p.read_text() for p in self.logs]

    def end(self) -> None:
        for process in self.processes:
            process.kill()


def _work(rank: int, num: int, port: int, argv: list[str], log: str) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    from dfl.cli import main
    from dfl.run import runtime
    runtime.START_SECONDS = TIMEOUT  # who was killed before they met is waited for no longer than this
    sys.exit(main(argv))


class Torchrun:
    """The real launcher, which restarts all workers when one has died."""

    def __init__(self, num: int, argv: list[str], log: Path):
        self.log = log.open("ab")
        command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(num), "--max-restarts", "99",
                   "-m", "dfl", *argv]
        self.agent = subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL,
                                      env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        self.num = num

    def pids(self) -> list[int]:
        found = children(self.agent.pid)
        return found if len(found) == self.num else []

    def running(self) -> bool:
        return self.agent.poll() is None

    def wait_after_kill(self, victim: int) -> float:
        """Until the launcher has started all of them again."""
        started = time.monotonic()
        while victim in children(self.agent.pid) or not self.pids():
            assert self.running() and time.monotonic() < started + PATIENCE, Path(self.log.name).read_text()
            time.sleep(0.01)
        return time.monotonic() - started

    def finish(self) -> None:
        assert self.agent.wait(600) == 0, Path(self.log.name).read_text()

    def end(self) -> None:
        if self.running():
            self.agent.send_signal(signal.SIGTERM)
            self.agent.wait(60)
        self.log.close()


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def rounds_of(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(read_lines(path)) - 1 if path.is_file() else -1


def wait_for(phase: str, job, output: Path, chance: random.Random) -> str:
    """Until the moment of the kill, or the end of the run.

    Returns the phase that was met: `published` for a draft that came and went between two looks.
    """
    checkpoints, started, limit = output / "checkpoints", time.monotonic(), time.monotonic() + 300
    first = rounds_of(output)
    known = _seen(checkpoints, PATTERNS["published"]) | (_seen(checkpoints, PATTERNS[phase]) if phase in PATTERNS else set())
    skip = chance.randrange(3)  # the first, second or third checkpoint from now
    # seconds from the birth of the processes
    delay = chance.uniform(0, 1.0)
    # by rounds, not by the clock: a fast machine has done them all in a second
    wanted = first + chance.randrange(max(1, (ROUNDS - first) // 2))
    while job.running():
        assert time.monotonic() < limit, f"the run does not go on: nothing to wait for in {phase!r}"
        if phase == "anywhere" and rounds_of(output) > wanted:
            time.sleep(chance.uniform(0, 0.05))
            return phase
        if phase == "start" and time.monotonic() > started + delay:
            return phase
        if phase in PATTERNS:
            met = _seen(checkpoints, PATTERNS[phase]) - known
            # on a fast disk a draft lives for less than the time between two looks, and then only its result is seen
            for name in sorted(met | (_seen(checkpoints, PATTERNS["published"]) - known)):
                known |= {name}
                if skip == 0:
                    time.sleep(chance.uniform(0, 0.02))
                    return phase if name in met else "published"
                skip -= 1
        time.sleep(0.002)
    return phase


def _seen(checkpoints: Path, pattern: str) -> set[str]:
    """The checkpoints that are there as `pattern`, by the name they have, or will have, when they are published."""
    return {re.match(r"\.?(round-\d+)", path.relative_to(checkpoints).parts[0])[1] for path in checkpoints.glob(pattern)}


def one_run(launcher, folder: Path, output: Path, num: int, kills: int, chance: random.Random, phases=PHASES) -> list[dict]:
    """A run with up to `kills` kills: a line for each."""
    found = []
    argv, log = words(folder, output, phases), output.with_suffix(".log")
    job = launcher(num, argv, log)
    try:
        while len(found) < kills:
            phase = wait_for(chance.choice(phases), job, output, chance)
            alive = job.pids()
            if not alive:
                if not job.running():
                    break  # it was faster
                time.sleep(0.01)
                continue
            victim = chance.choice(alive)
            os.kill(victim, signal.SIGKILL)
            line = {"processes": num, "phase": phase, "round": rounds_of(output), "survivors_gone_s": job.wait_after_kill(victim)}
            left = list((output / "checkpoints").glob(".round-*")) if isinstance(job, Forked) else []
            found.append(line | {"half_checkpoint_left": bool(left)})
            if isinstance(job, Forked):
                job = launcher(num, argv, log)
        job.finish()
    finally:
        job.end()
    return found


def compare(output: Path, straight: Path) -> None:
    """AssertionError unless the two runs ended alike."""
    rounds = [line["round"] for line in read_lines(output / "metrics.jsonl")]
    assert rounds == list(range(ROUNDS + 1)), rounds
    assert tiny_runs.adapter_digests(output) == tiny_runs.adapter_digests(straight)
    mine, other = states(output), states(straight)
    assert mine.keys() == other.keys() and all(mine[name].equal(other[name]) for name in other)
    for one, two in zip(read_lines(output / "metrics.jsonl"), read_lines(straight / "metrics.jsonl"), strict=True):
        assert tiny_runs.lasting(one) == tiny_runs.lasting(two)
    assert not list((output / "checkpoints").glob(".*")), "drafts are left"


def states(output: Path) -> dict:
    found = {}
    for path in latest(output).glob("state-*.safetensors"):
        found |= load_file(path)
    return found


def prepare(folder: Path) -> None:
    """Model, data and the uninterrupted run (`straight`), in one process."""
    tiny_runs.make_folder(folder, layers=3)
    straight = folder / "straight"
    Forked(1, words(folder, straight), folder / "straight.log").finish()


def loop(launcher, kills: int, counts: list[int], chance: random.Random, folder: Path, outputs: Path, phases=PHASES) -> list[dict]:
    """Runs in `outputs` with up to KILLS_PER_RUN kills each until there are `kills`; each is compared with that of prepare(folder).

    A run may end before its last kill: a machine can be faster than the eye of this script.
    """
    found = []
    for number in range(10 * kills):
        if len(found) >= kills:
            break
        output, num = outputs / f"run-{number}", counts[number % len(counts)]
        lines = one_run(launcher, folder, output, num, min(KILLS_PER_RUN, kills - len(found)), chance, phases)
        compare(output, folder / "straight")
        found += [{"run": number} | line for line in lines]
        print(f"run {number}: {num} process(es), {len(lines)} kills, ended as if there had been none", flush=True)
    return found


def table(found: list[dict]) -> str:
    groups = defaultdict(list)
    for line in found:
        groups[line["processes"], line["phase"]].append(line)
    rows = ["processes  phase      kills  half checkpoint left  survivors gone after (s, max)"]
    for (num, phase), lines in sorted(groups.items(), key=lambda item: (item[0][0], PHASES.index(item[0][1]))):
        left, slowest = sum(line["half_checkpoint_left"] for line in lines), max(line["survivors_gone_s"] for line in lines)
        rows.append(f"{num:9}  {phase:9}  {len(lines):5}  {left:20}  {slowest:29.1f}")
    return "\n".join([*rows, f"{len(found)} kills; adapters, state and records of every run as without"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--launcher", choices=("forked", "torchrun"), default="forked")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 1])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    launcher = {"forked": Forked, "torchrun": Torchrun}[args.launcher]
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        found = loop(launcher, args.kills, args.processes, random.Random(args.seed), Path(folder), Path(folder))
        recipe = [word.replace(folder, "FOLDER") for word in words(Path(folder), Path(folder) / "run", PHASES)]
    print(table(found))
    import stamp
    stamp.write(f"kill_loop_{args.launcher}", {"arguments": vars(args), "recipe": recipe}, {"kills": found})


if __name__ == "__main__":
    main()
