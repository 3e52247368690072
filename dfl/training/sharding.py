"""The base model in parts, one on each process of a team (FSDP2: Zhao et al. 2023, arXiv 2304.11277); what is trained stays whole.

A layer is put together when it is about to compute, and its parts alone are kept behind it. Factors, magnitudes and heads are on every
process as they are: rows bind them as always.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from dfl.adapters.attach import Adapted
from dfl.transport.team import Team


def shard(adapted: Adapted, team: Team, head_modules: tuple[str, ...]) -> None:
    """Keep this process's part of the frozen weights of a model on the CPU, on the team's device, layer by layer.

    head_modules: the head's, by name in the base model, which every process keeps.
    """
    mesh, whole = DeviceMesh.from_group(team.group, team.device.type), _whole(adapted, head_modules)
    # all of it, by itself as well: what is left together behind a pass, one process alone would divide when it saves
    for module in (*layers_of(adapted.model), adapted.model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(team.device)


def _whole(adapted: Adapted, head_modules: tuple[str, ...]) -> set[nn.Parameter]:
    """The parameters that are not divided: what PEFT has added, and the head."""
    kept = {parameter for site in adapted.sites for name, parameter in site.module.named_parameters()
            if not name.startswith("base_layer.")}
    heads = [adapted.model.get_submodule(f"base_model.model.{name}") for name in head_modules]
    return kept | {parameter for head in heads for parameter in head.parameters()}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the model's stacks: the modules of its outermost lists."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and not any(module is inner for layer in found for inner in layer.modules()):
            found += list(module)
    return found


def bytes_of(model: nn.Module) -> int:
    """The bytes of the weights that lie in this process."""
    return sum(_local(parameter).untyped_storage().nbytes() for parameter in model.parameters())


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
