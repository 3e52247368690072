"""The ports that tests give to processes are nobody else's until those open them."""

import socket
import subprocess
import sys
from pathlib import Path

from ports import free_ports

TESTS = Path(__file__).parent.parent


def test_they_are_none_that_the_system_gives_away():
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first, last = map(int, given.read_text().split()) if given.exists() else (32768, 60999)
    assert not any(first <= port <= last for port in free_ports(8))


def test_two_that_ask_at_once_and_one_that_asks_twice_get_different_ones():
    mine = free_ports(8) + free_ports(8)
    command = [sys.executable, "-c", "import ports; print(*ports.free_ports(64))"]
    asked = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert len({*mine, *map(int, asked.stdout.split())}) == 16 + 64, asked.stderr


def test_one_at_which_somebody_listens_is_left_out():
    with socket.create_server(("127.0.0.1", free_ports(1)[0])) as taken:
        assert taken.getsockname()[1] not in free_ports(63)
