"""A model that a script has put LoRA on, as the row of a peer: which parameters it trains, and where each lies in the row.

The parameters stay the script's own, of whatever type and device, whole or in parts on the processes of the peer; rows are float32
copies, read before a mix and written after it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dfl.adapters.attach import Adapted, HeadSite, Site
from dfl.adapters.kinds import KINDS, Kind
from dfl.adapters.layout import Pair, a_view, b_view, head_view, make_layout
from dfl.adapters.peft_layers import ADAPTER
from dfl.adapters.ranks import Ranks
from dfl.transport.shards import in_parts, mine, part_like, put_away, sharded, whole


class Found(NamedTuple):
    """What a script's model trains: LoRA layers (name, module), one rank and scaling for all of them, and every other
    parameter (name, the module that holds it, its name there, the parameter)."""

    model: nn.Module
    kind: str
    layers: list[tuple[str, Any]]
    rank: int
    scaling: float
    others: list[tuple[str, nn.Module, str, nn.Parameter]]

    def told(self) -> dict[str, object]:
        """What has to be the same at every peer."""
        return {"adapter": self.kind, "adapted layers": [(name, m.in_features, m.out_features) for name, m in self.layers],
                "trained beside them": [(name, list(p.shape)) for name, _, _, p in self.others]}


def find(model: nn.Module) -> Found:
    """ValueError for a model without LoRA, and for what no row has a place for: other adapters, several ranks, layers that are not
    linear."""
    put_away(sharded(model))
    layers = [(_short(name), module) for name, module in model.named_modules()
              if isinstance(module, BaseTunerLayer) and ADAPTER in getattr(module, "lora_A", {})]
    if not layers:
        raise ValueError(f"the model has no LoRA layers of an adapter called {ADAPTER!r}; put them on first: "
                         "peft.get_peft_model(model, LoraConfig(...)), or the trainer's peft_config")
    for name, module in layers:
        if not isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
            raise ValueError(f"layer {name!r} with LoRA is a {type(module.get_base_layer()).__name__}; allowed: linear layers "
                             "(target_modules)")
    sizes = sorted({(module.r[ADAPTER], float(module.scaling[ADAPTER])) for _, module in layers})
    if len(sizes) > 1:
        raise ValueError(f"the layers have ranks and scalings {sizes}; allowed: one of each (no rank_pattern, no alpha_pattern)")
    with_magnitude = {bool(getattr(module, "lora_magnitude_vector", {}) and ADAPTER in module.lora_magnitude_vector)
                      for _, module in layers}
    if len(with_magnitude) > 1:
        raise ValueError("some layers are DoRA and some are not; allowed: one kind for all")
    kind = "dora" if with_magnitude.pop() else "lora"
    mine = {id(p) for _, module in layers for p in _own(KINDS[kind], module)}
    others = [(name, module, key, p) for name, module, key, p in _trained(model) if id(p) not in mine]
    return Found(model, kind, layers, *sizes[0], others)


def _own(kind: Kind, module) -> list[nn.Parameter]:
    return [*kind.layers.factors(module), *([kind.beside.parameter(module)] if kind.beside else [])]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield ".".join(filter(None, (_short(name), key))), module, key, parameter


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(f".modules_to_save.{ADAPTER}", "")


def adapt(found: Found, ranks: Ranks) -> Adapted:
    """The model as `dfl.adapters` knows one that it has adapted itself; `start` is left at zero."""
    kind = KINDS[found.kind]
    specs = [(name, ranks.largest, module.in_features, module.out_features, ranks.reference) for name, module in found.layers]
    beside = [(name, kind.beside.shape(i, o)) for name, _, i, o, _ in specs] if kind.beside else []
    layout = make_layout(specs, [(name, p.shape) for name, _, _, p in found.others], beside)
    sites = tuple(Site(module, layout.pairs[k], *kind.layers.factors(module),
                       (kind.beside.parameter(module), layout.magnitudes[k]) if kind.beside else None)
                  for k, (_, module) in enumerate(found.layers))
    heads: dict[nn.Module, list] = {}
    for (_, module, key, _), tensor in zip(found.others, layout.head, strict=True):
        heads.setdefault(module, []).append((key, tensor))
    head = tuple(HeadSite(module, tuple(tensors)) for module, tensors in heads.items())
    return Adapted(found.model, layout, sites, head, torch.zeros(layout.size), ranks, kind)


class Parameter(NamedTuple):
    """One of the script's parameters: its group, and its numbers in a row, (*shape) as a view of it."""

    group: str
    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor]

    def of(self, row: Tensor) -> Tensor:
        """Its part of a row (D,), a view; of the peer's own rank."""
        return self.view(row)


def parameters_of(adapted: Adapted) -> list[Parameter]:
    """All parameters of a row, in its order of groups: A, B, M, head."""
    a = [Parameter("A", site.a, partial(_own_a, pair=site.pair, rank=site.a.shape[0])) for site in adapted.sites]
    b = [Parameter("B", site.b, partial(_own_b, pair=site.pair, rank=site.b.shape[1])) for site in adapted.sites]
    m = [Parameter("M", site.magnitude[0], partial(head_view, tensor=site.magnitude[1])) for site in adapted.sites if site.magnitude]
    head = [Parameter("head", getattr(site.module, key), partial(head_view, tensor=tensor))
            for site in adapted.head for key, tensor in site.tensors]
    return [*a, *b, *m, *head]


def _own_a(x: Tensor, pair: Pair, rank: int) -> Tensor:
    return a_view(x, pair)[:rank]


def _own_b(x: Tensor, pair: Pair, rank: int) -> Tensor:
    return b_view(x, pair)[:, :rank]


def read(parameters: Sequence[Parameter], views: list[Tensor]) -> None:
    """Copy the parameters into their parts of a row; by all processes that hold them in parts together."""
    torch._foreach_copy_(views, [whole(one.parameter.detach()) for one in parameters])


def write(parameters: Sequence[Parameter], views: list[Tensor]) -> None:
    """Copy their parts of a row into the parameters, in place: views and optimisers keep them."""
    with torch.no_grad():
        torch._foreach_copy_([mine(one.parameter) for one in parameters],
                             [part_like(view, one.parameter) for one, view in zip(parameters, views, strict=True)])


@contextmanager
def lent(adapted: Adapted, parameters: Sequence[Parameter]) -> Iterator[Adapted]:
    """The model with parameters that may point elsewhere in here, as they do while a folder is written; afterwards they are as they
    were. For those in parts others that are whole stand in."""
    kept = [(one.parameter, one.parameter.data, one.parameter.grad, one.parameter.requires_grad) for one in parameters]
    for_parts = {id(p): nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p, *_ in kept if in_parts(p)}
    places = [(module, key, p) for module in adapted.model.modules() for key, p in module._parameters.items() if id(p) in for_parts]
    try:
        for module, key, parameter in places:
            module._parameters[key] = for_parts[id(parameter)]
        yield adapted._replace(sites=tuple(_with(site, for_parts) for site in adapted.sites))
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter
        for parameter, data, grad, trained in kept:
            if id(parameter) not in for_parts:
                parameter.grad = None
                parameter.data = data
                parameter.requires_grad_(trained)
                parameter.grad = grad


def _with(site: Site, others: dict[int, nn.Parameter]) -> Site:
    a, b = others.get(id(site.a), site.a), others.get(id(site.b), site.b)
    m = site.magnitude and (others.get(id(site.magnitude[0]), site.magnitude[0]), site.magnitude[1])
    return site._replace(a=a, b=b, magnitude=m)
