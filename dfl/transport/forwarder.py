"""Places on this machine that lead to the other processes of a run, wherever these are.

zenoh takes addresses when it is opened and none later, and members learn from each other where the others are. So it is
given a place here for each of them, to which it connects at once and again and again. As long as a process is not to be
called, its place keeps that connection waiting; then the bytes go to the address that is known by now, and back. Nobody
looks at them here: what is encrypted is so from end to end.
"""

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterable

from dfl.transport.mail import Address

TICK_SECONDS = 0.1
CALL_SECONDS = 5.0
# what a connection that waits has said, before it is taken for nonsense
_MOST_WAITING = 2**17
_PIECE = 2**18


class Forwarder:
    """places: the address on this machine that leads to each process. wanted(process): where it is, when it is to be
    called now; else None."""

    def __init__(self, processes: Iterable[int], wanted: Callable[[int], Address | None]):
        self.wanted = wanted
        self._listening = {process: socket.create_server(("127.0.0.1", 0)) for process in processes}
        self.places: dict[int, Address] = {q: one.getsockname()[:2] for q, one in self._listening.items()}
        self._waiting: dict[int, tuple[socket.socket, bytearray]] = {}
        self._carried: dict[int, tuple[socket.socket, ...]] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._work, name="dfl-forward", daemon=True).start()

    def close(self) -> None:
        self._ended.set()
        with self._lock:
            for one in [one for both in self._carried.values() for one in both]:
                _shut(one)

    def _work(self) -> None:
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for process, server in self._listening.items():
                stack.enter_context(server)
                selector.register(server, selectors.EVENT_READ, process)
            while not self._ended.is_set():
                for key, _ in selector.select(TICK_SECONDS):
                    self._accept(key.data)
                for process in list(self._waiting):
                    self._look_at(process)
        for connection, _ in self._waiting.values():
            connection.close()

    def _accept(self, process: int) -> None:
        """One waits for each process, the last that came."""
        with contextlib.suppress(OSError):
            connection, _ = self._listening[process].accept()
            connection.setblocking(False)
            before = self._waiting.pop(process, None)
            if before is not None:
                before[0].close()
            self._waiting[process] = connection, bytearray()

    def _look_at(self, process: int) -> None:
        """What it says while it waits is kept, as its end could not be seen behind that."""
        connection, said = self._waiting[process]
        with contextlib.suppress(BlockingIOError):
            try:
                piece = connection.recv(_PIECE)
            except ConnectionError:
                piece = b""
            said += piece
            if not piece or len(said) > _MOST_WAITING:
                del self._waiting[process]
                connection.close()
                return
        address = self.wanted(process) if process not in self._carried else None
        if address is not None:
            del self._waiting[process]
            with self._lock:
                self._carried[process] = (connection,)
            threading.Thread(target=self._call, args=(process, address, connection, said), name="dfl-call",
                             daemon=True).start()

    def _call(self, process: int, address: Address, here: socket.socket, said: bytearray) -> None:
        try:
            with here, socket.create_connection(address, timeout=CALL_SECONDS) as there:
                with self._lock:
                    self._carried[process] = here, there
                    if self._ended.is_set():
                        return
                for one in (here, there):
                    one.settimeout(None)
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                there.sendall(said)
                back = threading.Thread(target=_carry, args=(there, here), name="dfl-carry", daemon=True)
                back.start()
                _carry(here, there)
                back.join()
        except OSError:  # nobody answers there: zenoh calls again
            pass
        finally:
            with self._lock:
                del self._carried[process]


def _carry(source: socket.socket, target: socket.socket) -> None:
    """All bytes, until one end closes; then both are."""
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE):
            target.sendall(piece)
    for one in (source, target):
        _shut(one)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
