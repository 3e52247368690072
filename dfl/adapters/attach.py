"""PEFT's adapters on a Hugging Face model, with their parameters as views of a peer's row."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dfl.adapters import cores
from dfl.adapters.cores import Cores
from dfl.adapters.frames import Frames, make_frames
from dfl.adapters.kinds import KINDS, Kind, kind_of
from dfl.adapters.layout import HeadTensor, Layout, Pair, a_view, b_view, empty_rows, head_view, make_layout
from dfl.adapters.peft_layers import ADAPTER
from dfl.adapters.ranks import Ranks
from dfl.config import LoraConfig

_PEFT_TASKS = {"sequence_classification": peft.TaskType.SEQ_CLS, "sequence_regression": peft.TaskType.SEQ_CLS,
               "causal_lm": peft.TaskType.CAUSAL_LM, "preference": peft.TaskType.CAUSAL_LM}


class Site(NamedTuple):
    """An adapted layer of the model, its parameters, and its place in a row of factors."""

    module: nn.Module
    pair: Pair
    a: nn.Parameter
    b: nn.Parameter
    magnitude: tuple[nn.Parameter, HeadTensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight as (O, I)."""
        base = self.module.get_base_layer()
        plain = type(base.weight) is nn.Parameter and base.weight.is_floating_point()
        weight = base.weight if plain else dequantize_module_weight(base)
        return weight.T if isinstance(base, Conv1D) else weight


class FrozenWeights(Mapping):
    """The frozen weights (O, I) of adapted layers by name, each made when it is asked for: quantised ones are not kept twice."""

    def __init__(self, sites: Mapping[str, Site]):
        self.sites = sites

    def __getitem__(self, name: str) -> Tensor:
        return self.sites[name].weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


class HeadSite(NamedTuple):
    """A module of the trained head that holds parameters: (parameter name, its place in a row)."""

    module: nn.Module
    tensors: tuple[tuple[str, HeadTensor], ...]


class Adapted(NamedTuple):
    """A model with an adapter attached; the base weights are there once, however many peers are hosted.

    layout: of the rows that are trained and mixed. lora: of the rows of LoRA factors that the model reads, the same unless the
    kind of adapter trains cores. offset: a constant residual (what a start at the base weight's own directions adds at first), in a
    layout like `residual`. residual: the layout of low-rank products beside the adapter, None where there are none; kept: of those
    among them that the rule keeps. frames: the frozen A of each peer, where each has its own.
    """

    model: peft.PeftModel
    layout: Layout
    sites: tuple[Site, ...]
    head: tuple[HeadSite, ...]  # empty while the head is frozen
    start: Tensor  # (D,) the row every peer starts from, up to its rank
    ranks: Ranks
    kind: Kind = KINDS["lora"]
    cores: Cores | None = None
    offset: tuple[Layout, Tensor] | None = None
    residual: Layout | None = None
    kept: Layout | None = None
    frames: Frames | None = None

    @property
    def lora(self) -> Layout:
        return self.cores.lora if self.cores else self.layout

    def factors(self, x: Tensor) -> Tensor:
        """The LoRA factors (P, D_lora) of trained rows x (P, D): x itself unless the adapter trains cores."""
        if self.cores is None:
            return x
        out = empty_rows(len(x), self.lora.size, dtype=x.dtype, device=x.device)
        cores.expand(self.cores._replace(bases=self.cores.bases.to(x)), x, out)
        return out

    def reads(self, trains: frozenset[str]) -> frozenset[str]:
        """The groups of factors whose gradients make those of `trains`."""
        return trains if self.cores is None or "core" not in trains else trains - {"core"} | self.cores.core.moves

    def averageable(self, x: Tensor) -> Tensor:
        """Rows whose mean is the mean of the adapters: scales of heads folded into their cores."""
        return x if self.cores is None else self.cores.core.averageable(self.layout, x)


class Rows(NamedTuple):
    """What the model reads of P peers: factors x (P, D_lora), residuals beside them (P, D_E), and by how much each peer's
    adapter is scaled against the layout's."""

    x: Tensor
    residual: Tensor | None = None
    scale: tuple[float, ...] | None = None

    def row(self, index: int) -> "Rows":
        """One peer's alone, as rows of one."""
        return Rows(self.x[index:index + 1], None if self.residual is None else self.residual[index:index + 1],
                    None if self.scale is None else self.scale[index:index + 1])


