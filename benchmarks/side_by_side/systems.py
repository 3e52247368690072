"""How each system moves a peer's numbers: `SYSTEMS[name](job, rank)` is a generator whose every `next` is a round of local steps and
what the system does after them. It is begun with all peers there."""

import os
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from job import EVERY, LOCAL_STEPS, LR, PEERS, Job

GROUP_SECONDS = 60.0  # for hivemind, whose peers look for each other in every round


def meet() -> None:
    """torch's default group, from the words that torchrun would set."""
    dist.init_process_group("gloo", init_method="env://")


def local(job: Job) -> None:
    """With no steps the optimiser's alone, which some hang their exchange on; without a gradient it changes nothing."""
    for _ in range(LOCAL_STEPS):
        job.step()
    if LOCAL_STEPS == 0:
        job.optimizer.step()


def nothing(job: Job, rank: int) -> Iterator[None]:
    """Peers that never talk."""
    while True:
        local(job)
        yield


def plain_gloo(job: Job, rank: int) -> Iterator[None]:
    """Batched sends of the vector to both neighbours of a ring, and the mean of three."""
    meet()
    neighbours = [(rank - 1) % PEERS, (rank + 1) % PEERS]
    received = [torch.empty_like(job.vector) for _ in neighbours]
    while True:
        local(job)
        ops = [dist.P2POp(dist.irecv, buffer, q) for buffer, q in zip(received, neighbours, strict=True)]
        for work in dist.batch_isend_irecv(ops + [dist.P2POp(dist.isend, job.vector, q) for q in neighbours]):
            work.wait()
        job.vector.add_(received[0]).add_(received[1]).div_(3)
        yield


def all_reduce(job: Job, rank: int) -> Iterator[None]:
    """The mean of all by gloo's all-reduce."""
    meet()
    while True:
        local(job)
        dist.all_reduce(job.vector)
        job.vector.div_(PEERS)
        yield


def ours(job: Job, rank: int) -> Iterator[None]:
    """dfl.Gossip around the loop: plain averaging on the same ring, and nothing measured beside it."""
    yield from _gossip(job, EVERY, measure={"every": 0, "layers": 0})


def ours_measured(job: Job, rank: int) -> Iterator[None]:
    """The same with a run folder, by the defaults: records, and in every fifth round sums over all peers, for the disagreement."""
    yield from _gossip(job, EVERY, output=os.path.join(os.environ["RUN_FOLDER"], "run"))


def ours_every_step(job: Job, rank: int) -> Iterator[None]:
    """dfl.Gossip after every step, one neighbour at a time as Decent-DP has it."""
    yield from _gossip(job, 1, topology={"name": "one_peer_exponential"}, measure={"every": 0, "layers": 0})


def _gossip(job: Job, every: int, **words) -> Iterator[None]:
    import dfl
    words = {"method": "lora", "topology": "ring", "seed": 0} | words
    with dfl.Gossip(job.model, job.optimizer, every, **words):
        while True:
            local(job)
            yield


def decent_dp(job: Job, rank: int) -> Iterator[None]:
    """Decent-DP's wrapper on its own ring: it mixes with one neighbour in every step, beside the backward pass."""
    from decent_dp.ddp import DecentralizedDataParallel
    from decent_dp.optim import optim_fn_adamw
    meet()
    job.optimizer = None
    wrapped = DecentralizedDataParallel(job.model, lambda named: optim_fn_adamw(named, lr=LR, weight_decay=0.0), topology="ring")
    while True:
        for _ in range(LOCAL_STEPS):
            job.loss(wrapped).backward()
        yield


def hivemind(job: Job, rank: int) -> Iterator[None]:
    """hivemind's averager over its own hash table: all peers in one group."""
    from hivemind import DHT
    from hivemind.averaging import DecentralizedAverager
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), PEERS, rank == 0)
    known = [] if rank == 0 else store.get("first").decode().split()
    table = DHT(initial_peers=known, start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    if rank == 0:
        store.set("first", " ".join(map(str, table.get_visible_maddrs())))
    averager = DecentralizedAverager([job.vector], table, start=True, prefix="job", target_group_size=PEERS, min_group_size=PEERS,
                                     min_matchmaking_time=1.0, request_timeout=1.0, allreduce_timeout=GROUP_SECONDS)
    store.add("there", 1)
    while store.add("there", 0) < PEERS:
        time.sleep(0.05)
    while True:
        local(job)
        with averager.get_tensors() as tensors:
            tensors[0].copy_(job.vector)
        if averager.step(timeout=GROUP_SECONDS) is None:
            raise TimeoutError(f"hivemind found no group within {GROUP_SECONDS:.0f} s")
        with averager.get_tensors() as tensors:
            job.vector.copy_(tensors[0])
        yield


SYSTEMS: dict[str, Callable[[Job, int], Iterator[None]]] = {
    "nothing": nothing, "plain_gloo": plain_gloo, "all_reduce": all_reduce, "ours": ours, "ours_measured": ours_measured,
    "decent_dp": decent_dp, "ours_every_step": ours_every_step, "hivemind": hivemind,
}
