"""The process and the others of its run: rank and size from torchrun or Slurm, device, threads, process group."""

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from dfl.config import Config
from dfl.transport import Distributed, InProcess, Transport, hosting
from dfl.transport.aside import Aside
from dfl.transport.distributed import tensors_of
from dfl.transport.group import Group
from dfl.transport.meeting import meet, reach
from dfl.transport.seats import Seat, agree_on_wire, seat_of
from dfl.transport.team import Team

# the least time that processes have to find each other: they start on machines that are more or less busy
START_SECONDS = 300.0


class Place(NamedTuple):
    """Which of how many processes this is, and which on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


class Worker(NamedTuple):
    """A process among those that a plain start spreads itself over, and the file in which they meet (dfl/run/workers.py)."""

    rank: int
    size: int
    file: str


# of a process that is started by itself, and not by a launcher that gives it a place: 2/4, the third of four
PROCESS = "DFL_PROCESS"


class Runtime(NamedTuple):
    """place: of the process, or of its team, among those that host peers; team: where several processes work for the same peers."""

    place: Place
    device: torch.device
    transport: Transport
    hosted: range  # the peers of this process
    team: Team | None = None


def place_from_environment(env=os.environ) -> Place:
    """From DFL_PROCESS, else from torchrun's variables, else from Slurm's (`srun` starts one task a process), else a
    single process. ValueError for a place that is none."""
    if PROCESS in env:
        return _own_place(env)
    if "RANK" in env:
        return Place(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)),
                     int(env.get("LOCAL_WORLD_SIZE", 1)))
    # a batch script has SLURM_NTASKS and SLURM_PROCID too, but only a task of `srun` has a step: `python` in a batch script is alone
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env:
        counts = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0)),
                     _tasks_on_node(counts, int(env.get("SLURM_NODEID", 0))))
    return Place()


def _own_place(env) -> Place:
    process, _, size = env[PROCESS].partition("/")
    if not process.isdecimal() or not size.isdecimal() or not int(process) < int(size):
        raise ValueError(f"{PROCESS} = {env[PROCESS]!r}; allowed: K/N, process K, from 0, of N")
    return Place(int(process), int(size), int(env.get("LOCAL_RANK", 0)), 1)


def launched(env=os.environ) -> bool:
    """Whether torchrun, srun or a caller with a group of its own has settled how many processes there are."""
    return "RANK" in env or PROCESS in env or place_from_environment(env).size > 1 or dist.is_initialized()


def _tasks_on_node(counts: str, node: int) -> int:
    """Slurm's way to write counts: `2(x3),1` is 2, 2, 2, 1."""
    expanded = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    return expanded[node]


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9],cpu1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", nodelist)
    if not match:
        raise ValueError(f"SLURM_JOB_NODELIST = {nodelist!r} is not a list of hosts")
    prefix, numbers = match.groups()
    return prefix + (re.split(r"[-,]", numbers)[0] if numbers else "")


def node_of_step(env) -> str | None:
    """The node of a task of `srun`, by which the step's other nodes reach it; None on its only one, and elsewhere."""
    several = "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_STEP_NUM_NODES", 1)) > 1
    return env.get("SLURMD_NODENAME") if several and "RANK" not in env and "MASTER_ADDR" not in env else None


def _rendezvous_from_slurm(env) -> None:
    env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "localhost"))))
    # another port for every step, as several may run in one job at a time; below those that systems give to outgoing connections
    env.setdefault("MASTER_PORT", str(15000 + (int(env.get("SLURM_JOB_ID", 0)) + 997 * int(env.get("SLURM_STEP_ID", 0))) % 15000))


def choose_device(config: Config, place: Place) -> torch.device:
    """ValueError when the recipe asks for an accelerator that is not there."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device = 'cuda' is not available here; allowed: auto, cpu")
    return torch.device("cuda", place.local_rank % torch.cuda.device_count())


def check_backend(config: Config, device: torch.device) -> None:
    """ValueError for what no process here can have; what they can have together they settle while they meet."""
    if config.backend == "nccl" and device.type != "cuda":
        raise ValueError(f"backend = 'nccl' needs device 'cuda', got {device.type!r}; allowed: auto, gloo")


def num_cores() -> int:
    """The cores that this process may use: a job often has fewer than its node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads(config: Config, env=os.environ) -> int:
    """Threads of a process: `threads` of the recipe, else the user's OMP_NUM_THREADS, else one.

    One and not a share of the cores: sums are split by the number of threads, so that another number gives other bits. The cores
    are used by processes.
    """
    given = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return config.threads or (int(given) if given.isdecimal() and int(given) else 1)


