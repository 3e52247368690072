"""Bases at the first gradient over several processes: the bits of one, also when resumed on others; other bases are refused."""

from pathlib import Path

import pytest
import torch
from processes import run_processes
from tiny_models import save
from tiny_runs import adapter_digests, train_worker, write_data

from dfl import config as configuration
from dfl.run.build import assemble, check, load
from dfl.run.runtime import start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("gradient")
    save(folder / "model", "bert")
    return {"peers": 4, "model": {"name": str(folder / "model")}, "method": "fed_sb", "topology": "ring",
            "data": {"source": "file", "train": str(write_data(folder)), "max_length": 16},
            "lora": {"adapter": "sb", "rank": 2, "start": "gradient", "start_step": 1.0},
            "train": {"rounds": 4, "local_steps": 2, "batch_size": 4, "lr": 0.05}, "eval": {"every": 0}, "device": "cpu"}


def test_hosting_and_stopping_do_not_matter(tree, tmp_path):
    digests = []
    for num in (1, 2, 4):
        whole = tree | {"output": str(tmp_path / str(num))}
        assert run_processes(train_worker, num, whole) == [0] * num
        digests.append(adapter_digests(Path(whole["output"])))
    assert len(digests[0]) == 5 and digests[0] == digests[1] == digests[2]
    moved = tree | {"output": str(tmp_path / "moved")}
    run_processes(train_worker, 4, moved | {"train": tree["train"] | {"rounds": 2}})
    run_processes(train_worker, 2, moved, True)
    assert adapter_digests(tmp_path / "moved") == digests[0]


def other_bases_worker(rank: int, tree: dict, cut: int) -> str:
    config = configuration.from_dict(tree)
    topology, runtime = check(config), start(config)
    if rank == 1:
        spread = runtime.transport.spread

        def other(data: bytes) -> bytes:
            row = torch.frombuffer(bytearray(spread(data)), dtype=torch.float32)
            row[cut] += 1e-6
            return row.numpy().tobytes()

        runtime.transport.spread = other
    try:
        assemble(config, runtime, load(config, runtime.device), topology)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("cut", [0, -1], ids=["bases", "core"])
def test_a_process_with_other_bases_or_another_core_is_refused_and_named(tree, cut):
    said = run_processes(other_bases_worker, 2, tree, cut)
    assert all("peer 2 starts from other bases, another core or head than peer 0" in text for text in said), said


def spread_worker(rank: int, tree: dict, size: int) -> bytes:
    runtime = start(configuration.from_dict(tree))
    return runtime.transport.spread(bytes([rank + 1]) * size)


@pytest.mark.parametrize("size", [0, 5])
def test_what_process_0_gives_reaches_all(tree, size):
    assert run_processes(spread_worker, 3, tree, size) == [b"\x01" * size] * 3
