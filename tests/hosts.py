"""Several hosts of one machine: `python tests/hosts.py 2 COMMAND ...` runs a command on each of two, which are named host1 and host2.

A host is a network namespace with an address, a name and a loopback interface of its own. All are plugged into one switch, a bridge
in a namespace of its own: nothing of the machine's network is touched, and several such networks do not see each other.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

HOST_TABLES = Path("/etc/netns")  # `ip netns exec` shows NAME/hosts of it as /etc/hosts
# one host's name is the same in every namespace's table; the kernel's own name is changed where the command runs
_RENAMED = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    absent = [name for name in ("ip", "tc", "unshare") if shutil.which(name) is None]
    if absent:
        return f"needs the command {absent[0]}; on Debian: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True).returncode:
        return "this machine does not allow network namespaces"
    return None


class Hosts:
    """`number` hosts, host1 at 10.77.0.1 and so on, until the end of the `with` block."""

    def __init__(self, number: int):
        self.names = [f"host{k}" for k in range(1, number + 1)]
        self._prefix = f"dfl{os.getpid()}"

    def __enter__(self) -> "Hosts":
        switch = self._namespace("switch")
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for k, name in enumerate(self.names, 1):
                self._add(name, f"10.77.0.{k}/24", switch)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _add(self, name: str, address: str, switch: str) -> None:
        namespace = self._namespace(name)
        _ip("netns", "add", namespace)
        _ip("-n", switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
        _ip("-n", namespace, "addr", "add", address, "dev", "eth0")
        for interface in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", interface, "up")
        table = HOST_TABLES / namespace / "hosts"
        table.parent.mkdir(parents=True)
        table.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{k} {host}\n" for k, host in enumerate(self.names, 1)))

    def start(self, name: str, *words: str, **options) -> subprocess.Popen:
        """A command on one host, in a session of its own. `options` are those of Popen."""
        inside = ["ip", "netns", "exec", self._namespace(name), "unshare", "--uts", "sh", "-c", _RENAMED, name, *words]
        return subprocess.Popen(inside, stdin=subprocess.DEVNULL, start_new_session=True, **options)

    def network(self, name: str) -> str:
        """The file by which a process enters a host's network."""
        return f"/run/netns/{self._namespace(name)}"

    def limit(self, megabits: float) -> None:
        """Every host sends at most this much a second, but for a burst of ten milliseconds' worth, or of 4 kB where that is more."""
        burst = max(4000, int(megabits * 1e6 / 8 / 100))
        for name in self.names:
            _run("tc", "-n", self._namespace(name), "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", f"{megabits}mbit",
                 "burst", str(burst), "latency", "400ms")

    def lose(self, sender: str, receiver: str) -> None:
        """From now on what one host sends another is lost on the way, and only that: it goes to an address that nobody has."""
        nobody = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
        _ip("-n", self._namespace(sender), "neigh", "replace", self._address(receiver), *nobody, "dev", "eth0")

    def mend(self, sender: str, receiver: str) -> None:
        """After `lose`."""
        _ip("-n", self._namespace(sender), "neigh", "del", self._address(receiver), "dev", "eth0")

    def plug(self, name: str, into: bool) -> None:
        """A host's cable into the switch, or out of it: nobody is told."""
        _ip("-n", self._namespace("switch"), "link", "set", name, *(("master", "bridge") if into else ("nomaster",)))

    def _address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    def sent(self, name: str) -> int:
        """Bytes that a host has sent, with all headers."""
        done = _ip("netns", "exec", self._namespace(name), "cat", "/proc/net/dev")
        return next(int(line.split()[9]) for line in done.splitlines() if line.split()[0] == "eth0:")

    def processes(self, name: str) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self._namespace(name)).split()]

    def __exit__(self, *_) -> None:
        for name in [*self.names, "switch"]:
            namespace = self._namespace(name)
            if Path("/run/netns", namespace).exists():
                for pid in self.processes(name):
                    os.kill(pid, signal.SIGKILL)
                _ip("netns", "delete", namespace)
            shutil.rmtree(HOST_TABLES / namespace, ignore_errors=True)


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=float, help="a second, that every host may send; without it, as fast as memory")
    parser.add_argument("number", type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if missing():
        sys.exit(f"hosts: {missing()}")
    with Hosts(args.number) as hosts:
        if args.megabits:
            hosts.limit(args.megabits)
        running = [hosts.start(name, *args.command) for name in hosts.names]
        return int(any([process.wait() for process in running]))


if __name__ == "__main__":
    sys.exit(main())
