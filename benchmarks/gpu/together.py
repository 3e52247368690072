"""Several processes on the GPUs there are: meeting, messages over NCCL, leaving, speed. They are forks, before any GPU is asked."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu.checks import finish, off, tiny
from benchmarks.gpu.setting import Setting
from dfl.store.records import read_lines
from dfl.transport import Distributed
from dfl.transport.group import Group
from dfl.transport.packet import Packet

# how several processes may come to NCCL, each tried once: `several` on one GPU
WAYS: dict[str, Callable[[int], Mapping[str, str]]] = {
    "a GPU for each": lambda rank: {},
    "NCCL_MULTI_RANK_GPU_ENABLE": lambda rank: {"NCCL_MULTI_RANK_GPU_ENABLE": "1"},
    "NCCL_HOSTID": lambda rank: {"NCCL_HOSTID": f"h{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"},
    "gloo": lambda rank: {},
}
TIMEOUT = 12.0
_WAY = "way.json"  # what `nccl` found, for the parts behind it


def fork(setting: Setting, num: int, work: Callable[[int], object], limit: float,
         env: Callable[[int], Mapping[str, str]] = lambda rank: {}) -> list[dict]:
    """`work(rank)` in `num` processes: {"found": what it gave}, {"error": its last line}, or {"error": "time limit"}, by rank."""
    folder = setting.folder / f"fork {time.monotonic_ns()}"
    folder.mkdir()
    sys.stdout.flush()
    children = {}
    for rank in range(num):
        child = os.fork()
        if child == 0:
            _live(work, rank, env(rank), folder)
        children[child] = rank
    until = time.monotonic() + limit
    while children and time.monotonic() < until:
        for child in list(children):
            if os.waitpid(child, os.WNOHANG)[0]:
                del children[child]
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    answers = [folder / f"{rank}.json" for rank in range(num)]
    return [json.loads(path.read_text()) if path.exists() else {"error": "time limit, or it was killed"} for path in answers]


def _live(work: Callable[[int], object], rank: int, env: Mapping[str, str], folder: Path) -> None:
    answer, other = {}, folder / f"{rank}.tmp"
    try:
        os.environ.update(env)
        answer = {"found": work(rank)}
    except BaseException as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    finally:
        other.write_text(json.dumps(answer))
        other.replace(folder / f"{rank}.json")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def device_of(setting: Setting, rank: int) -> torch.device:
    if setting.small:
        return torch.device("cpu")
    device = torch.device("cuda", rank % max(1, setting.facts.get("gpus", 1)))
    torch.cuda.set_device(device)
    return device


def transport(setting: Setting, rank: int, num: int, store: Path, way: str, peers: int | None = None) -> Distributed:
    device = device_of(setting, rank)
    wire = None if way == "gloo" else device
    group = Group(dist.FileStore(str(store), num), rank, num, timeout=1.2 * TIMEOUT, device=wire)
    return Distributed(num if peers is None else peers, group, device=device, timeout=TIMEOUT)


def fresh(setting: Setting) -> Path:
    return setting.folder / f"store {time.monotonic_ns()}"


def message(setting: Setting, rank: int, numbers: int) -> Packet:
    values = torch.full((numbers,), float(rank + 1), device=device_of(setting, rank))
    return Packet({"A": values.view(torch.uint8)}, {"A": numbers}, {"ranks": torch.tensor([rank])})


# edges (sender, receiver) of each round, and the numbers of each peer's message
ROUNDS = [([(0, 1)], [8, 8, 8]), ([], [8, 8, 8]), ([(0, 1), (1, 0), (1, 2), (2, 1)], [1000, 10, 100000]), ([(2, 0)], [8, 8, 8]),
          ([(0, 1), (1, 2), (2, 0)], [300000, 8, 8])]


def exchanged(setting: Setting, rank: int, store: Path, way: str) -> str:
    """All kinds of edges, sums and agreements among three; raises where something else arrives."""
    there = transport(setting, rank, 3, store, way)
    for t, (edges, numbers) in enumerate(ROUNDS):
        to, of = [j for i, j in edges if i == rank], [i for i, j in edges if j == rank]
        got = there.exchange(t, {rank: message(setting, rank, numbers[rank])}, {rank: to}, {rank: to}, {rank: of})[rank]
        assert sorted(got) == of, (t, got.keys())
        for sender, packet in got.items():
            values = packet.payload["A"].view(torch.float32)
            assert values.device == there.device and bool((values == sender + 1).all()), (t, sender)
            assert len(values) == numbers[sender] and packet.meta["ranks"].tolist() == [sender]
    total = there.total(torch.full((1, 70000), rank + 0.5, dtype=torch.float64, device=there.device))
    assert total.device == there.device and bool((total == 4.5).all())
    assert there.agree(rank) == 2 and there.share(bytes([rank])) == [b"\0", b"\1", b"\2"]
    there.close()
    return str(there.wire)


def nccl(setting: Setting) -> None:
    """Which way leads to NCCL here, and whether all that a round needs goes over it; then a tiny run of three processes."""
    for way in ["gloo"] if setting.small else WAYS:
        if way == "a GPU for each" and setting.facts.get("gpus", 1) < 3:
            continue
        store = fresh(setting)
        told = fork(setting, 3, lambda rank, store=store, way=way: exchanged(setting, rank, store, way), 20.0, WAYS[way])
        setting.say(way, told)
        if all("found" in one for one in told):
            (setting.folder / _WAY).write_text(json.dumps(way))
            break
    else:
        setting.check("messages", False)
        return
    setting.check("messages", True, way)
    if not setting.small:
        setting.check("NCCL", way != "gloo", way)
        _runs(setting, 3, way)


def way_of(setting: Setting) -> str:
    path = setting.folder / _WAY
    return json.loads(path.read_text()) if path.exists() else "gloo"


def two_processes(setting: Setting) -> None:
    """A run of two processes over gloo, peers on the GPU, against one process."""
    _runs(setting, 2, "gloo")


def _runs(setting: Setting, num: int, way: str, delay: int = 0) -> None:
    fields = {"backend": "gloo" if way == "gloo" else "nccl", "delay": delay}
    tiny(setting)  # once for all processes
    port, name = _free_port(), f"{num} processes {way}{' ahead' if delay else ''}"
    where = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    told = fork(setting, num, lambda rank: str(finish(setting, name, setting.kind, **fields)), 40.0,
                lambda rank: {"RANK": str(rank), "LOCAL_RANK": str(rank), **where, **WAYS[way](rank)})
    setting.say(f"{name}: ends", [one.get("error", "well") for one in told])
    if not setting.check_all(name, told):
        return
    (alone,) = fork(setting, 1, lambda rank: str(finish(setting, f"alone {name}", setting.kind, **fields | {"backend": "auto"})), 30.0)
    setting.check(f"{name}: one process ends", "found" in alone, alone)
    if "found" in alone:
        far = off(Path(told[0]["found"]), Path(alone["found"]))
        setting.check(f"{name}: as one process", far < 1e-2, far)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def leaving(setting: Setting) -> None:
    """A process that fails before the first exchange, and one that fails after one: the others say so, and soon."""
    for after in (0, 1):
        way = way_of(setting)
        arguments = fresh(setting), way, after
        told = fork(setting, 3, lambda rank, arguments=arguments: _left(setting, rank, *arguments), 22.0, WAYS[way])
        setting.say(f"after {after} exchanges", told)
        others = [one.get("found", {"error": "", "seconds": TIMEOUT}) for one in told[:2]]
        good = all("its disk is full" in one["error"] and one["seconds"] < TIMEOUT for one in others)
        setting.check(f"the others know why, after {after}", good)


def _left(setting: Setting, rank: int, store: Path, way: str, after: int) -> dict:
    there = transport(setting, rank, 3, store, way)
    there.watch(lambda: False)
    others = [j for j in range(3) if j != rank]
    for t in range(after):
        there.exchange(t, {rank: message(setting, rank, 8)}, {rank: others}, {rank: others}, {rank: others})
    if rank == 2:
        time.sleep(0.5)
        there.leave(OSError("its disk is full"))
        return {}
    began = time.monotonic()
    try:
        there.exchange(after, {rank: message(setting, rank, 8)}, {rank: others}, {rank: others}, {rank: others})
    except ConnectionError as error:
        there.leave(error)
        return {"error": str(error), "seconds": round(time.monotonic() - began, 2)}
    return {"error": "", "seconds": 0.0}


def exchange(setting: Setting) -> None:
    """ms of an exchange between two processes, each way one message: what `nccl` found, and gloo by way of the CPUs."""
    sizes = setting.pick((300_000, 3_000_000, 13_600_000), (1000,))
    for way in dict.fromkeys([way_of(setting), "gloo"]):
        store = fresh(setting)
        told = fork(setting, 2, lambda rank, store=store, way=way: _timed(setting, rank, store, way, sizes), 25.0, WAYS[way])
        setting.check(way, all("found" in one for one in told), told[0].get("found", told))


def _timed(setting: Setting, rank: int, store: Path, way: str, sizes: tuple[int, ...]) -> dict:
    there, found, t = transport(setting, rank, 2, store, way), {}, 0
    for numbers in sizes:
        there.most = 8 * numbers + 2**16
        packet, took = message(setting, rank, numbers), []
        for _ in range(8):
            setting.synchronize()
            started = time.perf_counter()
            there.exchange(t, {rank: packet}, {rank: [1 - rank]}, {rank: [1 - rank]}, {rank: [1 - rank]})
            setting.synchronize()
            took.append(time.perf_counter() - started)
            t += 1
        found[f"{4 * numbers} bytes"] = round(1e3 * sorted(took[2:])[len(took[2:]) // 2], 3)
    there.close()
    return found


def overlap(setting: Setting) -> None:
    """Seconds that two processes of two peers wait for messages in a round, without and with `delay: 1`, where they go on a
    stream of their own meanwhile; and whether such a run ends as that of one process."""
    for delay in (0, 1):
        way = way_of(setting)
        fields = {"delay": delay, "train__rounds": setting.pick(12, 3), "train__local_steps": setting.pick(10, 2), "lora__rank": 8,
                  "backend": "gloo" if way == "gloo" else "nccl"}
        tiny(setting)
        name, port = f"delay {delay}", _free_port()
        where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        told = fork(setting, 2, lambda rank, name=name, fields=fields: str(finish(setting, name, setting.kind, **fields)), 25.0,
                    lambda rank, where=where, way=way: {"RANK": str(rank), "LOCAL_RANK": str(rank), **where, **WAYS[way](rank)})
        if setting.check_all(name, told):
            records = [line for line in read_lines(Path(told[0]["found"]) / "metrics.jsonl") if "seconds" in line][1:]
            setting.say(f"{name}, over {way}", {phase: round(sorted(one["seconds"][phase] for one in records)[len(records) // 2], 5)
                                               for phase in ("local", "exchange", "mix")})
    _runs(setting, 2, way_of(setting), delay=1)
