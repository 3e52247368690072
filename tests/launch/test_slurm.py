"""The Slurm scripts on a real Slurm: four nodes on this machine, made by tests/slurm_cluster.py."""

import json
import os
import re
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import slurm_cluster
import workplace
from tiny_runs import adapter_digests

from dfl.run.runtime import Place, place_from_environment
from dfl.store.checkpoints import complete, latest

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]
TRAIN, SWEEP, SURVIVE = (f"launch/slurm/{name}.sbatch" for name in ("train", "sweep", "survive"))


class Cluster:
    """Commands of a Slurm cluster, given in a workplace."""

    def __init__(self, state: Path, place: Path):
        self.state, self.place = state, place

    def __call__(self, *words: str, **environment: str) -> str:
        return workplace.run(self.place, *words, timeout=240, SLURM_CONF=f"{self.state}/slurm.conf", **environment)

    def submit(self, *words: str, **environment: str) -> str:
        return self("sbatch", "--parsable", *words, **environment).strip()

    def job(self, job: str) -> dict[str, str]:
        fields = self("scontrol", "show", "job", "--oneliner", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def log(self, job: str) -> str:
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else "no log yet"

    def finish(self, job: str, state: str = "COMPLETED", seconds: float = 240) -> str:
        """Wait until the job has ended in `state`; its log."""
        def over() -> bool:
            return self.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        workplace.wait_for(over, seconds, lambda: (self.job(job), self.log(job)))
        assert self.job(job)["JobState"] == state, self.log(job)
        return self.log(job)

    def reach(self, job: str, output: str, rounds: int) -> None:
        """Wait until a run has recorded so many rounds and is still at it."""
        workplace.wait_for(lambda: workplace.rounds_recorded(self.place / output) >= rounds, 120, lambda: self.log(job))
        assert workplace.rounds_recorded(self.place / output) < workplace.ROUNDS


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return workplace.make(tmp_path_factory.mktemp("place"))


@contextmanager
def cluster(place: Path, **fields):
    if slurm_cluster.missing():
        pytest.skip(slurm_cluster.missing())
    state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # pytest's own folders have too long a path
    try:
        slurm_cluster.start(state, **fields)
        yield Cluster(state, place)
    finally:
        slurm_cluster.stop(state)
        shutil.rmtree(state)


@pytest.fixture(scope="module")
def slurm(place):
    with cluster(place) as found:
        yield found


@pytest.mark.core
def test_two_nodes_make_the_plain_run(slurm, place):
    """With a site file, and with arguments that a careless script would split or expand."""
    (place / "site.sh").write_text("echo the site file of $SLURM_JOB_ID\n")
    output = "runs/two nodes; and *"
    job = slurm.submit("--nodes", "2", "--cpus-per-task", "3", TRAIN, "my.yaml", "--method", "{name: lora}", "--output", output,
                       DFL_SITE="site.sh")
    slurm.reach(job, output, 1)
    assert " CPUs=6 " in slurm("scontrol", "show", "step", "--oneliner", f"{job}.0"), "the step has the cores of the job"
    log = slurm.finish(job)
    assert log.startswith(f"the site file of {job}\n") and "4 peers on 2 process(es)" in log
    assert adapter_digests(place / output) == workplace.plain_digests(place)


def test_stopped_twice_and_nothing_lost(slurm, place):
    """By the warning that --signal sends, after which the script requeues itself; then by Slurm, as when it pre-empts."""
    output = "runs/stopped"
    job = slurm.submit("--nodes", "2", TRAIN, "my.yaml", "--output", output, DFL_LEAST="0")
    slurm.reach(job, output, 12)
    slurm("scancel", "--batch", "--signal=USR1", job)
    workplace.wait_for(lambda: slurm.job(job)["Restarts"] == "1", 60, lambda: slurm.log(job))
    first = latest(place / output)
    assert first is not None and int(first.name[-5:]) >= 12, "the round that was running is saved"
    slurm.reach(job, output, workplace.rounds_recorded(place / output) + 8)
    slurm("scontrol", "requeue", job)
    log = slurm.finish(job)
    assert slurm.job(job)["Restarts"] == "2"
    assert log.count("the state is saved, --resume goes on") == 2 and log.count("is requeued and goes on") == 1
    assert log.count("4 peers on 2 process(es)") == 3, "one log, appended to"
    assert workplace.rounds_recorded(place / output) == workplace.ROUNDS
    assert adapter_digests(place / output) == workplace.plain_digests(place)


def test_cancelled(slurm, place):
    """No process is left, what is there is whole, and the plain command finishes it."""
    output = "runs/cancelled"
    job = slurm.submit("--nodes", "2", TRAIN, "my.yaml", "--output", output, DFL_PROCESSES="2")
    slurm.reach(job, output, 12)
    slurm("scancel", job)
    assert "4 peers on 4 process(es)" in slurm.finish(job, "CANCELLED")
    workplace.wait_for(lambda: not slurm_cluster.job_processes(slurm.state), 30, lambda: slurm_cluster.job_processes(slurm.state))
    assert latest(place / output) == complete(place / output)[-1]
    assert not list((place / output / "checkpoints").glob(".*")), "no draft of a checkpoint"
    slurm("python", "-m", "dfl", "train", "my.yaml", "--output", output, "--resume")
    assert adapter_digests(place / output) == workplace.plain_digests(place)


def workers(slurm) -> list[int]:
    """The processes that torchrun has started."""
    return [pid for pid in slurm_cluster.job_processes(slurm.state) if slurm_cluster.words(pid)[1:4] == ["-u", "-m", "dfl"]]


@pytest.mark.parametrize("victim", ["a process of the run", "torchrun"])
def test_killed_and_requeued(slurm, place, victim):
    """SIGKILL on one of two nodes: the job goes back to the queue by itself, and nothing is lost.

    Its step has another number then: to end the first one Slurm tells a node again a minute later that took longer than a message may.
    """
    output = f"runs/killed {victim}"
    job = slurm.submit("--nodes", "2", TRAIN, "my.yaml", "--output", output, DFL_LEAST="0")
    slurm.reach(job, output, 12)
    agents = [pid for pid in slurm_cluster.job_processes(slurm.state) if slurm_cluster.words(pid)[1:2] == ["launch/torchrun.py"]]
    assert len(workers(slurm)) == len(agents) == 2
    os.kill(workers(slurm)[1] if victim == "a process of the run" else agents[1], signal.SIGKILL)
    workplace.wait_for(lambda: len(workers(slurm)) == 2 and slurm.job(job)["Restarts"] == "1", 120, lambda: slurm.log(job))
    assert {slurm_cluster.variables(pid)["SLURM_STEP_ID"] for pid in workers(slurm)} == {"1"}
    log = slurm.finish(job)
    assert slurm.job(job)["Restarts"] == "1" and log.count("dfl: a process was killed (status 137)") == 1
    assert log.count("4 peers on 2 process(es)") == 2
    assert adapter_digests(place / output) == workplace.plain_digests(place)


def test_nodes_die(place):
    """One of two, then the one that runs the script: Slurm gives them up after a while, and the job goes on with the others."""
    with cluster(place, lost_after=5) as slurm:
        job = slurm.submit("--nodes", "2", TRAIN, "my.yaml", "--output", "runs/nodes")
        for deaths, node in enumerate(["127.0.0.2", "127.0.0.3"], 1):
            slurm.reach(job, "runs/nodes", 12 * deaths)
            assert deaths == 1 or slurm.job(job)["BatchHost"] == node
            slurm_cluster.lose(slurm.state, node)
            workplace.wait_for(lambda: slurm.job(job)["Restarts"] == str(deaths), 120, lambda: slurm.log(job))  # noqa: B023
        log = slurm.finish(job)
        assert slurm.job(job)["NodeList"] == "127.0.0.[1,4]" and log.count("4 peers on 2 process(es)") == 3
    assert adapter_digests(place / "runs/nodes") == workplace.plain_digests(place)


def test_sweep_is_an_array(slurm, place):
    """Submitted by `dfl sweep --slurm`: a task a run, each of two processes."""
    (place / "sweep.yaml").write_text("recipe: my.yaml\ngrid: {method: [lora, ffa]}\noutput: runs/sweep\n")
    command = ["python", "-m", "dfl", "sweep", "sweep.yaml", "--sbatch", "ntasks=2"]
    submitted = slurm(*command, "--slurm")
    job = re.search(r"Submitted batch job (\d+)", submitted)[1]
    logs = [slurm.finish(f"{job}_{index}") for index in range(2)]
    assert all("4 peers on 2 process(es)" in log for log in logs) and "method lora" in logs[0] and "method ffa" in logs[1]
    folders = {path.parent.name: adapter_digests(path.parent) for path in (place / "runs/sweep").glob("*/run.json")}
    assert len(folders) == 2 and list(folders.values()).count(workplace.plain_digests(place)) == 1
    assert "needs sbatch --array=FIRST-LAST" in slurm.finish(slurm.submit(SWEEP, "sweep.yaml"), "FAILED")


def test_what_is_not_requeued(slurm):
    """A run that fails, and one that is warned, or killed, so early that it would be again before it gets anywhere, or too often."""
    hurried = slurm.submit(TRAIN, "my.yaml", "--output", "runs/hurried", DFL_LEAST="600")
    slurm.reach(hurried, "runs/hurried", 1)
    slurm("scancel", "--batch", "--signal=USR1", hurried)
    assert "stopped before its time was over after" in slurm.finish(hurried, "FAILED") and slurm.job(hurried)["Restarts"] == "0"
    often = slurm.submit(TRAIN, "my.yaml", "--output", "runs/hurried", DFL_LEAST="0", DFL_REQUEUES="0")
    slurm.reach(often, "runs/hurried", workplace.rounds_recorded(slurm.place / "runs/hurried") + 1)
    os.kill(workers(slurm)[0], signal.SIGKILL)
    assert "and not requeued: that was done 0 times" in slurm.finish(often, "FAILED")
    job = slurm.submit(TRAIN, "my.yaml", "--train.rounds", "many")
    log = slurm.finish(job, "FAILED")
    assert "dfl: train.rounds = 'many'" in log and "requeued" not in log and slurm.job(job)["Restarts"] == "0"


def test_readme_under_slurm(tmp_path):
    """Every block in its order, as written, but for the place of the trial cluster; jobs end before the next block is run."""
    if slurm_cluster.missing():
        pytest.skip(slurm_cluster.missing())
    place = workplace.make(tmp_path, rounds=4)
    (place / "sweep.yaml").write_text(*workplace.readme_blocks("Slurm", "yaml"))
    blocks = workplace.readme_blocks("Slurm")
    assert "start /tmp/trial" in blocks[0] and "stop /tmp/trial" in blocks[-1]
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as state:
        slurm = Cluster(Path(state), place)
        try:
            for block in blocks:
                slurm("bash", "-euc", block.replace("/tmp/trial", state))
                if "sbatch" in block:
                    jobs = set(re.findall(r"JobId=(\d+)", slurm("scontrol", "show", "job", "--oneliner")))
                    assert all(slurm.finish(job) for job in jobs)
        finally:
            slurm_cluster.stop(Path(state))
        assert not slurm_cluster.job_processes(Path(state))
    assert "method tad" in next(place.glob("dfl-[0-9]*.log")).read_text() and len(adapter_digests(place / "runs/slurm")) == 5
    assert adapter_digests(place / "runs/srun") == adapter_digests(place / "runs/sweep/lora")
    written_out = max(place.glob("dfl-sweep-*_1.log"), key=lambda path: path.stat().st_mtime)
    assert written_out.read_text() == "run 1 (ffa) is finished: runs/sweep/ffa\n"


@pytest.mark.core
def test_place_of_a_process_under_slurm():
    batch = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    assert place_from_environment(batch) == Place(), "a batch script with four tasks is not one of them"
    step = batch | {"SLURM_STEP_NODELIST": "gpu[1-3]", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NTASKS": "7"}
    first = step | {"SLURM_NODEID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}
    last = step | {"SLURM_NODEID": "2", "SLURM_PROCID": "6", "SLURM_LOCALID": "0"}
    assert place_from_environment(first) == Place(rank=2, size=7, local_rank=2, local_size=3)
    assert place_from_environment(last) == Place(rank=6, size=7, local_rank=0, local_size=1)


def alive(place: Path, output: str, process: int) -> list[int]:
    """In the last round that a process has recorded."""
    path = place / output / f"process-{process}" / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return json.loads(lines[-1])["alive"] if lines else []


def task(slurm, process: int) -> int:
    """The process that `srun` has started as its task of this number."""
    wanted = f"SLURM_PROCID={process}"
    [found] = [pid for pid in slurm_cluster.job_processes(slurm.state) if "dfl" in slurm_cluster.words(pid)
               and wanted in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    return found


def test_a_run_with_survivors_outlives_a_task_and_a_node(place):
    """A process is killed, and comes back; then a node is lost with its step, and the rest finishes."""
    output = "runs/survivors"
    with cluster(place, lost_after=5) as slurm:
        job = slurm.submit("--nodes", "4", "--ntasks", "4", SURVIVE, "my.yaml", "--output", output, "--train.rounds", "1000",
                           "--membership.patience", "3")

        def until(true) -> None:
            workplace.wait_for(true, 120, lambda: slurm.log(job))

        until(lambda: workplace.rounds_recorded(place / output / "process-0") >= 12)
        os.kill(task(slurm, 1), signal.SIGKILL)
        until(lambda: "going on without process 1 (" in slurm.log(job) and "; 1 came" in slurm.log(job))
        until(lambda: alive(place, output, 0) == alive(place, output, 1) == [0, 1, 2, 3])
        slurm_cluster.lose(slurm.state, "127.0.0.4")
        until(lambda: alive(place, output, 0) == alive(place, output, 2) == [0, 1, 2])
        assert slurm.job(job)["JobState"] == "RUNNING" and workplace.rounds_recorded(place / output / "process-0") < 1000
        log = slurm.finish(job)
    assert "going on without process 3 (" in log and "requeued" not in log
    assert not re.search("Traceback|terminate called|frame #", log), log
    assert [workplace.rounds_recorded(place / output / f"process-{k}") for k in (0, 2)] == [1000, 1000]
