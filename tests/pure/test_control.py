"""What processes agree on: the same bits on all of them, in few steps, whatever their number."""

import threading
from types import SimpleNamespace

import pytest
import torch

from dfl.transport.control import DIRECT, ControlPlane


class Mailboxes:
    """Links of so many processes, which are threads here. steps: how often each has waited; messages: how many each has sent."""

    def __init__(self, size: int):
        self.size, self.arrived = size, threading.Condition()
        self.boxes: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.steps, self.messages = [0] * size, [0] * size

    def link(self, rank: int):
        def transfer(what, sent, received):
            with self.arrived:
                for q, tensor in sent.items():
                    self.boxes.setdefault((rank, q), []).append(tensor.clone())
                self.arrived.notify_all()
                for q, tensor in received.items():
                    assert self.arrived.wait_for(lambda q=q: self.boxes.get((q, rank)), timeout=20)
                    tensor.copy_(self.boxes[q, rank].pop(0))
            self.steps[rank] += bool(received)
            self.messages[rank] += len(sent)
            return len(sent)

        return SimpleNamespace(rank=rank, members=list(range(self.size)), transfer=transfer)

    def run(self, work) -> list:
        found = [None] * self.size

        def one(rank: int) -> None:
            found[rank] = work(ControlPlane(self.link(rank)), rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return found


def by_doubling(rows: list[torch.Tensor]) -> torch.Tensor:
    """The sum in the order of recursive doubling, one doubling at a time."""
    core = 1
    while 2 * core <= len(rows):
        core *= 2
    values = [row + rows[k + core] if k + core < len(rows) else row for k, row in enumerate(rows[:core])]
    step = 1
    while step < core:
        values = [values[min(k, k ^ step)] + values[max(k, k ^ step)] for k in range(core)]
        step *= 2
    assert all(torch.equal(value, values[0]) for value in values)
    return values[0]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 13, 16, 24, 33, 64, 70])
def test_agreements_have_the_bits_of_recursive_doubling_in_a_third_of_its_steps(size):
    generator = torch.Generator().manual_seed(size)
    scale = 10.0 ** torch.randint(-8, 9, (size, 3, 5), generator=generator)
    rows = list(scale * torch.randn(size, 3, 5, generator=generator).double())
    processes = Mailboxes(size)
    wanted = torch.stack([by_doubling([row[0] for row in rows]), torch.stack(rows)[:, 1].amin(0), torch.stack(rows)[:, 2].amax(0)])
    for found in processes.run(lambda control, rank: control.summary(rows[rank])):
        assert torch.equal(found, wanted)
    doublings = size.bit_length() - 1
    beyond = 0 if size <= DIRECT or size == 1 << doublings else 2
    steps = (1 if size > 1 else 0) if size <= DIRECT else -(-doublings // 3) + beyond
    assert max(processes.steps) <= steps and max(processes.messages) <= 7 * (steps - beyond) + beyond
