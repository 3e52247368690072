"""How the processes of a script become peers: each takes its rank for itself and meets the others in a private group.

Torch's default group is never ours, so that a script that asks torch finds one process alone, or a group of its own.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfl.config import Config
from dfl.config.sources import Source, tree_of
from dfl.run.parent import end_with_launcher
from dfl.run.runtime import Place, connect, of_team, place_from_environment
from dfl.script.settings import check, settings
from dfl.transport import Transport
from dfl.transport.agreement import together
from dfl.transport.echo import Listening, Speaking
from dfl.transport.handshake import check_secret, check_settings
from dfl.transport.handshake import settings as shared_settings
from dfl.transport.team import Team

# what launchers tell a process of its place: accelerate, transformers and TRL would divide data and models by it
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
            "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
# by the name of torchrun's variable, those of Intel MPI and MPICH, Open MPI, MVAPICH
MPI = {"RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
       "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
       "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
       "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")}
GPUS = Path("/proc/driver/nvidia/gpus")


class Peer:
    """This process among the peers of a script.

    rank: its number, from 0; size: how many peers there are. members, member: how many processes are this peer, each with the
    script's loop, and which of them this is; the first speaks for it. output: the run's folder where one was given, "" for none
    at all, None where the script decides.

    transport: what all processes of a peer learn of the other peers; outside: the first's alone, None elsewhere.
    """

    def __init__(self, config: Config, topology, place: Place, transport: Transport, output: str | None, overwrite: bool,
                 team: Team | None = None):
        self.config, self.topology, self.place, self.team = config, topology, place, team
        self.output, self.overwrite = output, overwrite
        self.rank, self.size = place.rank, place.size
        self.member, self.members = (0, 1) if team is None else (team.rank, team.size)
        self.speaks = self.member == 0
        self.outside: Any = transport if self.speaks else None
        self.transport: Any = transport if team is None else Speaking(transport, team) if self.speaks else Listening(self.size, team)
        self._open = True

    def same(self, x: Tensor) -> None:
        """Give all processes of this peer the numbers that the first has, in place."""
        if self.team is None:
            return
        if self.speaks:
            self.team.tell({}, {"x": x})
        else:
            x.copy_(self.team.hear()[1]["x"])

    def shard(self, examples: Any) -> Any:
        """This peer's part of examples that all peers hold alike: every size-th one, from its own number on."""
        if hasattr(examples, "shard"):
            return examples.shard(num_shards=self.size, index=self.rank)
        return examples[self.rank::self.size]

    @property
    def open(self) -> bool:
        return self._open

    def leave(self, error: BaseException | None = None) -> None:
        """Leave together with the others; or because of an error, which they are told. Once is enough."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self._end)
        if error is None:
            self.transport.close()
        else:
            self.transport.leave(error)

    def _end(self) -> None:
        """The script has ended: by an error that nobody caught, or after its last line."""
        error = getattr(sys, "last_value", None)
        with contextlib.suppress(OSError, ValueError):
            self.leave(error)


_current: Peer | None = None


def current() -> Peer | None:
    """What this process has joined, and not left."""
    return _current if _current is not None and _current.open else None


def join(source: Source = None, every: int | None = None, output: str | os.PathLike | bool | None = None,
         overwrite: bool = False, *, before: Callable[[Place], None] = lambda place: None,
         env: MutableMapping[str, str] = os.environ, **words: Any) -> Peer:
    """Become one of the peers of this script, of which the launcher has started one a process; alone without a launcher.

    With `processes_per_peer: k` every k processes are one peer, and find the launcher's variables of a small world of their own.
    before: called with the place before anything is waited for. ValueError where this process has joined already, for words
    that do not go together (settings), and on all processes where theirs differ; ConnectionError where others do not come.
    """
    global _current
    if current() is not None:
        raise ValueError("this process has joined already; one script has one group of peers, leave() ends it")
    place = place_from_environment(from_mpi(env))
    if output is True:
        raise ValueError("output = True is not allowed; allowed: a folder, None (the script's own output folder), False (none)")
    folder = _folder(output, source)
    if folder:
        words = words | {"output": folder}
    config = settings(source, every, words, place.size)
    each = config.processes_per_peer
    topology = check(config)
    before(place)
    end_with_launcher(env)
    transport, team = connect(config, place, torch.device("cpu"), divides=False)
    peer = Peer(config, topology, of_team(place, each), transport, folder, overwrite, team)
    try:
        if peer.speaks:
            check_secret(transport)
            transport.watch(lambda: False)
        check_settings(peer.transport, shared_settings(config, overwrite=overwrite))
        together(peer.transport, lambda: None)
        if team is not None:
            team.watch(transport.leave, always=True)
            small_world(team, env)
    except BaseException as error:
        peer.transport.leave(error)
        raise
    _current = peer
    atexit.register(peer._end)
    return peer


def _folder(output: str | os.PathLike | bool | None, source: Source) -> str | None:
    if output is None:
        given = tree_of(source)
        return given.get("output", given.get("output_dir"))
    return os.fspath(output) if not isinstance(output, bool) else ""


def from_mpi(env: MutableMapping[str, str]) -> Mapping[str, str]:
    """The environment with torchrun's names for what mpirun says. ValueError where mpirun started several without an address."""
    found = {name: next(env[key] for key in keys if key in env) for name, keys in MPI.items() if any(key in env for key in keys)}
    if "RANK" in env or int(found.get("WORLD_SIZE", 1)) == 1 or "SLURM_STEP_NODELIST" in env:
        return env
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise ValueError("mpirun started several processes and nobody says where they meet; give MASTER_ADDR and MASTER_PORT "
                         "(mpirun -x MASTER_ADDR=host -x MASTER_PORT=29500), or use torchrun or srun")
    env.update(found)  # where they meet is read from the environment of the process
    return env


def forget_launcher(env: MutableMapping[str, str] = os.environ) -> None:
    """Remove what would make transformers, accelerate and TRL take the peers for one distributed job."""
    for name in (*LAUNCHER, *(key for keys in MPI.values() for key in keys)):
        env.pop(name, None)


def small_world(team: Team, env: MutableMapping[str, str] = os.environ) -> None:
    """The launcher's variables as if the team were all that was started: transformers, accelerate and TRL divide data by them."""
    forget_launcher(env)
    rank, size = str(team.rank), str(team.size)
    env.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1",
               MASTER_PORT=str(team.port()), TORCHELASTIC_USE_AGENT_STORE="True")  # nobody has to open that port: the store is there
    env.setdefault("TORCHELASTIC_RESTART_COUNT", "0")


def own_gpus(place: Place, env: MutableMapping[str, str] = os.environ, gpus: Path = GPUS, each: int = 1) -> None:
    """Let this process see one GPU, or those of the `each` processes of its peer, before CUDA starts: with several, a Trainer would
    spread one process over all of them.

    ValueError where CUDA has begun already with others.
    """
    if torch.cuda.is_initialized():
        if torch.cuda.device_count() > each:
            raise ValueError(f"CUDA has begun with {torch.cuda.device_count()} GPUs; call join() before anything touches a GPU")
        return
    given = env.get("CUDA_VISIBLE_DEVICES")
    visible = [part.strip() for part in given.split(",") if part.strip()] if given is not None else \
        [str(k) for k in range(len(list(gpus.iterdir())) if gpus.is_dir() else 0)]
    if visible:
        first = place.local_rank - place.local_rank % each
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[(first + k) % len(visible)] for k in range(each))
