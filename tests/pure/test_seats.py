"""Over what messages go, settled by all alike; and what a process does while a GPU's messages do not come."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_runs
import torch
import torch.distributed as dist

from dfl.run import runtime
from dfl.run.runtime import Place
from dfl.transport import group as groups
from dfl.transport.group import Group
from dfl.transport.seats import Seat, agree_on_wire, seat_of
from dfl.transport.watch import Watch

ONE, TWO, OTHER = Seat("h", "GPU-1", (2, 28, 9)), Seat("h", "GPU-2", (2, 28, 9)), Seat("i", "GPU-1", (2, 28, 9))
NEW = Seat("h", "GPU-1", (2, 30, 1), True)


def test_nccl_where_everybody_has_a_gpu_of_his_own():
    assert agree_on_wire("auto", [ONE, TWO, OTHER]) == ("nccl", "") == agree_on_wire("nccl", [ONE, TWO])
    assert agree_on_wire("auto", [NEW, NEW]) == ("nccl", "")
    assert agree_on_wire("gloo", [ONE, TWO]) == ("gloo", "")
    assert agree_on_wire("auto", [Seat("h"), Seat("i")]) == ("gloo", "")


def test_gloo_for_all_says_why():
    """Also where each of two tasks sees one GPU, which is the same."""
    assert agree_on_wire("auto", [TWO, ONE, ONE]) == ("gloo", "processes 1 and 2 share a GPU, which NCCL 2.28.9 does not allow them "
                                                              "(from 2.30 on it does with NCCL_MULTI_RANK_GPU_ENABLE=1)")
    assert agree_on_wire("auto", [NEW, NEW._replace(shares=False)])[0] == "gloo"
    assert agree_on_wire("auto", [ONE, Seat("i")]) == ("gloo", "process 1 has no GPU")
    assert agree_on_wire("auto", [ONE, TWO._replace(nccl=())]) == ("gloo", "torch of process 1 has no NCCL")


@pytest.mark.parametrize("seats", [[ONE, ONE], [ONE, Seat("i")]])
def test_nccl_that_cannot_be_is_refused_by_all(seats):
    with pytest.raises(ValueError, match="backend = 'nccl': process.*; allowed: auto, gloo"):
        agree_on_wire("nccl", seats)


def test_a_process_tells_what_its_gpu_is(monkeypatch):
    class Properties:
        uuid = "1b2c"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 29, 3))
    env = {"NCCL_HOSTID": "h1", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    assert seat_of(torch.device("cuda", 0), env) == Seat("h1", "1b2c", (2, 29, 3), False)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 0))
    assert seat_of(torch.device("cuda", 0), env).shares and not seat_of(torch.device("cuda", 0), {}).shares
    assert seat_of(torch.device("cpu"), env) == Seat("h1")


def test_processes_settle_it_while_they_meet(tmp_path, monkeypatch, capsys):
    """Two processes on one GPU and one beside it: all three come to gloo, and one of them says why."""
    seats = {0: ONE, 1: ONE, 2: OTHER}
    monkeypatch.setattr(runtime, "Group", lambda store, rank, size, timeout, device: (rank, device))
    made = iter(seats.values())
    monkeypatch.setattr(runtime, "seat_of", lambda device: next(made))
    stores = iter([dist.FileStore(str(tmp_path / "store"), 3) for _ in seats])
    monkeypatch.setattr(runtime, "_store", lambda *arguments: next(stores))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda k: runtime._meet(Place(k, 3), None, 20.0, "auto", torch.device("cuda", 0)), range(3)))
    assert sorted(found) == [(0, None), (1, None), (2, None)]
    assert capsys.readouterr().err.count("messages go over gloo, by way of the CPUs: processes") == 1


def test_a_refused_gpu_is_no_missing_process(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise RuntimeError("NCCL error: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000")

    monkeypatch.setattr(runtime, "Group", refuse)
    monkeypatch.setattr(runtime, "_store", lambda *arguments: dist.FileStore(str(tmp_path / "store"), 1))
    with pytest.raises(ValueError, match="processes that share a GPU.*allowed: gloo"):
        runtime._meet(Place(0, 1), None, 5.0, "gloo", torch.device("cpu"))


class Never:
    """A GPU's group whose messages do not come."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append(name) or self

    def is_completed(self):
        return False


def group_on_gpu() -> Group:
    found = object.__new__(Group)
    found.device, found._nccl = torch.device("cpu"), Never()
    return found


def test_who_failed_is_found_by_the_note_it_left():
    """A process that dies beside NCCL closes no connection that anybody reads."""
    store = dist.HashStore()
    watch = Watch(store, 0, "run", lambda: False, None)
    store.set("dfl/note/2", json.dumps({"process": 2, "text": "out of memory", "accused": [], "error": "OSError"}))
    watch.begin({1, 2})
    watch.look()
    buffers, began = {1: torch.zeros(1), 2: torch.zeros(1)}, time.monotonic()
    assert group_on_gpu()._move_on_gpu(buffers, {}, began + 30, watch, None) == ([2], False)
    assert time.monotonic() - began < 5


def test_who_does_not_come_in_time_is_named():
    began = time.monotonic()
    assert group_on_gpu()._move_on_gpu({1: torch.zeros(1)}, {3: torch.zeros(1)}, began + 0.05, None, None) == ([1, 3], False)


def test_all_pairs_are_connected_at_the_start():
    nccl = Never()
    groups._connect(nccl, 1, 4, torch.device("cpu"))
    assert nccl.calls == ["_start_coalescing", *["recv", "send"] * 3, "_end_coalescing", "wait"]
    groups._connect(nccl, 1, groups.MOST_CONNECTED + 1, torch.device("cpu"))
    assert len(nccl.calls) == 9


def test_the_watchdog_leaves_errors_to_us(monkeypatch):
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.delenv(name, raising=False)
    import os
    with groups._no_end_by_watchdog():
        assert os.environ[name] == "0"
    assert name not in os.environ
    monkeypatch.setenv(name, "3")  # who asks for it gets it
    with groups._no_end_by_watchdog():
        assert os.environ[name] == "3"
    assert os.environ[name] == "3"


def test_deterministic_runs_ask_torch_for_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    for name in ("flash", "mem_efficient", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{name}_sdp", asked.append)
    config = tiny_runs.make_config(tmp_path / "m", tmp_path / "d.csv", tmp_path / "out")
    runtime.start(config)
    assert not asked
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    runtime.start(config.model_copy(update={"deterministic": True}))
    assert asked == [True, False, False, False]