def only_deterministic() -> None:
    """From now on torch takes only algorithms that give the same bits every time, and raises where it has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # their backward passes add in the order in which blocks come to an end
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def start(config: Config, worker: Worker | None = None) -> Runtime:
    """Join the other processes and choose device, threads and transport. ValueError for what cannot work.

    worker: this process among those that the command has started itself.
    """
    own = Place(worker.rank, worker.size, worker.rank, worker.size) if worker else place_from_environment()
    place = of_team(own, config.processes_per_peer)
    hosted = hosting(config.peers, place.size)[place.rank]
    device = choose_device(config, own)
    torch.set_num_threads(num_threads(config))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.deterministic:
        only_deterministic()
    transport, team = connect(config, own, device, worker)
    return Runtime(place, device, transport, hosted, team)


def of_team(place: Place, each: int) -> Place:
    """The place of a process's team among the teams of `each`. ValueError for a number of processes that is no multiple of it."""
    if place.size % each:
        raise ValueError(f"processes_per_peer = {each} and {place.size} process(es) were started; allowed: a multiple of {each}, as "
                         f"by torchrun --nproc-per-node {each}")
    return place._replace(rank=place.rank // each, size=place.size // each)


def connect(config: Config, place: Place, device: torch.device, worker: Worker | None = None, divides: bool = True
            ) -> tuple[Transport, Team | None]:
    """The transport of this process, in a group of its own with the others, once all have come, and its team, if it has one.

    Alone, all stays in memory. Of a team the first process is among the others, and none of the rest.
    device: where peers live. divides: a team is to hold a model of ours in parts. ConnectionError where the others do not come.
    """
    if place.size == 1:
        return InProcess(), None
    if worker is None and PROCESS in os.environ:
        raise ValueError(f"{PROCESS} = {os.environ[PROCESS]!r} is for membership: survive, whose processes find each other; with "
                         "membership: fixed start them with torchrun or srun")
    check_backend(config, device)
    patience = max(1.2 * config.timeout, START_SECONDS)
    each, store, team = config.processes_per_peer, None, None
    with _within_the_machine() if worker else contextlib.nullcontext():
        if each > 1:
            with _naming(place):
                store, (number, rank) = _store(place, worker, patience), divmod(place.rank, each)
                team = Team(dist.PrefixStore(f"team/{number}", store), rank, each, first=number * each, device=device,
                            wish=config.backend if divides else None, timeout=config.timeout, patience=patience)
            place = of_team(place, each)
            if place.size == 1 or not team.speaks:
                return InProcess(), team
        group = _meet(place, worker, patience, config.backend, device, store)
    transport = Distributed(config.peers, group, device=device, timeout=config.timeout, aside=_aside(config, device, team))
    transport.introduce(socket.gethostname())
    return transport, team


def _aside(config: Config, device: torch.device, team: Team | None) -> Aside | None:
    """Where exchanges go on while peers train on a GPU. Not in a team: the parts of its base model go over NCCL
    meanwhile, and steps of two groups that processes begin in different orders may wait for each other."""
    return Aside(device, tensors_of) if device.type == "cuda" and config.delay and team is None else None


@contextlib.contextmanager
def _within_the_machine() -> Iterator[None]:
    """The connections of processes that the command has started go over the loopback interface."""
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    if before is None and sys.platform.startswith("linux"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("GLOO_SOCKET_IFNAME", None)


def _meet(place: Place, worker: Worker | None, patience: float, wish: str, device: torch.device,
          store=None) -> Group:
    """Join the others in a group of our own. ConnectionError says in one line who waited where, when they do not come.

    wish: `backend` of the recipe; over what messages go all settle together. store: where they meet, if that is known already.

    Processes agree over gloo in any case: it says who is missing, which NCCL cannot. The group's own time-out is longer than
    that of the transport, so that NCCL's watchdog (TORCH_NCCL_ASYNC_ERROR_HANDLING), which ends the process, comes second.
    """
    with _naming(place):
        store = store or _store(place, worker, patience)
        store = dist.PrefixStore(f"dfl/{meet(store, place.rank, place.size, patience)}", store)
        seats = [Seat(*json.loads(told)) for told in _told(store, place, json.dumps(seat_of(device)), "seat")]
        wire, why = agree_on_wire(wish, seats)
        if why and place.rank == 0:
            print(f"dfl: messages go over gloo, by way of the CPUs: {why}", file=sys.stderr)
        return Group(store, place.rank, place.size, timeout=patience, device=device if wire == "nccl" else None)


@contextlib.contextmanager
def _naming(place: Place) -> Iterator[None]:
    """What goes wrong while processes meet, in one line."""
    try:
        yield
    except (RuntimeError, ConnectionError) as error:
        if "Duplicate GPU" in str(error):
            raise ValueError("backend: NCCL refuses processes that share a GPU (\"Duplicate GPU\"); allowed: gloo") from error
        at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(f"process {place.rank} on {socket.gethostname()} did not meet the other {place.size - 1} at {at}: "
                              f"{str(error).splitlines()[0][:200]}") from error


def _told(store, place: Place, mine: str, what: str) -> list[str]:
    """What every process says, by process, under a key that is used for this alone."""
    store.set(f"{what}/{place.rank}", mine)
    return [store.get(f"{what}/{process}").decode() for process in range(place.size)]


def told_addresses(place: Place, worker: Worker | None, mine: str, patience: float) -> list[str]:
    """What every process says of itself, by process: through the launcher's store, which is not needed afterwards."""
    try:
        store = _store(place, worker, patience)
        store = dist.PrefixStore(f"dfl/{meet(store, place.rank, place.size, patience)}", store)
        found = _told(store, place, mine, "at")
        store.set(f"read/{place.rank}", "")
        if place.rank == 0:  # which may hold the store: until all have read
            store.wait([f"read/{process}" for process in range(place.size)], timedelta(seconds=patience))
        return found
    except (RuntimeError, ConnectionError) as error:
        raise ConnectionError(f"process {place.rank} on {socket.gethostname()} did not meet the other {place.size - 1}: "
                              f"{str(error).splitlines()[0][:200]}") from error


def _store(place: Place, worker: Worker | None, patience: float):
    """Where the processes find each other: a file, the store of a group that the caller has, or the launcher's address."""
    if worker:
        return dist.FileStore(worker.file, worker.size)
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if "RANK" not in os.environ:
        _rendezvous_from_slurm(os.environ)
    if place.rank and "MASTER_PORT" in os.environ:
        reach((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), patience)
    return next(dist.rendezvous("env://", place.rank, place.size, timeout=timedelta(seconds=patience)))[0]
