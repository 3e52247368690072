"""Processes for a test, forked from a server that has torch loaded already: several in one gloo group, or one on its own."""

import itertools
import multiprocessing as mp
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def _server():
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dfl.run.train", "processes"])
    return context


def begin(function, *args) -> mp.Process:
    """A process at work on `function(*args)`, in no group."""
    worker = _server().Process(target=function, args=args, daemon=True)
    worker.start()
    return worker


def run_alone(function, *args, timeout: float = 60.0):
    """`function(*args)` in a process of its own, in no group: what it returned. Fails with its trace."""
    queue = _server().SimpleQueue()
    worker = begin(_alone, queue, function, args)
    try:
        ok, result = _receive(queue, [worker], timeout)
    finally:
        worker.join(5)
        worker.kill()
    assert ok, result
    return result


def _alone(queue, function, args) -> None:
    torch.set_num_threads(1)
    try:
        queue.put((True, function(*args)))
    except BaseException:
        queue.put((False, traceback.format_exc()))


def run_processes(function, num_processes: int, *args, timeout: float = 60.0, lost=()) -> list:
    """`function(rank, *args)` in `num_processes` processes of one gloo group: what each returned. Fails with their traces.

    Those in `lost` are not waited for, and have None.
    """
    context = _server()
    with tempfile.TemporaryDirectory() as folder:
        queue = context.SimpleQueue()
        # who is stopped may have locked the file of a store just then, for all: as torchrun's, it is held by somebody else here
        held = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if lost else None
        store = held.port if held else f"{folder}/store"
        given = [(queue, function, rank, num_processes, store, not lost, args) for rank in range(num_processes)]
        workers = [context.Process(target=_work, args=one, daemon=True) for one in given]
        for worker in workers:
            worker.start()
        try:
            results = dict(_receive(queue, workers, timeout) for _ in range(num_processes - len(lost)))
        finally:
            for rank, worker in enumerate(workers):
                worker.join(0 if rank in lost else 5)
                if worker.is_alive():
                    worker.kill()
        failures = [text for ok, text in results.values() if not ok]
        assert not failures, "\n".join(failures)
        return [results[rank][1] if rank in results else None for rank in range(num_processes)]


def _receive(queue, workers, timeout: float):
    reader = queue._reader
    assert reader.poll(timeout), f"no answer within {timeout} s from {[w.name for w in workers if w.is_alive()]}"
    return queue.get()


def _work(queue, function, rank: int, size: int, store: str | int, all_stay: bool, args) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    try:
        if isinstance(store, int):
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        met = dist.TCPStore("127.0.0.1", store, is_master=False) if isinstance(store, int) else dist.FileStore(store, size)
        dist.init_process_group("gloo", store=met, rank=rank, world_size=size, timeout=timedelta(seconds=30))
        result = function(rank, *args)
        if all_stay:
            dist.barrier()
            dist.destroy_process_group()
        queue.put((rank, (True, result)))
    except BaseException:
        queue.put((rank, (False, f"process {rank}:\n{traceback.format_exc()}")))


_made = itertools.count()


def distributed(num_peers: int, **options):
    """A transport in a group of its own, beside the default group of the test."""
    from dfl.transport import Distributed
    from dfl.transport.group import Group
    store = dist.PrefixStore(f"test/{next(_made)}", dist.distributed_c10d._get_default_store())
    group = Group(store, dist.get_rank(), dist.get_world_size(), timeout=30)
    dist.barrier()  # what needs no others may end before they have met it
    return Distributed(num_peers, group, device=torch.device("cpu"), **options)


def ring_exchange(transport, t: int, rank: int) -> dict:
    """Round t of one peer a process in a ring of three: what arrives here."""
    from dfl.transport.packet import Packet
    others = [(rank - 1) % 3, (rank + 1) % 3]
    packet = Packet({"x": torch.zeros(8, dtype=torch.uint8)}, {"x": 2}, {})
    return transport.exchange(t, {rank: packet}, {rank: others}, {rank: others}, {rank: others})


def bring_loopback_up() -> None:
    """In a fresh network namespace even the loopback interface is down."""
    import fcntl
    import socket
    import struct
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, 0x8914, struct.pack("16sH14x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING


def loopback_bytes() -> int:
    """What the loopback interface of this network namespace has sent; its file system view may be another namespace's."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise AssertionError("no loopback interface")
