"""The part of a model that its file does not hold: which modules it is, and the same new weights in every process."""

from typing import Any

import torch

from dfl.config import ModelConfig


def modules(net: torch.nn.Module, new: set[str]) -> tuple[str, ...]:
    """The modules outside the base model that have weights, then modules of the base whose weights are new (a pooler)."""
    prefix = net.base_model_prefix
    outside = [name for name, child in net.named_children() if name != prefix and any(True for _ in child.parameters())]
    inside = {key.rpartition(".")[0] for key in new if key.split(".")[0] not in outside}
    return (*outside, *sorted(inside))


def check_new(model: ModelConfig, net: torch.nn.Module, new: set[str], head: tuple[str, ...]) -> None:
    """ValueError if the file lacks weights that no fine-tuning replaces."""
    allowed = [name for name in head if "." not in name or "pooler" in name]
    lost = sorted(key for key in new if not any(key.startswith(f"{name}.") for name in allowed))
    if lost:
        raise ValueError(f"model.name = {model.name!r} lacks weights that {type(net).__name__} needs: "
                         f"{', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''} ({len(lost)} in all); "
                         "another model.task may fit it")


@torch.no_grad()
def initialise(net: torch.nn.Module, new: set[str], config: Any, seed: int, std: float | None = None) -> None:
    """Draw new matrices from N(0, std²) in float32.

    In the order of their names; biases 0, scales 1.

    `std` is the model's initializer_range unless given. An explicit generator on the CPU: every process gets the same
    bits, whatever was drawn before.
    """
    spread = std or getattr(config.get_text_config(), "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(new):
        weight = net.get_parameter(name)
        if weight.ndim >= 2:
            weight.data = torch.randn(weight.shape, generator=generator).mul_(spread).to(weight.dtype)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)


def to_float32(net: torch.nn.Module, head: tuple[str, ...]) -> None:
    """Keep the head in float32 behind a base of another type, and hand it its input in that type."""
    for name in head:
        module = net.get_submodule(name)
        if any(p.dtype != torch.float32 for p in module.parameters()):
            module.float().register_forward_pre_hook(_float_inputs)


def _float_inputs(module: torch.nn.Module, args: tuple) -> tuple:
    return tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
