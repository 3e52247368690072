"""What the open ports of a run do for whom does not belong to it, as the table of launch/README.md says; those of survivors are in
tests/pure/test_members.py and tests/pure/test_zenoh.py."""

import contextlib
import os
import pickle
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import distributed, run_processes

pytestmark = pytest.mark.distributed


class Calls:
    """What its pickle does where it is loaded."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def a_store() -> tuple[dist.TCPStore, dist.TCPStore]:
    """The store of a launcher, and that of a stranger who has found its port."""
    ours = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    return ours, dist.TCPStore("127.0.0.1", ours.port, is_master=False, timeout=timedelta(seconds=10))


def test_whoever_reaches_the_store_reads_and_writes_all_of_it(monkeypatch):
    monkeypatch.setenv("DFL_SECRET", "changes nothing here")
    ours, stranger = a_store()
    ours.set("dfl/0/at/0", "host1:29700")
    assert stranger.get("dfl/0/at/0") == b"host1:29700"
    stranger.set("dfl/0/at/0", "elsewhere:29700")
    assert ours.get("dfl/0/at/0") == b"elsewhere:29700"
    assert stranger.delete_key("dfl/0/at/0") and not ours.check(["dfl/0/at/0"])


def test_whoever_reaches_the_rendezvous_of_torchrun_runs_code(tmp_path):
    """Why the documents say: trusted networks only. torch's own code, with what stands under the key of the rendezvous."""
    dynamic = pytest.importorskip("torch.distributed.elastic.rendezvous.dynamic_rendezvous")
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    ours, stranger = a_store()
    C10dRendezvousBackend(stranger, "my").set_state(pickle.dumps(Calls(str(tmp_path / "made"))))
    settings = dynamic.RendezvousSettings("my", 1, 2, dynamic.RendezvousTimeout(), timedelta(seconds=5), 3)
    holder = dynamic._BackendRendezvousStateHolder(C10dRendezvousBackend(ours, "my"), settings)
    with contextlib.suppress(Exception):  # what was loaded is no state
        holder.sync()
    assert (tmp_path / "made").is_dir()


def listening() -> list[int]:
    """TCP ports at which this process listens."""
    mine = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(file))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(int(fields[1].rpartition(":")[2], 16))
    return found


def call(port: int) -> socket.socket:
    """gloo listens at the address of the machine's name, or at that of the loopback interface."""
    try:
        return socket.create_connection((socket.gethostname(), port), timeout=5)
    except OSError:
        return socket.create_connection(("127.0.0.1", port), timeout=5)


def _beside_strangers(rank: int) -> tuple[int, list[bytes], list[float]]:
    from dfl.transport.packet import Packet
    transport = distributed(2)
    other = 1 - rank
    ports, heard, held = listening(), [], []
    for port in ports:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\0" * 7):
            stranger = call(port)
            stranger.settimeout(0.5)
            held.append(stranger)
            with contextlib.suppress(OSError):
                stranger.sendall(said)
                heard.append(stranger.recv(4096))
    packet = Packet({"x": torch.full((4,), rank + 1, dtype=torch.uint8)}, {"x": 1}, {})
    arrived = [transport.exchange(t, {rank: packet}, {rank: [other]}, {rank: [other]}, {rank: [other]}) for t in range(3)]
    return len(ports), [data for data in heard if data], [float(one[rank][other].payload["x"].sum()) for one in arrived]


def test_a_stranger_at_gloos_port_gets_nothing_and_ends_nothing():
    found = run_processes(_beside_strangers, 2)
    assert all(ports for ports, _, _ in found)
    assert [(heard, sums) for _, heard, sums in found] == [([], [8.0] * 3), ([], [4.0] * 3)]
