"""Places that lead to other processes: nothing happens before one is to be called, and then all bytes go both ways."""

import contextlib
import socket
import threading
import time

import pytest

from dfl.transport import forwarder
from dfl.transport.forwarder import Forwarder


@pytest.fixture
def far():
    """A process elsewhere: it sends back what it gets."""
    server = socket.create_server(("127.0.0.1", 0))
    calls: list[socket.socket] = []

    def work() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                calls.append(connection)
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while piece := connection.recv(2**16):
                connection.sendall(piece)

    threading.Thread(target=work, daemon=True).start()
    yield server.getsockname()[:2], calls
    server.shutdown(socket.SHUT_RDWR)
    server.close()


@pytest.fixture
def ways(far):
    """A forwarder to processes 1 and 2, and where it may call."""
    where: dict[int, tuple[str, int]] = {}
    made = Forwarder([1, 2], where.get)
    yield made, where
    made.close()


def talk(made: Forwarder, process: int) -> socket.socket:
    connection = socket.create_connection(made.places[process])
    connection.settimeout(5.0)
    return connection


def received(connection: socket.socket, number: int) -> bytes:
    found = b""
    while len(found) < number and (piece := connection.recv(number - len(found))):
        found += piece
    return found


def test_a_connection_waits_until_its_process_is_to_be_called_and_loses_nothing(ways, far):
    made, where = ways
    (address, calls), data = far, bytes(range(256)) * 20_000
    with talk(made, 1) as connection:
        connection.sendall(b"before")
        time.sleep(3 * forwarder.TICK_SECONDS)
        assert not calls
        where[1] = address
        assert received(connection, 6) == b"before"
        threading.Thread(target=connection.sendall, args=(data,), daemon=True).start()
        assert received(connection, len(data)) == data
        calls[0].shutdown(socket.SHUT_RDWR)
        assert connection.recv(1) == b"", "the end of one is the end of the other"


def test_a_stranger_on_the_machine_hears_nothing_and_gives_way(ways, far):
    """It comes to the port of the other process at most, where it could have gone itself."""
    made, where = ways
    address, calls = far
    with talk(made, 1) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(3 * forwarder.TICK_SECONDS)
        with pytest.raises(TimeoutError):
            stranger.recv(1)
        with talk(made, 1) as ours:
            stranger.settimeout(5.0)
            with contextlib.suppress(ConnectionResetError):  # what it said was not read
                assert stranger.recv(1) == b""
            where[1] = address
            ours.sendall(b"ours")
            assert received(ours, 4) == b"ours" and len(calls) == 1


def test_a_process_has_one_call_at_a_time_and_the_next_when_that_has_ended(ways, far):
    made, where = ways
    where[1] = where[2] = far[0]
    with talk(made, 1) as first, talk(made, 2) as other:
        for connection in (first, other):
            connection.sendall(b"1")
            assert received(connection, 1) == b"1"
        with talk(made, 1) as second:
            second.sendall(b"2")
            second.settimeout(3 * forwarder.TICK_SECONDS)
            with pytest.raises(TimeoutError):
                second.recv(1)
            second.settimeout(5.0)
            first.close()
            assert received(second, 1) == b"2"
    assert len(far[1]) == 3


@pytest.mark.parametrize("how", ["nobody answers", "says too much", "goes again"])
def test_a_connection_that_comes_to_nothing_ends_and_a_later_one_is_carried(ways, far, how):
    made, where = ways
    with talk(made, 1) as connection:
        if how == "nobody answers":
            with socket.create_server(("127.0.0.1", 0)) as closed:
                where[1] = closed.getsockname()[:2]
            assert received(connection, 1) == b""
        elif how == "says too much":
            with contextlib.suppress(OSError):
                connection.sendall(bytes(2**23))
                received(connection, 1)
    where[1] = far[0]
    with talk(made, 1) as connection:
        connection.sendall(b"x")
        assert received(connection, 1) == b"x"


def test_the_end_of_the_forwarder_ends_what_it_carries(ways, far):
    made, where = ways
    where[1] = far[0]
    with talk(made, 1) as carried, talk(made, 2) as waiting:
        carried.sendall(b"x")
        assert received(carried, 1) == b"x"
        time.sleep(2 * forwarder.TICK_SECONDS)
        made.close()
        assert carried.recv(1) == waiting.recv(1) == b""
        with pytest.raises(OSError):
            until = time.monotonic() + 5
            while time.monotonic() < until:
                talk(made, 1).close()
                time.sleep(0.05)
