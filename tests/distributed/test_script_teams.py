"""A script's loop on several processes of a peer: all of them have what one has, and who is gone is named."""

import os
import signal
import time

import own_loop
import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from test_script_peers import RESUMED

import dfl
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


def _killed(rank: int, victim: int) -> str:
    net = own_loop.model()
    optimizer = own_loop.adamw(net)
    try:
        with dfl.Gossip(net, optimizer, 2, method="lora", processes_per_peer=2) as gossip:
            for number in range(8):
                if rank == victim and number == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                own_loop.step(net, optimizer, gossip.rank, number)
    except ConnectionError as error:
        return str(error)
    return "done"


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
    net, own = own_loop.model(), dist.new_group([2, 3])
    optimizer = own_loop.adamw(net)
    try:
        with dfl.Gossip(net, optimizer, 2, method="lora", processes_per_peer=2) as gossip:
            for number in range(8):
                if rank == victim and number == 5:
                    os.kill(os.getpid(), signal.SIGSTOP)
                if rank == 5 - victim and number == 5:
                    dist.barrier(own)
                own_loop.step(net, optimizer, gossip.rank, number)
    except ConnectionError as error:
        return str(error)
    return "done"


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
