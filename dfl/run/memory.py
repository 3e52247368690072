"""How much memory a run needs, before anything is allocated; without torch, so that an absurd number is refused at once."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dfl.config import Config
from dfl.config.optimizers import OPTIMIZERS

# bytes that every process keeps of each peer, hosted or not (its rank, its shard), and of each that it hosts (its stream of data,
# parameters, random generator), without a number of its model
OF_EACH, OF_HOSTED = 130, 6000
_NUMBER = 4  # factors, gradients and moments are float32


class Part(NamedTuple):
    """What a part of the memory of a process is for, its bytes, and whether it is there from the first step on whatever happens."""

    name: str
    size: float
    certain: bool = True


def limit(env: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of memory: of the machine, or fewer where a control group or `ulimit -v` allows fewer. inf where nobody tells."""
    found = [math.inf]
    try:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        pass
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            found.append(float((env / name).read_text()))
        except (OSError, ValueError):
            pass
    try:
        import resource
        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        found += [soft] if soft != resource.RLIM_INFINITY else []
    except ImportError:
        pass
    return float(min(found))


def check_peers(config: Config, env: Mapping[str, str] = os.environ) -> None:
    """ValueError for more peers than this machine could count, whatever they train."""
    processes = max(1, int(env.get("WORLD_SIZE", env.get("SLURM_NTASKS", "1"))) // config.processes_per_peer)
    needed = OF_EACH * config.peers + OF_HOSTED * math.ceil(config.peers / processes)
    if needed > limit():
        raise ValueError(f"peers = {config.peers} need {told(needed)} of memory in a process before it has a model, and this machine "
                         f"has {told(limit())}; take fewer peers or more processes")


def parts(config: Config, *, hosted: int, row: int, active: int, message: int, model: float, expanded: int = 0, residual: int = 0,
          remote: int = 0, first: bool = True) -> list[Part]:
    """The memory of a process that hosts `hosted` peers.

    row, active, message: numbers of a peer's row, of what it trains in the first round, of what it sends in it; expanded: of the
    factors that its cores make; residual: of what its rule keeps beside them; remote: messages from other processes that it may get
    in a round; model: bytes of the base model.
    """
    train, of = config.train, f"{hosted:,} peer{'s' if hosted > 1 else ''}"
    moments = OPTIMIZERS[train.optimizer].kept / _NUMBER if train.momentum or train.optimizer != "sgd" else 0
    carried = moments if train.state == "carried" else 0
    base = "base model" if config.processes_per_peer == 1 else f"base model, one of {config.processes_per_peer} parts"
    found = [Part(base, model), Part(f"adapters of {of}", _NUMBER * hosted * row),
             Part("their gradients", _NUMBER * hosted * row),
             Part(f"their moments ({train.optimizer})", _NUMBER * hosted * active * moments),
             Part("their rows as the round began", _NUMBER * hosted * row),
             Part("and the round before", _NUMBER * hosted * (row + 2 * carried * active), certain=False),
             Part("factors that cores make, and gradients", 2 * _NUMBER * hosted * expanded),
             Part("residuals beside the adapters", 2 * _NUMBER * hosted * residual),
             Part("messages sent and received", _NUMBER * message * (hosted + remote), certain=False)]
    if first and (config.measure.every or config.eval.consensus):
        copies = 2 if config.measure.every else 1
        found.append(Part(f"rows of all {config.peers:,} peers, to measure", copies * _NUMBER * config.peers * row, certain=False))
    return [part for part in found if part.size]


def check(config: Config, found: list[Part], processes: int, available: float, where: str) -> None:
    """ValueError where what is certain is more than there is: for `processes` like this one that share `available` bytes."""
    needed = processes * sum(part.size for part in found if part.certain)
    if needed > available:
        largest = max((part for part in found if part.certain), key=lambda part: part.size)
        raise ValueError(f"peers = {config.peers} with lora.rank = {_rank(config)} need at least {told(needed)} of "
                         f"memory here, most of it for {largest.name}, and {where} has {told(available)}; take fewer peers, a smaller "
                         "rank, or more machines")


def _rank(config: Config) -> str:
    rank = config.lora.rank
    if isinstance(rank, int):
        return str(rank)
    return f"up to {max(rank)}" if isinstance(rank, tuple) else str(config.to_dict()["lora"]["rank"])


def lines(found: list[Part], available: float, where: str, processes: int = 1) -> list[str]:
    """A short table: a line for each part, and their sum beside what there is."""
    total, width = sum(part.size for part in found), max(len(part.name) for part in found)
    rows = [f"  {part.name.ljust(width)}  {told(part.size):>9}" for part in found]
    of = f"; {processes} processes share the {told(available)} of {where}" if processes > 1 else f"; {where} has {told(available)}"
    over = ", which may not suffice" if processes * total > available else ""
    return [*rows, f"  {'together'.ljust(width)}  {told(total):>9}{of}{over}"]


def told(size: float) -> str:
    """Bytes as people read them: 12.3 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size:,.0f} B"
