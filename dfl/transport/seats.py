"""Over what the messages of a run go: settled by all processes together, from what each tells of itself while they meet.

A process that chose by itself could take NCCL where another takes gloo, and both would wait for ever. Nothing here speaks to
another process, and nothing is looked up but in `seat_of`.
"""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

# from this NCCL on NCCL_MULTI_RANK_GPU_ENABLE lets processes share a GPU
SHARES = (2, 30)


class Seat(NamedTuple):
    """A process: the host as NCCL knows it, its GPU ("": none), the NCCL that it has, and whether that may share a GPU."""

    host: str
    gpu: str = ""
    nccl: Sequence[int] = ()
    shares: bool = False


def seat_of(device: torch.device, env: Mapping[str, str] = os.environ) -> Seat:
    """This process. One visible GPU a task looks the same in every task: their identities do not."""
    host = env.get("NCCL_HOSTID", socket.gethostname())
    if device.type != "cuda":
        return Seat(host)
    version = tuple(torch.cuda.nccl.version()) if torch.distributed.is_nccl_available() else ()
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", device.index)
    return Seat(host, str(uuid), version, env.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and version >= SHARES)


def agree_on_wire(wish: str, seats: Sequence[Seat]) -> tuple[str, str]:
    """nccl or gloo, the same for the same seats, and why it is not nccl where that is not plain: peers live on GPUs.

    wish: `backend` of the recipe. ValueError for nccl where it cannot be.
    """
    why = _against_nccl(seats)
    if wish == "nccl" and why:
        raise ValueError(f"backend = 'nccl': {why}; allowed: auto, gloo")
    if wish == "gloo" or why:
        return "gloo", why if wish == "auto" and any(seat.gpu for seat in seats) else ""
    return "nccl", ""


def _against_nccl(seats: Sequence[Seat]) -> str:
    without = [process for process, seat in enumerate(seats) if not seat.gpu]
    if without:
        return f"process {without[0]} has no GPU"
    lacking = [process for process, seat in enumerate(seats) if not seat.nccl]
    if lacking:
        return f"torch of process {lacking[0]} has no NCCL"
    first: dict[tuple[str, str], int] = {}
    for process, seat in enumerate(seats):
        other = first.setdefault((seat.host, seat.gpu), process)
        if other != process and not (seat.shares and seats[other].shares):
            version = ".".join(map(str, seat.nccl))
            return (f"processes {other} and {process} share a GPU, which NCCL {version} does not allow them (from 2.30 on it does "
                    "with NCCL_MULTI_RANK_GPU_ENABLE=1)")
    return ""
