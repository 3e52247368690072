"""Tensors that several processes of a peer hold in parts (torch's DTensor, of which FSDP2 makes parameters: Zhao et al. 2023, arXiv
2304.11277): put together, and cut again. A plain tensor is its own only part.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def in_parts(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def mine(tensor: Tensor) -> Tensor:
    """This process's part, which shares its memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of it, from all processes that hold a part, which call this together."""
    return _gathered(tensor) if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _gathered(tensor: DTensor) -> Tensor:
    return _on_mesh(tensor.detach(), tensor).full_tensor()  # type: ignore[attr-defined]


def part_like(value: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of `value`, which all have whole, cut as `tensor` is, on its device. Nobody is asked."""
    return _cut(value, tensor) if isinstance(tensor, DTensor) else value.to(tensor.device)


@torch.no_grad()
def _cut(value: Tensor, tensor: DTensor) -> Tensor:
    parts: Any = distribute_tensor(_on_mesh(value, tensor), tensor.device_mesh, tensor.placements, src_data_rank=None)
    return parts.to_local().to(tensor.device)


def sharded(model: nn.Module) -> list[FSDPModule]:
    """The modules whose parameters FSDP puts together for a pass."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def put_away(modules: Iterable[FSDPModule]) -> None:
    """What FSDP has put together for a pass goes: the model has its parts again, and the next pass reads them anew."""
    for module in modules:
        module.reshard()


def num_holders(tensor: Tensor) -> int:
    """The processes that hold a part of it, or a copy of a part."""
    return tensor.device_mesh.size() if isinstance(tensor, DTensor) else 1


def _on_mesh(value: Tensor, tensor: DTensor) -> Tensor:
    """FSDP may keep parts in the memory of the CPU (CPUOffloadPolicy) that the processes exchange on their GPUs."""
    return value.to(tensor.device_mesh.device_type)
