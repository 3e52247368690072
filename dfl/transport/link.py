"""Frames between the processes of a run: sent, received, checked, and when somebody is missing, who and why."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfl.transport import frames
from dfl.transport.group import Begun, Group, Waiter, address_of, held_by_first
from dfl.transport.notes import Note, Notes
from dfl.transport.stopping import Stopped
from dfl.transport.watch import Watch, held_up_by, no_life, waits_for


class Link:
    """What data plane and control plane share: connections to the other processes, and what is known of these.

    `hosts`: the peers of each process. `run`: a number that all processes of a run share; a frame of another run, round or
    sender is refused. `round`: the round at work, None before the first.
    """

    def __init__(self, group: Group, hosts: list[range], *, run: int = 0, timeout: float = 300.0):
        self.group, self.rank, self.size, self.hosts = group, group.rank, group.size, hosts
        self.run, self.timeout, self.round = run % 2**64, timeout, None
        self.names = ["not told"] * self.size
        self.notes = Notes(group.store, self.rank, address_of(group.store))
        self._store_holder = 0 if held_by_first(group.store) else None
        self._watch, self._waiter = None, None
        self._buffers: dict[tuple[str, str, int], Tensor] = {}

    @property
    def members(self) -> Sequence[int]:
        """The processes that take part, ascending."""
        return range(self.size)

    def watch(self, asked: Callable[[], bool]) -> None:
        # a clone: a connection to the store is for one thread
        self._watch = Watch(self.group.store.clone(), self.rank, f"dfl/watch/{self.run:x}", asked, self._store_holder)
        self._waiter = Waiter()
        self._watch.start()

    @property
    def told_to_stop(self) -> bool:
        return self._watch is not None and self._watch.told

    def buffer(self, use: str, what: str, process: int, num_bytes: int, device: torch.device, locked: bool = False) -> Tensor:
        """A buffer that is kept from round to round: fresh memory costs a page fault every 4 KiB. locked: on the CPU, in pages that
        stay where they are, so that a GPU writes into it by itself."""
        kept = self._buffers.get((use, what, process))
        if kept is None or kept.numel() < num_bytes or kept.device != device:
            kept = torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=locked and device.type == "cpu")
            self._buffers[use, what, process] = kept
        return kept[:num_bytes]

    def keep(self, use: str, what: str, process: int, buffer: Tensor) -> None:
        """Use this buffer from now on."""
        self._buffers[use, what, process] = buffer

    def label(self, what: str, sender: int) -> frames.Label:
        return frames.Label(what, sender, self.run, self.round)

    def transfer(self, what: str, sent: dict[int, Tensor], received: dict[int, Tensor]) -> int:
        """Tensors in frames of their own, those received written in place; the bytes sent. A tensor for several is sealed once."""
        sealed: dict[int, Tensor] = {}
        for q, tensor in sent.items():
            if id(tensor) not in sealed:
                total = frames.HEADER + tensor.nbytes
                frame = self.buffer("sent", what, q, total, tensor.device)
                frame[frames.HEADER:] = tensor.contiguous().view(-1).view(torch.uint8)
                sealed[id(tensor)] = frames.seal(frame, self.label(what, self.rank))
        outgoing = {q: sealed[id(tensor)] for q, tensor in sent.items()}
        expected = {q: frames.HEADER + tensor.nbytes for q, tensor in received.items()}
        device = next((tensor.device for tensor in (*sent.values(), *received.values())), self.group.wire)
        for q, inside in self.move(what, outgoing, expected, device).items():
            received[q].copy_(inside.view(received[q].dtype).view(received[q].shape))
        return total_bytes(outgoing)

    def move(self, what: str, sent: dict[int, Tensor], expected: dict[int, int], device: torch.device) -> dict[int, Tensor]:
        """All frames of a step together; the contents of those received.

        expected: the bytes of the frame from each process. ConnectionError names the processes that have gone, or were not there
        within the time-out, or the one that sent something else.
        """
        received = {q: frames.expect(self.buffer("received", what, q, frames.room(size, device), device), size)
                    for q, size in expected.items()}
        self.complete(what, sent, received)
        return {q: self.checked(what, q, frames.contents, received[q], size, self.label(what, q)) for q, size in expected.items()}

    def complete(self, what: str, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """All sends and receives of a step."""
        self.end(what, self.group.begin(sent, received))

    def end(self, what: str, begun: Begun) -> None:
        """Wait for the sends and receives of a step that has begun."""
        started = time.monotonic()
        if self._watch and (begun.sent or begun.received):
            self._watch.begin({*begun.sent, *begun.received})
        missing, silent = self.group.end(begun, started + self.timeout, self._watch, self._waiter)
        if self._watch and not missing:
            self._watch.begin(())
        if missing:
            raise self._lost(missing, what, time.monotonic() - started, silent)

    def checked(self, what: str, q: int, step, *arguments):
        try:
            return step(*arguments)
        except frames.FrameError as error:
            raise self.fault(q, f"{self.describe(q)} sent {error}, {self.when()} ({what})") from None

    def fault(self, process: int, text: str) -> ConnectionError:
        """The error for what a process sent."""
        return ConnectionError(text)

    def _lost(self, missing: list[int], what: str, seconds: float, silent: bool) -> ConnectionError:
        """What happened, as far as the notes of the other processes, and whom they wait for, explain it."""
        if self._watch and not silent and seconds >= self.timeout:
            watch = self._watch
            missing = held_up_by(missing, self.rank, lambda process: waits_for(self.notes.look_up(watch.key(process))))
        who = " and ".join(map(self.describe, missing))
        gone = f"is gone: its connection closed after {seconds:.1f} s of waiting"
        how = gone if seconds < self.timeout else f"said nothing for {seconds:.1f} s"
        if silent:
            how = no_life()
        mine = Note(self.rank, f"{who} {how}, {self.when()} ({what})", missing)
        if 0 in missing:
            time.sleep(0.2)  # it may hold the store, and a process that dies closes one socket after the other
        self.notes.write(mine)
        cause = self.notes.cause(mine)
        noticed = "" if cause.error or cause.process == self.rank else f" (noticed by process {cause.process})"
        kinds = {"ValueError": ValueError, "Stopped": Stopped}
        return kinds.get(cause.error, ConnectionError)(cause.text + noticed)

    def check_size(self, process: int, size: int, most: int) -> None:
        """ConnectionError for an announcement of more, before memory is asked for."""
        if not 0 <= size <= most:
            raise self.fault(process, f"{self.describe(process)} announced {size} bytes {self.when()}; allowed: up to {most}")

    def describe(self, process: int) -> str:
        peers = self.hosts[process]
        ids = f"peer {peers[0]}" if len(peers) == 1 else f"peers {peers[0]} to {peers[-1]}"
        return f"process {process} ({ids}, host {self.names[process]})"

    def when(self) -> str:
        return "before the first round" if self.round is None else f"in round {self.round + 1}"

    def leave(self, error: BaseException) -> None:
        """Write down why, and close the connections, so that the others notice at once. Nobody is waited for. Once is enough."""
        if not self.group.open:
            return
        kind = next((kind.__name__ for kind in (Stopped, ValueError) if isinstance(error, kind)), "OSError")
        what = " ".join(str(error).split()) or type(error).__name__
        self.notes.write(Note(self.rank, f"{self.describe(self.rank)} stopped {self.when()}: {what}", error=kind))
        self._end_watch()
        self.group.abort()
        if self.rank == self._store_holder:
            self.notes.linger(set(self.members) - {self.rank})

    def close(self) -> None:
        """Leave together."""
        self._end_watch()
        self.group.close()

    def _end_watch(self) -> None:
        if self._watch:
            self._watch.end()
            self._waiter.end()


def total_bytes(tensors: dict[int, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
