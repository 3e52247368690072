"""Every rule and every slot on tensors of another device, which refuses the host's: what would crash on a GPU, found on a CPU."""

import pytest
import torch
from elsewhere import ELSEWHERE, DeviceError, There, back, elsewhere
from rules_on_rows import METHODS, Peer0

import topologies
from dfl import methods
from dfl.adapters.batched import as_on_a_gpu
from dfl.adapters.layout import make_layout
from dfl.channels import CHANNELS
from dfl.codecs import CODECS
from dfl.engine.gossip import Gossip
from dfl.guards import GUARDS
from dfl.methods import Choice
from dfl.networks import NETWORKS
from dfl.transport import InProcess
from dfl.triggers import TRIGGERS
from dfl.wrappers import WRAPPERS

pytestmark = pytest.mark.long
NUM, ROUNDS = 6, 3
LAYOUT = make_layout([("q", 2, 8, 6, 1.0), ("o", 2, 5, 9, 2.0)])
# what a choice needs that has no value of its own
NEEDED = {"noise": {"sigma": 0.1}, "delay": {"by": 1}, "periodic": {"every": 2}}
TABLES = {"codec": CODECS, "trigger": TRIGGERS, "channel": CHANNELS, "guard": GUARDS, "wrapper": WRAPPERS, "network": NETWORKS}


def graph():
    return topologies.build("ring", NUM)


def method(slot: str, name: str, rule: str = "lora"):
    context = methods.Context(LAYOUT, topology=graph(), peers=NUM, rounds=ROUNDS)
    return methods.build(rule, context, {}, {slot: Choice(name, NEEDED.get(name, {}))})


def _buildable(slot: str, name: str) -> bool:
    try:
        method(slot, name)
    except (ValueError, TypeError):
        return False
    return True


CHOICES = [(slot, name) for slot, table in TABLES.items() for name in sorted(table) if _buildable(slot, name)]


def rows() -> torch.Tensor:
    return 0.1 * torch.randn(NUM, LAYOUT.size, generator=torch.Generator().manual_seed(0))


def after_rounds(slot: str, name: str, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows after some rounds in which nobody trains but for a push that is the same each time."""
    x = x.to(device)
    push = (0.01 * rows()).to(device)
    heart = Gossip(method(slot, name), LAYOUT, graph(), InProcess(), range(NUM), x, seed=1)
    for t in range(ROUNDS):
        heart.begin(t, x, lr=0.1, local_steps=1)
        change = heart.after_step(t, lr=0.1, local_steps=1)
        for row, correction in enumerate(heart.corrections()):
            x[row] += push[row] if correction is None else push[row] - 0.1 * correction
            if change is not None:
                x[row] = change(row, x[row], 0)
        heart.arrive()
        heart.round(t, x, lr=0.1, local_steps=1)
    return x


@pytest.mark.parametrize("name", METHODS)
def test_a_rule_mixes_on_another_device(name):
    with as_on_a_gpu():
        expected = Peer0(name, 1).mix()
    with elsewhere() as device:
        peer = Peer0(name, 1, device)
        found = peer.mix()
    assert all(torch.equal(back(one), other) for one, other in zip(found, expected, strict=True))
    # what a message has beside its numbers is the host's: a transport reads it
    assert not [key for message in peer.inbox.values() for key, value in message.meta.items() if isinstance(value, There)]


@pytest.mark.parametrize(("slot", "name"), CHOICES)
def test_a_round_goes_through_a_slot_on_another_device(slot, name):
    with as_on_a_gpu():
        expected = after_rounds(slot, name, rows(), torch.device("cpu"))
    with elsewhere() as device:
        found = after_rounds(slot, name, rows(), device)
    torch.testing.assert_close(back(found), expected, rtol=1e-6, atol=1e-7)


def test_most_choices_are_tried():
    assert len(CHOICES) >= 0.9 * sum(map(len, TABLES.values())), set(CHOICES)


def test_the_other_device_refuses_the_hosts_tensors():
    with elsewhere() as device:
        there, here = torch.ones(3, device=device), torch.ones(3)
        assert there.device == ELSEWHERE and back(there + 1).tolist() == [2, 2, 2] and (there @ there).tolist() == 3
        for wrong in (lambda: there + here, lambda: torch.stack([there, here]), lambda: there.add_(here), lambda: there @ here):
            with pytest.raises(DeviceError, match="two devices"):
                wrong()
        assert back(there * here.sum()).tolist() == [3, 3, 3] and there[here > 0].device == ELSEWHERE
        there[:1] = here[:1] * 5  # a copy
        assert there.tolist() == [5, 1, 1] and (there.cpu() + here).tolist() == [6, 2, 2]
