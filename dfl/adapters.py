"""PEFT's LoRA on a Hugging Face model, with its parameters as views of a peer's row."""

import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dfl.config import LoraConfig
from dfl.factors import HeadTensor, Layout, Pair, a_view, b_view, empty_rows, head_view, make_layout

ADAPTER = "default"
_PEFT_TASKS = {"sequence_classification": peft.TaskType.SEQ_CLS, "causal_lm": peft.TaskType.CAUSAL_LM}


class Site(NamedTuple):
    """An adapted layer of the model and its place in a row."""

    module: LoraLayer
    pair: Pair


class HeadSite(NamedTuple):
    """A module of the trained head that holds parameters: (parameter name, its place in a row)."""

    module: nn.Module
    tensors: tuple[tuple[str, HeadTensor], ...]


class Adapted(NamedTuple):
    """A model with LoRA attached; the base weights are there once, however many peers are hosted."""

    model: peft.PeftModel
    layout: Layout
    sites: tuple[Site, ...]
    head: tuple[HeadSite, ...]  # empty while the head is frozen
    start: Tensor  # (D,) the row every peer starts from


def attach(model: nn.Module, lora: LoraConfig, task: str, head_modules: Sequence[str], seed: int) -> Adapted:
    """Put LoRA on `model` and freeze the rest. A ~ U(-1/sqrt(I), 1/sqrt(I)) from `seed`, B = 0.

    The head modules become part of the saved adapter, trained or not: a head that was drawn at random has to
    travel with it. ValueError when a name in `lora.targets` matches nothing, or something that is not linear.
    """
    linear = _linear_names(model)
    wrapped = _wrap(model, lora, task, head_modules, linear)
    wrapped.requires_grad_(False)
    # the layers' dropouts act only in training; everything else was put to eval by whoever loaded the model
    layers = [(name, module) for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)]
    for name, module in layers:
        _check_linear(name, module)
    _check_all_match(lora.targets, [name for name, _ in layers], linear)
    specs = [(_short(name), m.r[ADAPTER], m.lora_A[ADAPTER].in_features, m.lora_B[ADAPTER].out_features, m.scaling[ADAPTER])
             for name, m in layers]
    head = _head_parameters(wrapped, head_modules) if lora.head != "frozen" else []
    layout = make_layout(specs, [(name, p.shape) for name, _, _, p in head])
    sites = tuple(Site(m, pair) for (_, m), pair in zip(layers, layout.pairs, strict=True))
    placed = _place(head, layout)
    start = _start(layout, head, seed)
    return Adapted(wrapped, layout, sites, placed, start)


def _wrap(model: nn.Module, lora: LoraConfig, task: str, head_modules: Sequence[str], linear: set[str]) -> peft.PeftModel:
    targets = lora.targets if isinstance(lora.targets, str) or lora.targets is None else list(lora.targets)
    config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
                             use_rslora=lora.rslora, task_type=_PEFT_TASKS.get(task),
                             modules_to_save=list(head_modules) or None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about layouts it sets itself (fan_in_fan_out)
            return peft.get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise _no_fit(lora.targets, " ".join(str(error).split())[:160], linear) from None


def _no_fit(targets, why: str, linear: set[str]) -> ValueError:
    return ValueError(f"lora.targets = {targets!r} does not fit the model ({why}); its linear layers are: {', '.join(sorted(linear))}")


def _linear_names(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def _check_all_match(targets, names: list[str], linear: set[str]) -> None:
    """PEFT is content when one name of a list matches; a typing error in another would go unseen."""
    for target in targets if isinstance(targets, tuple) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _no_fit(targets, f"{target!r} matches none of them outside the head", linear)


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _check_linear(name: str, module: LoraLayer) -> None:
    if ADAPTER not in module.lora_A or not isinstance(module.lora_A[ADAPTER], nn.Linear):
        raise ValueError(f"lora.targets matches {_short(name)!r}, a {type(module.get_base_layer()).__name__}; "
                         "allowed: linear layers")


def _head_parameters(model: nn.Module, head_modules: Sequence[str]) -> list:
    """(name, module, parameter name, parameter) of the trained copies that PEFT keeps of the head modules."""
    found = []
    for head in head_modules:
        trained = model.get_submodule(f"base_model.model.{head}").modules_to_save[ADAPTER]
        for name, module in trained.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                found.append((".".join(filter(None, (head, name, key))), module, key, parameter))
    if not found:
        raise ValueError("lora.head must be 'frozen': this model has no head that was added for the task")
    return found


def _place(head: list, layout: Layout) -> tuple[HeadSite, ...]:
    places = {tensor.name: tensor for tensor in layout.head}
    modules: dict[nn.Module, list] = {}
    for name, module, key, _ in head:
        modules.setdefault(module, []).append((key, places[name]))
    return tuple(HeadSite(module, tuple(tensors)) for module, tensors in modules.items())


def _start(layout: Layout, head: list, seed: int) -> Tensor:
    row = empty_rows(1, layout.size)[0]
    generator = torch.Generator().manual_seed(seed)
    for pair in layout.pairs:
        bound = pair.d_in ** -0.5  # Kaiming-uniform with a = sqrt(5), PEFT's own start
        a_view(row, pair).uniform_(-bound, bound, generator=generator)
    for (_, _, _, parameter), tensor in zip(head, layout.head, strict=True):
        head_view(row, tensor).copy_(parameter.detach())
    return row


def bind(adapted: Adapted, x: Tensor, g: Tensor | None = None, trains=frozenset()) -> None:
    """Make PEFT's parameters views of row x (D,), their gradients views of row g (D,) for the groups in `trains`.

    Nothing is copied; what PEFT's layers read and autograd accumulates lies in the rows.
    """
    for site in adapted.sites:
        _point(site.module.lora_A[ADAPTER].weight, a_view, site.pair, x, g, "A" in trains)
        _point(site.module.lora_B[ADAPTER].weight, b_view, site.pair, x, g, "B" in trains)
    for site in adapted.head:
        for key, tensor in site.tensors:
            _point(getattr(site.module, key), head_view, tensor, x, g, "head" in trains)


def _point(parameter: nn.Parameter, view, place, x: Tensor, g: Tensor | None, trained: bool) -> None:
    parameter.grad = None
    parameter.data = view(x, place)
    parameter.requires_grad_(trained)
    if trained and g is not None:
        parameter.grad = view(g, place)
