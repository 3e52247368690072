"""Which ways of dividing a model over the processes of a peer go together with gossip: FSDP2 does, whose parameters are whole tensors
in parts; what makes one flat buffer of many parameters, or steps on copies of its own, does not."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dfl.script.adapters import Parameter
from dfl.transport.shards import num_holders

ALLOWED = "allowed: data parallel (DDP), FSDP2 (torch's fully_shard), or dfl train with processes_per_peer"
DEEPSPEED = ("DeepSpeed's optimiser steps on copies of the factors that it keeps to itself, flat and in parts, and would undo every "
             f"mix; {ALLOWED}")
FSDP1 = f"FSDP of version 1 makes flat buffers of the factors, in which no mix finds them; {ALLOWED}"


def check_engine(model: nn.Module, optimizer: object) -> None:
    """ValueError for a model or an optimiser of DeepSpeed, and for one of FSDP's first version."""
    if any(type(one).__module__.split(".")[0] == "deepspeed" for one in (model, optimizer)) or \
            any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(DEEPSPEED)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or \
            any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters()):
        raise ValueError(FSDP1)


def check_parts(parameters: Sequence[Parameter], optimizer: torch.optim.Optimizer, members: int) -> None:
    """ValueError for factors in parts on others than the processes of the peer, and for an optimiser that has none of them:
    fully_shard puts others in their place."""
    held = max(num_holders(one.parameter) for one in parameters)
    if held not in (1, members):
        raise ValueError(f"the model's parts lie on {held} processes, and {members} process(es) are this peer; give "
                         f"processes_per_peer = {held} to dfl.hf.join, before the script makes its process group")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(one.parameter) in trained for one in parameters):
        raise ValueError("the optimiser has none of the model's factors: make it behind get_peft_model and fully_shard, which put "
                         "other parameters into the model")
