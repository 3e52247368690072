"""How the processes of a start find each other in a store that may still hold what an earlier start has left.

torchrun keeps one store for all its restarts. Without more, a worker that was started again reads the addresses of workers that
have died, and the group never comes together.
"""

import secrets
import socket
import time

POLL_SECONDS = 0.01


def reach(address: tuple[str, int], patience: float) -> None:
    """Wait until somebody listens there. torch's own waiting for a store ends in pages of C++ frames; this in a ConnectionError."""
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection(address, timeout=patience).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ConnectionError(f"process 0 did not come within {patience:.0f} s ({error})") from None
        time.sleep(10 * POLL_SECONDS)


def meet(store, rank: int, size: int, patience: float) -> str:
    """A name for this start that all its processes know, and nobody before them. ConnectionError names who did not come.

    Every process puts down a random word; process 0 answers each word with its own, under that word, until all have confirmed.
    An answer to a word of this start cannot be an old one, nor can a confirmation of process 0's word.
    """
    word = secrets.token_hex(8)
    return _receive(store, word, size, patience) if rank == 0 else _come(store, word, rank, patience)


def _come(store, word: str, rank: int, patience: float) -> str:
    until = time.monotonic() + patience
    store.set(f"dfl/hello/{rank}", word)
    while not store.check([f"dfl/welcome/{word}"]):
        if time.monotonic() > until:
            raise ConnectionError(f"process 0 did not come within {patience:.0f} s")
        time.sleep(POLL_SECONDS)
    name = store.get(f"dfl/welcome/{word}").decode()
    store.set(f"dfl/here/{name}/{rank}", "")
    return name


def _receive(store, name: str, size: int, patience: float) -> str:
    until, missing, answered = time.monotonic() + patience, set(range(1, size)), set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"dfl/here/{name}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"dfl/hello/{rank}"]) and (word := store.get(f"dfl/hello/{rank}").decode()) not in answered:
                store.set(f"dfl/welcome/{word}", name)
                answered.add(word)
        if missing and time.monotonic() > until:
            raise ConnectionError(f"process {', '.join(map(str, sorted(missing)))} did not come within {patience:.0f} s")
        time.sleep(POLL_SECONDS)
    return name