class Fitted(NamedTuple):
    """An adapter on a model before any of its numbers is chosen: its layers, the ranks of the peers and the layout of the factors
    that the model reads.

    head: (name, module, parameter name, parameter) of what is trained of the head; shapes: of its tensors; core: what the kind trains
    in place of the factors.
    """

    kind: Kind
    model: peft.PeftModel
    layers: list[tuple[str, nn.Module]]
    ranks: Ranks
    lora: Layout
    head: list
    shapes: list
    core: cores.Core | None

    @property
    def layout(self) -> Layout:
        """Of the rows that are trained. ValueError for layers that the core does not fit."""
        return self.lora if self.core is None else cores.core_layout(self.lora, self.shapes, self.core)


def fit(model: nn.Module, lora: LoraConfig, task: str, head_modules: Sequence[str],
        ranks_for: Callable[[int | None], Ranks | None]) -> Fitted:
    """Put an adapter on `model`, which may lie on the meta device and have no numbers, and freeze the rest; arguments as of `attach`.

    ValueError when a name in `lora.targets` matches nothing, or something that is not linear.
    """
    kind, linear = kind_of(lora), _linear_names(model)
    known = ranks_for(None)
    wrapped = _wrap(model, kind, lora, task, head_modules, linear, known.largest if known else 1)
    wrapped.requires_grad_(False)
    # the layers' dropouts act only in training; everything else was put to eval by whoever loaded the model
    layers = [(name, module) for name, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in layers:
        _check_linear(name, module)
    _check_all_match(lora.targets, [name for name, _ in layers], linear)
    sizes = [(module.in_features, module.out_features) for _, module in layers]
    ranks = known or ranks_for(sum(i + o for i, o in sizes))
    specs = [(_short(name), ranks.largest, i, o, ranks.reference) for (name, _), (i, o) in zip(layers, sizes, strict=True)]
    head = _head_parameters(wrapped, head_modules) if lora.head != "frozen" else []
    shapes = [(name, p.shape) for name, _, _, p in head]
    beside = [(name, kind.beside.shape(i, o)) for name, _, i, o, _ in specs] if kind.beside else []
    core = kind.core(lora) if kind.core else None
    return Fitted(kind, wrapped, layers, ranks, make_layout(specs, shapes, beside), head, shapes, core)


def attach(model: nn.Module, lora: LoraConfig, task: str, head_modules: Sequence[str], seed: int,
           ranks_for: Callable[[int | None], Ranks | None]) -> Adapted:
    """Put an adapter on `model` and freeze the rest. A ~ U(-1/sqrt(I), 1/sqrt(I)) from `seed`, B = 0, or as lora.start says.

    ranks_for(sum of I + O over the adapted layers): the ranks of the peers. The head modules become part of the saved adapter,
    trained or not: a head that was drawn at random has to travel with it. ValueError as of `fit`.
    """
    fitted = fit(model, lora, task, head_modules, ranks_for)
    kind, layout, ranks, head = fitted.kind, fitted.lora, fitted.ranks, fitted.head
    sites = tuple(_site(kind, module, layout, index) for index, (_, module) in enumerate(fitted.layers))
    for site in sites:
        kind.layers.prepare(site.module, ranks.largest, ranks.reference)
    adapted = Adapted(fitted.model, layout, sites, _place(head, layout), _start(kind, layout, sites, head, seed), ranks, kind)
    if kind.own_a:
        adapted = adapted._replace(frames=make_frames(layout, seed, len(ranks.ranks)))
    return adapted if fitted.core is None else _with_cores(adapted, fitted, seed)


def _wrap(model: nn.Module, kind: Kind, lora: LoraConfig, task: str, head_modules: Sequence[str], linear: set[str],
          rank: int) -> peft.PeftModel:
    targets = lora.targets if isinstance(lora.targets, str) or lora.targets is None else list(lora.targets)
    shared = {"r": rank, "target_modules": targets, "task_type": _PEFT_TASKS.get(task), "modules_to_save": list(head_modules) or None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about layouts it sets itself (fan_in_fan_out)
            return peft.get_peft_model(model, kind.layers.config(lora, shared))
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


def _check_linear(name: str, module: nn.Module) -> None:
    if not isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
        raise ValueError(f"lora.targets matches {_short(name)!r}, a {type(module.get_base_layer()).__name__}; "
                         "allowed: linear layers")


def _site(kind: Kind, module: nn.Module, layout: Layout, index: int) -> Site:
    magnitude = (kind.beside.parameter(module), layout.magnitudes[index]) if kind.beside else None
    return Site(module, layout.pairs[index], *kind.layers.factors(module), magnitude)


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


def _start(kind: Kind, layout: Layout, sites: Sequence[Site], head: list, seed: int) -> Tensor:
    row = empty_rows(1, layout.size)[0]
    generator = torch.Generator().manual_seed(seed)
    for pair in layout.pairs:
        bound = pair.d_in ** -0.5  # Kaiming-uniform with a = sqrt(5), PEFT's own start
        a_view(row, pair).uniform_(-bound, bound, generator=generator)
    for site in sites:
        if site.magnitude is not None:
            head_view(row, site.magnitude[1]).copy_(kind.beside.start(site.weight))
    for (_, _, _, parameter), tensor in zip(head, layout.head, strict=True):
        head_view(row, tensor).copy_(parameter.detach())
    return row


def _with_cores(adapted: Adapted, fitted: Fitted, seed: int) -> Adapted:
    """Cores between frozen bases in place of the factors."""
    made = cores.make_cores(fitted.lora, fitted.shapes, fitted.core, seed)
    row = cores.start(made)
    for (_, _, _, parameter), tensor in zip(fitted.head, made.layout.head, strict=True):
        head_view(row, tensor).copy_(parameter.detach())
    return adapted._replace(layout=made.layout, start=row, cores=made)


def start_of(adapted: Adapted, peer: int) -> Tensor:
    """The row (D,) that a peer starts from: the common one, with its own A where it has one, zero beyond the peer's rank."""
    row = adapted.start.clone()
    if adapted.frames is not None:
        row[adapted.layout.groups["A"]] = adapted.frames(peer)[adapted.layout.groups["A"]]
    for pair in adapted.layout.pairs:
        a_view(row, pair)[adapted.ranks.ranks[peer]:] = 0
        b_view(row, pair)[:, adapted.ranks.ranks[peer]:] = 0
    return row


def bind(adapted: Adapted, x: Tensor, g: Tensor | None = None, trains=frozenset(), skips=frozenset()) -> None:
    """Make PEFT's parameters views of the row of factors x (D,), their gradients views of row g (D,) for the groups in `trains`.
    skips: layers that get no gradient, by number.

    Nothing is copied; what PEFT's layers read and autograd accumulates lies in the rows.
    """
    for number, site in enumerate(adapted.sites):
        trained = frozenset() if number in skips else trains
        _point(site.a, a_view, site.pair, x, g, "A" in trained)
        _point(site.b, b_view, site.pair, x, g, "B" in trained)
        if site.magnitude is not None:
            _point(site.magnitude[0], head_view, site.magnitude[1], x, g, "M" in trained)
    for site in adapted.head:
        for key, tensor in site.tensors:
            _point(getattr(site.module, key), head_view, tensor, x, g, "head" in trains)


@contextmanager
def adapters_off(adapted: Adapted) -> Iterator[None]:
    """While active the model is its base model: what adapters and residuals add is left out. Gradients stay as they are asked for."""
    for site in adapted.sites:
        site.module._disable_adapters = True  # PEFT's own switch also decides what is trained
    try:
        yield
    finally:
        for site in adapted.sites:
            site.module._disable_adapters = False


def _point(parameter: nn.Parameter, view, place, x: Tensor, g: Tensor | None, trained: bool) -> None:
    parameter.grad = None
    parameter.data = view(x, place)
    parameter.requires_grad_(trained)
    if trained and g is not None:
        parameter.grad = view(g, place)
