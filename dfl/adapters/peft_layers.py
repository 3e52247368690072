"""PEFT's own layers behind a kind of adapter: their configuration, the parameters that they read, a folder of them.

Nothing here knows a peer or a run. PEFT is imported where it is needed: the table of kinds is also read by those who
have no model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from dfl.adapters.layout import Layout, a_view, b_view, join, join_rows
from dfl.config import LoraConfig

ADAPTER = "default"
Layer = Any  # a module that PEFT has put in the place of a linear one: its attributes are by adapter


class Saved(NamedTuple):
    """One model that is to be saved: rows of one (1, D) in their layouts, the factors, then a residual beside them.

    scaling: what multiplies B A in the layout; scale: by how much this peer's is larger.
    """

    layouts: Sequence[Layout]
    rows: Sequence[Tensor]
    scaling: float
    scale: float = 1.0


class PeftLayers(NamedTuple):
    """What a kind has of PEFT.

    config(lora, shared) -> PEFT's configuration, from our section `lora` and what is the same for all kinds: r, ...;
    factors(module) -> the parameters A (R, I) and B (O, R) of an adapted layer;
    prepare(module, rank, scaling): the layer is to read factors of this rank and multiply their product so;
    scaling(alpha, rank, rslora) -> what multiplies B A;
    save(model, tensors, config) -> the tensors of a folder that stock PEFT loads, from those that PEFT names; it makes
        `config` fit.
    """

    config: Callable[[LoraConfig, Mapping[str, Any]], Any]
    factors: Callable[[Layer], tuple[nn.Parameter, nn.Parameter]]
    prepare: Callable[[Layer, int, float], None]
    scaling: Callable[[float, int, bool], float]
    save: Callable[[Saved, Mapping[str, Tensor], Any], dict[str, Tensor]]


def _lora_config(lora: LoraConfig, shared: Mapping[str, Any], use_dora: bool = False):
    import peft
    return peft.LoraConfig(lora_alpha=shared["r"], lora_dropout=lora.dropout, use_dora=use_dora, **shared)


def _hira_config(lora: LoraConfig, shared: Mapping[str, Any]):
    import peft
    return peft.HiraConfig(hira_dropout=lora.dropout, **shared)


def _lora_factors(module: Layer) -> tuple[nn.Parameter, nn.Parameter]:
    return module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight


def _hira_factors(module: Layer) -> tuple[nn.Parameter, nn.Parameter]:
    return module.hira_A[ADAPTER], module.hira_B[ADAPTER]


def _prepare_lora(module: Layer, rank: int, scaling: float) -> None:
    module.r[ADAPTER], module.scaling[ADAPTER] = rank, scaling


def lora_scaling(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def joined(model: Saved, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A and B of every layer, cut to the components in use, a residual behind them: stock PEFT computes the same model.

    What PEFT names beside them stays. The rank of `config` is the one that the values fill, and alpha follows.
    """
    parts = list(zip(model.layouts, model.rows, strict=True))
    slots = [max((_used(a_view(x[0], pair), b_view(x[0], pair)) for pair in layout.pairs), default=1)
             for layout, x in parts]
    layout = join(model.layouts, slots)
    row = join_rows(layout, model.layouts, model.rows, 1, slots)[0]
    found: dict[str, Tensor] = {}
    for pair in layout.pairs:
        a, b = a_view(row, pair), b_view(row, pair)
        b[:, slots[0]:] /= model.scale  # the residual has the layout's scaling, the adapter the peer's
        found |= {f"base_model.model.{pair.name}.lora_A.weight": a, f"base_model.model.{pair.name}.lora_B.weight": b}
    if found.keys() - tensors.keys():
        raise AssertionError(f"PEFT does not call its tensors {sorted(found.keys() - tensors.keys())[:2]}")
    config.r, config.use_rslora = sum(slots), False
    config.lora_alpha = model.scaling * model.scale * config.r
    return {**tensors, **found}


def _used(a: Tensor, b: Tensor) -> int:
    """How many components hold anything; at least one."""
    filled = (a.ne(0).any(1) | b.ne(0).any(0)).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 1


def as_peft_names_them(model: Saved, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """For layers that have no place for a residual, and one rank for all."""
    return dict(tensors)


LORA = PeftLayers(_lora_config, _lora_factors, _prepare_lora, lora_scaling, joined)
DORA = LORA._replace(config=partial(_lora_config, use_dora=True))
# its layers know no alpha
HIRA = PeftLayers(_hira_config, _hira_factors, lambda module, rank, scaling: None, lambda alpha, rank, rslora: 1.0,
                  as_peft_names_them)


def is_plain_lora(settings: Mapping[str, Any]) -> bool:
    """Whether a folder with this adapter_config.json changes weights by s B A and nothing else."""
    return settings.get("peft_type") == "LORA" and not settings.get("use_dora")


def title(settings: Mapping[str, Any]) -> str:
    """What people call the adapter of a folder with this adapter_config.json."""
    name = str(settings.get("peft_type"))
    return "DoRA" if settings.get("use_dora") else {"LORA": "LoRA", "HIRA": "HiRA", "IA3": "(IA)³"}.get(name, name)
