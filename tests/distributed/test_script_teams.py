"""A script's loop on several processes of a peer: all of them have what one has, and who is gone is named."""

import os
import signal
import time
from collections.abc import Callable

import own_loop
import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from safetensors.torch import load_file
from test_script_peers import RESUMED
from torch.distributed.device_mesh import DeviceMesh

import dfl
from dfl.store.checkpoints import latest
from dfl.transport import watch


def _rows(rank: int, each: int, words: dict) -> list[float]:
    """A loop of 7 steps by the peer of this process; both processes of a peer step alike, as data parallel ones do."""
    net, _, _ = own_loop.train(7, 3, processes_per_peer=each, **words)
    assert os.environ.get("WORLD_SIZE", "") == (str(each) if each > 1 else "2")
    assert each == 1 or (os.environ["RANK"], os.environ["LOCAL_RANK"]) == (str(rank % 2), str(rank % 2))
    return torch.cat([value.flatten() for value in own_loop.factors(net).values()]).tolist()


@pytest.mark.parametrize("words", RESUMED, ids=lambda words: "-".join(str(value) for value in words.values())[:30])
def test_both_processes_of_a_peer_have_what_a_peer_of_one_has(words):
    one = run_processes(_rows, 2, 1, words)
    found = run_processes(_rows, 4, 2, words)
    start = torch.cat([value.flatten() for value in own_loop.factors(own_loop.model()).values()])
    assert found == [one[0], one[0], one[1], one[1]] and not torch.allclose(torch.tensor(one[0]), start, atol=1e-3)


def _mesh(rank: int) -> DeviceMesh:
    """The two processes of this one's peer."""
    groups = [dist.new_group([first, first + 1]) for first in (0, 2)]
    return DeviceMesh.from_group(groups[rank // 2], "cpu")


def _all_rows(rank: int, each: int, stop: int | None = None, apart: bool = False) -> list[list[float]]:
    """For all of RESUMED: as `_rows`, on a model whose factors lie in parts on both processes of a peer where it has two; stop: goes
    on from what was kept there; apart: as of `own_loop.in_parts`."""
    found, mesh = [], _mesh(rank) if each == 2 else None
    for words in RESUMED:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(2 * each))
        words = words | {"processes_per_peer": each}
        net = own_loop.in_parts(own_loop.model(), mesh, apart)
        net, _, kept = own_loop.train(7, 3, net=net, leave_at=stop, **words)
        assert each == 1 or all(p.shape != p.to_local().shape for name, p in net.named_parameters() if "lora" in name)
        if kept is not None:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(2 * each))
            state, net_state, optimizer_state = kept
            net = own_loop.in_parts(own_loop.model(), mesh, apart)
            net.load_state_dict(net_state)
            optimizer = own_loop.adamw(net)
            optimizer.load_state_dict(optimizer_state)
            own_loop.train(7, 3, net=net, optimizer=optimizer, first=stop, state=state, **words)
        found.append(torch.cat([value.flatten() for value in own_loop.factors(net).values()]).tolist())
    return found


def test_factors_in_parts_are_those_of_a_peer_of_one_process_also_after_a_stop():
    one = torch.tensor(run_processes(_all_rows, 2, 1))
    found = run_processes(_all_rows, 4, 2, timeout=120)
    assert found[0] == found[1] and found[2] == found[3]
    torch.testing.assert_close(torch.tensor(found[::2]), one, rtol=0, atol=1e-5)
    assert run_processes(_all_rows, 4, 2, 4, True, timeout=120) == found


def _saved(rank: int, each: int, folder: str) -> None:
    net = own_loop.model()
    if each == 2:
        net = own_loop.in_parts(net, _mesh(rank))
    optimizer = own_loop.adamw(net)
    with torch.no_grad():
        net(own_loop.batch(0, 0)[0])  # FSDP keeps what it has put together for a pass without gradients
    own_loop.train(7, 3, net=net, optimizer=optimizer, method="lora", processes_per_peer=each, output=folder)
    own_loop.step(net, optimizer, 0, 0)  # and it is the script's again


