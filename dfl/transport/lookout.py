"""Signs of life between the processes of a team: one that is stopped, or whose machine hangs, closes no connection.

Its fellows wait for it inside of torch.distributed, where nothing reaches them: what waits for a layer of the base model, or for the
gradients of a script's own data parallel model, cannot be broken off, nor be thrown away while it waits. So a thread looks after them
(dfl/transport/watch.py), tells the other peers, says why, and ends this process.
"""

import os
import threading
from collections.abc import Callable

from dfl.transport.stopping import last_words
from dfl.transport.watch import Watch

# between two looks at who is silent
LOOK_SECONDS = 0.5


class Lookout:
    """`others`: the ranks in the team that process `rank` looks after. `store`, `holder`: as of `Watch`.

    always: also while nothing of ours waits: the loop is a script's, whose own group may wait. lost: called in the thread with the
    silent ranks; it tells everybody, and gives the last words of this process.
    """

    def __init__(self, store, rank: int, others: list[int], holder: int | None, *, always: bool, lost: Callable[[list[int]], str]):
        self.watch = Watch(store, rank, "signs", lambda: False, holder)
        self.others, self.always, self.lost = others, always, lost
        self._depth = 0  # of steps in which the main thread waits for the others
        self._ended = threading.Event()
        self.watch.begin(others)
        self.watch.start()
        threading.Thread(target=self._run, name="dfl-lookout", daemon=True).start()

    def begin(self) -> None:
        """The main thread waits for the others from here."""
        if not self._depth and not self.always:
            self.watch.begin(self.others)
        self._depth += 1

    def done(self) -> None:
        self._depth -= 1

    def end(self) -> None:
        """This process leaves by itself."""
        self._ended.set()
        self.watch.end()

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            if not self.always and not self._depth:
                continue
            gone = self.watch.failed()  # they have said why, and their connections close
            if silent := [rank for rank in self.watch.silent() if rank not in gone]:
                end_process(self.lost(silent))


def end_process(text: str) -> None:
    """At once, from a thread."""
    last_words(text)
    os._exit(1)
