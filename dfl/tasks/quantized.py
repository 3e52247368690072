"""Base weights in 4 or 8 bits: frozen, so that nothing but their reading is rounded (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).

bitsandbytes and torchao do it; transformers loads what they make. Not here: adapters on such layers, which are PEFT's.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import nn

from dfl.config import ModelConfig


class Quantization(NamedTuple):
    """package: who does it. kept: bytes that are kept of a weight. config(dtype) -> transformers' configuration of it."""

    package: str
    kept: float
    config: Callable[[torch.dtype], Any]


def _four_bits(kind: str) -> Callable[[torch.dtype], Any]:
    def config(dtype: torch.dtype) -> Any:
        from transformers import BitsAndBytesConfig
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype,
                                  bnb_4bit_use_double_quant=True)
    return config


def _eight_bits(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao(name: str) -> Callable[[torch.dtype], Any]:
    def config(dtype: torch.dtype) -> Any:
        import torchao.quantization
        from transformers import TorchAoConfig
        return TorchAoConfig(getattr(torchao.quantization, name)())
    return config


# of 4 bits with their scales, quantised once more: 4 + 8 / 64 + 32 / (64 * 256) bits
QUANTIZATIONS: dict[str, Quantization] = {
    "nf4": Quantization("bitsandbytes", 0.52, _four_bits("nf4")), "fp4": Quantization("bitsandbytes", 0.52, _four_bits("fp4")),
    "int8": Quantization("bitsandbytes", 1.0, _eight_bits),
    "torchao_int8": Quantization("torchao", 1.0, _torchao("Int8WeightOnlyConfig")),
    "torchao_int4": Quantization("torchao", 0.52, _torchao("Int4WeightOnlyConfig"))}


def check(model: ModelConfig, auto_class: str) -> None:
    """ValueError for a library that is not installed, and for a task whose head would be rounded as well."""
    if model.quantization is None:
        return
    if auto_class != "AutoModelForCausalLM":
        raise ValueError(f"model.quantization = {model.quantization!r}: the head of model.task = {model.task.name!r} would be "
                         "rounded as well; allowed with it: null; causal_lm and preference can")
    package = QUANTIZATIONS[model.quantization].package
    if find_spec(package) is None:
        raise ValueError(f"model.quantization = {model.quantization!r} needs {package}, which is not installed; pip install "
                         "'dfl[quantized]'")


def check_device(model: ModelConfig, device: torch.device) -> None:
    """ValueError for what has no kernels there."""
    if model.quantization == "torchao_int4" and device.type == "cpu":
        raise ValueError("model.quantization = 'torchao_int4' needs a GPU: torchao computes with 4 bits on no CPU; allowed here: "
                         "torchao_int8, nf4, fp4, int8")


def options(model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What from_pretrained is given for it: the weights are rounded where they will lie. ValueError as of `check_device`."""
    if model.quantization is None:
        return {}
    check_device(model, device)
    return {"quantization_config": QUANTIZATIONS[model.quantization].config(getattr(torch, model.dtype)), "device_map": {"": device}}


def bytes_of(net: Any, model: ModelConfig) -> float:
    """Of the weights of a model that may have no numbers, as they will lie in memory: of linear layers but the output, fewer."""
    whole = sum(p.numel() * p.element_size() for p in net.parameters())
    if model.quantization is None:
        return whole
    output = net.get_output_embeddings()
    rounded = [m.weight for m in net.modules() if isinstance(m, nn.Linear) and m is not output]
    kept = QUANTIZATIONS[model.quantization].kept
    return whole - sum(weight.numel() * (weight.element_size() - kept) for weight in rounded)
