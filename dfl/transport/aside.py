"""What moves messages while peers train on a GPU: one thread, and one stream of the GPU.

On CPUs gloo moves what has been posted by itself. A GPU's messages have to be copied first, or are begun by a host that waits
for one step after the other (NCCL); on the stream of the local phase all of that would stand behind the kernels of the local
steps, and in its thread it would keep these from being launched. So it has its own of both. Events keep the order: it begins
behind what the caller's stream had been given by then, and what it makes is used behind the last of its copies.

The mix itself stays on the caller's stream: it changes the rows that the local phase before has left and that the next one
begins with, so that there is nothing beside which it could go on.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Aside:
    """Takes one call after the other. used: the tensors of what a call made, which the caller's stream goes on to use.

    device: a GPU, or a CPU, which has no streams: then it is the thread alone, as tests want it. cuda: who makes streams and events.
    """

    def __init__(self, device: torch.device, used: Callable[[Any], Iterable[Tensor]] = lambda made: (), cuda: Any = torch.cuda):
        self.device, self.used, self.cuda = device, used, cuda
        self.stream = cuda.Stream(device) if device.type == "cuda" else None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # a daemon: nobody waits for it where a run fails while it waits for others
        threading.Thread(target=self._work, name="dfl-aside", daemon=True).start()

    def begin(self, call: Callable[[], Made]) -> Callable[[], Made]:
        """`call()` goes on from here. What this gives waits for what it made, or raises what it raised; once."""
        job = _Job(call, self._event(self.cuda.current_stream(self.device)) if self.stream else None)
        self._jobs.put(job)
        return lambda: self._result(job)

    def end(self) -> None:
        """Nothing more is begun; the thread ends behind the call at work."""
        self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            try:
                with self.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                    if self.stream:
                        self.stream.wait_event(job.ready)
                    job.made = job.call()
                    job.ready = self._event(self.stream) if self.stream else None
            except BaseException as error:
                job.error = error
            done = job.done
            del job  # its tensors are the caller's to drop, and not this thread's
            done.set()

    def _event(self, stream: Any) -> Any:
        event = self.cuda.Event()
        event.record(stream)
        return event

    def _result(self, job: "_Job[Made]") -> Made:
        job.done.wait()
        if job.error is not None:
            raise job.error
        if self.stream:
            current = self.cuda.current_stream(self.device)
            current.wait_event(job.ready)
            for tensor in self.used(job.made):
                tensor.record_stream(current)  # its memory is given to nobody before that has used it
        return job.made


class _Job(Generic[Made]):
    """ready: what its stream waits for first, then what those wait for who use what it made."""

    made: Made

    def __init__(self, call: Callable[[], Made], ready: Any):
        self.call, self.ready, self.done = call, ready, threading.Event()
        self.error: BaseException | None = None
