"""Calls addresses again and again, all at once, without waiting for any."""

import threading
import time
from collections.abc import Callable, Iterable

from dfl.transport.mail import Address, RefusedError

# an address where nobody answers is called again after this time
AGAIN_SECONDS = 0.3


class Dialer:
    """connect(address): waits for its answer. refusals: what those said that do not want this process."""

    def __init__(self, connect: Callable[[Address], object], seeds: Iterable[Address] = ()):
        self.connect, self.seeds = connect, list(seeds)
        self.refusals: list[str] = []
        self._next: dict[Address, float] = {}

    def call(self, addresses: Iterable[Address]) -> None:
        for address in addresses:
            if time.monotonic() >= self._next.get(address, 0.0):
                self._next[address] = float("inf")
                threading.Thread(target=self._try, args=(address,), name="dfl-dial", daemon=True).start()

    def _try(self, address: Address) -> None:
        try:
            self.connect(address)
        except RefusedError as error:
            self.refusals.append(str(error))
        self._next[address] = time.monotonic() + AGAIN_SECONDS
