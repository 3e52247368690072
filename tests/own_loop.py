"""A model of a few numbers with LoRA by PEFT, and a plain PyTorch loop over it, as somebody may have them in a script of his own."""

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import dfl
from dfl.script import joining
from dfl.transport.shards import whole


class Net(nn.Module):
    def __init__(self, head: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.head = nn.Linear(4, 2) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def model(head: bool = False, **options) -> nn.Module:
    """The same at every call: with adapters that have begun to learn, so that both factors have gradients."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["first", "second"]} | options,
                             modules_to_save=["head"] if head else None)
    made = peft.get_peft_model(Net(head), config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return made


def batch(peer: int, step: int, size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * peer + step)
    return torch.randn(size, 6, generator=generator), torch.randn(size, 1, generator=generator).expand(size, 4)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, peer: int, number: int) -> float:
    """One step of an ordinary loop; its loss."""
    x, y = batch(peer, number)
    out = net(x)
    loss = (out - y[:, :out.shape[1]]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def factors(net: nn.Module) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()).clone() for name, parameter in net.named_parameters()
            if "lora" in name or "modules_to_save" in name}


def adamw(net: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)


def in_parts(net: nn.Module, mesh, apart: bool = False) -> nn.Module:
    """Over the processes of a mesh, by FSDP2, as it is without one; apart: each layer by itself, else all of it together."""
    if mesh is None:
        return net
    for module in (net.base_model.model.first, net.base_model.model.second) if apart else ():
        fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def train(steps: int, every: int = 3, *, net: nn.Module | None = None, optimizer=None, first: int = 0, state=None,
          leave_at: int | None = None, **words):
    """`steps` steps in a block of gossip: the model, the optimiser, and the gossip's state at step `leave_at` or None."""
    net = net or model()
    optimizer = optimizer or adamw(net)
    gossip, kept = dfl.Gossip(net, optimizer, every, **words), None
    if state is not None:
        gossip.load_state_dict(state)
    with gossip:
        for number in range(first, steps):
            gossip.log(step(net, optimizer, gossip.rank, number))
            if number + 1 == leave_at:
                kept = gossip.state_dict(), net.state_dict(), optimizer.state_dict()
                kept = [clone(part) for part in kept]
    return net, optimizer, kept


def clone(tree):
    if isinstance(tree, dict):
        return {key: clone(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [clone(value) for value in tree]
    return tree.clone() if isinstance(tree, Tensor) else tree


@pytest.fixture
def without_launcher(monkeypatch):
    """No launcher, and no group left from the test before."""
    for name in joining.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    yield
    if joining.current() is not None:
        joining.current().leave()
