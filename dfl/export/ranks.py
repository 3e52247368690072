"""An adapter folder at another rank, and what that costs: read from and written to its files alone."""

import json
from pathlib import Path
from typing import NamedTuple

from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfl.adapters.lowrank import refactor, truncate
from dfl.adapters.peft_layers import is_plain_lora, title
from dfl.store.targets import ADAPTER_CONFIG, read_json

WEIGHTS = "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


class Loss(NamedTuple):
    """What a layer lost: its rank before, the Frobenius norm of its ΔW and of what was cut from it."""

    layer: str
    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        return self.error / self.norm if self.norm else 0.0


def refactor_folder(folder: Path, rank: int) -> list[Loss]:
    """Replace every pair of an adapter folder by the best pair of rank `rank` (Eckart-Young), its norm split between A and B.

    All layers have the folder's one rank and one scaling afterwards. ValueError for an adapter that is more than pairs.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    tensors = load_file(folder / WEIGHTS)
    layers = _layers(settings, tensors, rank)
    scaling = _scaling(settings, settings["lora_alpha"], settings["r"])
    losses = []
    for name in layers:
        a, b = tensors[name + _A], tensors[name + _B]
        own = _scaling(settings, _alpha(settings, name), len(a))
        svd = truncate(b.double() * (own / scaling), a.double(), rank)
        new_a, new_b = refactor(svd, a.double(), "balanced")
        tensors[name + _A], tensors[name + _B] = new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous()
        norm, error = float(svd.spectrum.norm()) * scaling, float(svd.error) * scaling
        losses.append(Loss(name.removeprefix(_PREFIX), len(a), norm, error))
    root = rank ** 0.5 if settings.get("use_rslora") else rank
    settings |= {"r": rank, "lora_alpha": scaling * root, "rank_pattern": {}, "alpha_pattern": {}}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True))
    return losses


def _layers(settings: dict, tensors: dict[str, Tensor], rank: int) -> list[str]:
    layers = [key.removesuffix(_A) for key in tensors if key.endswith(_A)]
    bad = [key for key in tensors if "lora_" in key and not key.endswith((_A, _B))]
    bad += [name for name in layers if name + _B not in tensors or tensors[name + _A].dim() != 2]
    if bad or not layers or not is_plain_lora(settings):
        what = f"holds {bad[0]}" if bad else f"is of the kind {title(settings)!r}"
        raise ValueError(f"--rank {rank}: the adapter {what}; allowed: plain LoRA, ΔW = s B A, of linear layers")
    return layers


def _alpha(settings: dict, name: str) -> float:
    pattern = settings.get("alpha_pattern") or {}
    return pattern.get(get_pattern_key(pattern.keys(), name.removeprefix(_PREFIX)), settings["lora_alpha"])


def _scaling(settings: dict, alpha: float, rank: int) -> float:
    return alpha / (rank ** 0.5 if settings.get("use_rslora") else rank)


def total(losses: list[Loss]) -> float:
    """The relative Frobenius error of all layers together."""
    norm = sum(loss.norm ** 2 for loss in losses)
    return (sum(loss.error ** 2 for loss in losses) / norm) ** 0.5 if norm else 0.0
