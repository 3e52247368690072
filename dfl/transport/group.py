"""The processes of a run, in process groups of their own: torch's default group stays the user's.

So a peer may itself be a sharded or data-parallel job, and a script that starts a run may have a group of its own. Buffers
on CPUs go over gloo, those on GPUs over NCCL where a run asks for it; nothing else in dfl speaks to torch.distributed.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dfl.transport.watch import Watch

# between two looks at who is silent, while something is waited for
LOOK_SECONDS = 0.5
# of waiting for a GPU without a pause: a message between GPUs takes less than the shortest pause there is
SPIN_SECONDS = 0.002
# so many processes connect with each other as they start; more would each hold buffers for all others
MOST_CONNECTED = 64


@dataclass
class Begun:
    """What is under way, by process: buffers, which nobody else may touch, gloo's work on them, and who had gone already."""

    sent: dict[int, Tensor]
    received: dict[int, Tensor]
    works: list = field(default_factory=list)
    missing: list[int] = field(default_factory=list)


class Group:
    """`size` processes, of which this is `rank`, connected through `store`, which nobody else writes below the same prefix.

    timeout: seconds until a step of the group itself gives up; longer than any wait of a run, whose errors say who is missing.
    device: the GPU of this process, where messages go over NCCL; None: over gloo.
    """

    def __init__(self, store, rank: int, size: int, *, timeout: float, device: torch.device | None = None):
        self.store, self.rank, self.size, self.device = store, rank, size, device
        limit = timedelta(seconds=timeout)
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, limit)
        self._nccl = None if device is None else _nccl(dist.PrefixStore("nccl", store), rank, size, limit, device)

    @property
    def wire(self) -> torch.device:
        """Where the buffers of messages lie."""
        return self.device or torch.device("cpu")

    @property
    def open(self) -> bool:
        return self._gloo is not None

    def begin(self, sent: dict[int, Tensor], received: dict[int, Tensor]) -> "Begun":
        """Send and receive all of it together, by process in ascending order at both ends, all buffers on one device. On CPUs it goes
        on by itself from here; on GPUs it begins with `end`."""
        begun = Begun(sent, received)
        if any(tensor.device.type == "cuda" for tensor in (*sent.values(), *received.values())):
            return begun
        for q in sorted(sent.keys() | received.keys()):
            try:
                if q in received:
                    begun.works.append((q, self._gloo.recv([received[q]], q, 0)))
                if q in sent:
                    begun.works.append((q, self._gloo.send([sent[q]], q, 0)))
            except RuntimeError:  # its connection was closed before
                begun.missing.append(q)
                break
        return begun

    def end(self, begun: "Begun", deadline: float, watch: Watch | None, waiter: "Waiter | None") -> tuple[list[int], bool]:
        """The processes that did not do their part, and whether they are silent."""
        if begun.missing or not begun.sent and not begun.received:
            return begun.missing, False
        if not begun.works:
            return self._move_on_gpu(begun.sent, begun.received, deadline, watch, waiter)
        return waiter.wait(begun.works, deadline, watch) if waiter else (_wait(begun.works, deadline), False)

    def _move_on_gpu(self, sent, received, deadline, watch, waiter) -> tuple[list[int], bool]:
        """NCCL does not say who is missing: all that take part. Asking instead of waiting leaves the time-out to us, and
        the watchdog of NCCL, which would end the process, has a longer one."""
        partners = sorted(sent.keys() | received.keys())
        try:
            self._nccl._start_coalescing(self.device)
            for q in partners:
                if q in received:
                    self._nccl.recv([received[q]], q, 0)
                if q in sent:
                    self._nccl.send([sent[q]], q, 0)
            work, began = self._nccl._end_coalescing(self.device), time.monotonic()
            look = began + LOOK_SECONDS
            while not work.is_completed():
                now = time.monotonic()
                if now > deadline:
                    return partners, False
                if watch and now > look:
                    look = now + LOOK_SECONDS
                    if failed := watch.failed():  # no connection closes that would tell
                        return failed, False
                    if silent := watch.silent():
                        return silent, True
                time.sleep(0 if now - began < SPIN_SECONDS else 0.0005)
            work.wait()
        except RuntimeError:
            return partners, False
        return [], False

    def close(self) -> None:
        """Leave together: without the barrier gloo aborts now and then when one process is gone before another."""
        if self.open:
            self._gloo.barrier().wait()
            if self._nccl is not None:
                self._nccl.shutdown()
            self._gloo = self._nccl = None

    def abort(self) -> None:
        """Close all connections at once, so that the others notice; nobody is waited for."""
        if self._nccl is not None:
            self._nccl.abort()  # what waits on the device would make a mere destruction wait as well
        self._gloo = self._nccl = None


def _nccl(store, rank: int, size: int, limit: timedelta, device: torch.device):
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    with _no_end_by_watchdog():
        backend = dist.ProcessGroupNCCL(store, rank, size, options)
    group._register_backend(device, dist.ProcessGroup.BackendType.NCCL, backend)
    # NCCL makes its communicator in the first step of the group, and all processes must be there
    group.allreduce([torch.zeros(1, device=device)]).wait()
    _connect(group, rank, size, device)
    return group


def _connect(group, rank: int, size: int, device: torch.device) -> None:
    """A byte to and from every other process: NCCL connects a pair at its first message, where it waits without a time-out of ours."""
    if size > MOST_CONNECTED:
        return
    sent, received = torch.zeros(1, dtype=torch.uint8, device=device), torch.zeros(size, 1, dtype=torch.uint8, device=device)
    group._start_coalescing(device)
    for q in range(size):
        if q != rank:
            group.recv([received[q]], q, 0)
            group.send([sent], q, 0)
    group._end_coalescing(device).wait()


@contextlib.contextmanager
def _no_end_by_watchdog() -> Iterator[None]:
    """A group that is made meanwhile leaves errors to us: else NCCL's watchdog ends the process before it has said what was wrong."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0" if before is None else before
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


class Waiter:
    """Waits for gloo in a thread of its own. Its waits cannot be broken off: a timeout breaks all connections, so one cannot wait in
    slices. The main thread can, and sees meanwhile who shows no life; it keeps all tensors until the wait is over."""

    def __init__(self):
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="dfl-wait", daemon=True).start()

    def _run(self) -> None:
        while job := self.jobs.get():
            works, deadline, done, missing = job
            missing += _wait(works, deadline)
            del works, job
            done.set()

    def end(self) -> None:
        """Nothing more is waited for; the thread ends behind the wait at work."""
        self.jobs.put(None)

    def wait(self, works: list, deadline: float, watch: Watch) -> tuple[list[int], bool]:
        done, missing = threading.Event(), []
        self.jobs.put((works, deadline, done, missing))
        while not done.wait(LOOK_SECONDS):
            if silent := watch.silent():
                return silent, True
        return missing, False


def _wait(works: list, deadline: float) -> list[int]:
    missing = set()
    for q, work in works:
        try:
            # gloo counts whole milliseconds: one more, so that a time-out is never taken for an early end
            work.wait(timedelta(seconds=max(0.0, deadline - time.monotonic()) + 0.001))
        except RuntimeError:
            missing.add(q)
            if time.monotonic() < deadline:  # it has gone, which explains enough
                break
    return sorted(missing)


def address_of(store) -> tuple[str, int] | None:
    """Where a store listens; None for a file, which nobody holds."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return (store.host, store.port) if isinstance(store, dist.TCPStore) else None


def held_by_first(store) -> bool:
    """Whether process 0 holds the store, so that it goes when that goes: it is no file, and not torchrun's."""
    return address_of(store) is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