def test_adapters_are_saved_whole_from_factors_in_parts(tmp_path):
    saved = []
    for each in (1, 2):
        run_processes(_saved, 2 * each, each, str(tmp_path / str(each)))
        folder = latest(tmp_path / str(each))
        saved.append({f"{name}.{key}": value for name in ("peer-0", "peer-1", "consensus")
                      for key, value in load_file(folder / name / "adapter_model.safetensors").items()})
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) == 12
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=0, atol=1e-5)


def _refused(rank: int) -> tuple[str, str]:
    said = []
    for each, first in ((1, False), (2, True)):
        net = own_loop.model()
        optimizer = own_loop.adamw(net) if first else None
        net = own_loop.in_parts(net, DeviceMesh.from_group(dist.group.WORLD, "cpu") if each == 1 else _mesh(rank))
        with pytest.raises(ValueError) as error, dfl.Gossip(net, optimizer or own_loop.adamw(net), 2, processes_per_peer=each):
            pass
        said.append(str(error.value))
    return tuple(said)


def test_parts_on_other_processes_than_the_peer_s_and_an_optimiser_without_factors_are_refused():
    for others, without in run_processes(_refused, 4):
        assert "the model's parts lie on 4 processes, and 1 process(es) are this peer; give processes_per_peer = 4" in others
        assert "the optimiser has none of the model's factors" in without


def _until_gone(net: torch.nn.Module, happens: Callable[[], object], gone=ConnectionError) -> str:
    """A loop of a peer of two processes, in whose sixth step something happens: the error that it ends with."""
    optimizer = own_loop.adamw(net)
    try:
        with dfl.Gossip(net, optimizer, 2, method="lora", processes_per_peer=2) as gossip:
            for number in range(8):
                if number == 5:
                    happens()
                own_loop.step(net, optimizer, gossip.rank, number)
    except gone as error:
        return str(error)
    return "done"


def _kill(rank: int, victim: int) -> None:
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)


def _killed_in_parts(rank: int, victim: int) -> str:
    net = own_loop.in_parts(own_loop.model(), _mesh(rank))
    return _until_gone(net, lambda: _kill(rank, victim), (ConnectionError, RuntimeError))


@pytest.mark.parametrize("victim", [2, 3])
def test_a_killed_process_that_held_a_part_of_the_factors_ends_all(victim):
    said = run_processes(_killed_in_parts, 4, victim, lost=[victim])
    assert "onnection" in said[5 - victim] or "is gone" in said[5 - victim], said
    assert all("(peer 1, host " in said[rank] or "process 0" in said[rank] for rank in (0, 1)), said


def _killed(rank: int, victim: int) -> str:
    return _until_gone(own_loop.model(), lambda: _kill(rank, victim))


@pytest.mark.parametrize("victim", [2, 3])
def test_a_process_of_a_peer_that_is_killed_ends_all_who_are_told_which(victim):
    said = run_processes(_killed, 4, victim, lost=[victim])
    assert f"process {victim}" in said[5 - victim] and "is gone" in said[5 - victim], said
    assert all("(peer 1, host " in said[rank] or "process 0" in said[rank] for rank in (0, 1)), said


def _stopped(rank: int, victim: int, folder: str) -> str:
    """One process is stopped, while its fellow waits for it in the script's own group, and all would wait for half an hour."""
    watch.SILENT_SECONDS, watch.BEAT_SECONDS = 3.0, 0.5
    with open(f"{folder}/said-{rank}", "wb") as file:
        os.dup2(file.fileno(), 2)
    own = dist.new_group([2, 3])

    def happens() -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGSTOP)
        if rank == 5 - victim:
            dist.barrier(own)

    return _until_gone(own_loop.model(), happens)


@pytest.mark.parametrize("victim", [2, 3])
def test_a_process_of_a_peer_that_is_stopped_is_named_where_only_the_scripts_own_group_waits(victim, tmp_path):
    said = run_processes(_stopped, 4, victim, str(tmp_path), lost=[2, 3])
    words = f"process {victim}, which works for the same peer, has shown no life for 3 s"
    assert all("peer 1" in text and "has shown no life for" in text for text in said[:2]), said
    assert victim == 2 or all(words in text for text in said[:2]), said
    until = time.monotonic() + 20
    while words not in (tmp_path / f"said-{5 - victim}").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert words in (tmp_path / f"said-{5 - victim}").read_text()
