"""How the hosted peers' batches go through the one base model: one peer after the other, or all at once."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dfl.adapters import ADAPTER, Adapted, bind
from dfl.factors import a_view, b_view, head_view

# the gradients are views of the rows of g on purpose; autograd only remarks that they are not dense
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


class Executor(Protocol):
    """Yields a function (inputs, rows) -> model output. `inputs` is the equal batches of `rows`, one after the other."""

    def groups(self, num_rows: int) -> list[list[int]]:
        """Which rows go through the model together."""

    def bound(self, adapted: Adapted, x: Tensor, g: Tensor | None, rows: Sequence[int], trains: frozenset[str]): ...


class Sequential:
    """The reference: PEFT's own layers, their parameters bound to one row after the other."""

    def groups(self, num_rows: int) -> list[list[int]]:
        return [[row] for row in range(num_rows)]

    @contextmanager
    def bound(self, adapted: Adapted, x: Tensor, g: Tensor | None, rows: Sequence[int], trains=frozenset()) -> Iterator:
        (row,) = rows
        bind(adapted, x[row], None if g is None else g[row], trains)
        yield lambda inputs, rows: adapted.model(**inputs)


class Stacked:
    """All peers in one pass: base layers are read once, adapter products are batched over the rows of X_PD.

    The leading dimension of every adapted layer's input must be the batch, peer after peer, as it is in most of
    transformers; ValueError where it is not. Gradients of x's rows accumulate in the rows of g.
    """

    def groups(self, num_rows: int) -> list[list[int]]:
        return [list(range(num_rows))] if num_rows else []

    @contextmanager
    def bound(self, adapted: Adapted, x: Tensor, g: Tensor | None, rows: Sequence[int], trains=frozenset()) -> Iterator:
        selected = _Selection(len(x))
        patched = [site.module for site in adapted.sites] + [site.module for site in adapted.head]
        for site in adapted.sites:
            a = _leaf(a_view(x, site.pair), g, partial(a_view, pair=site.pair), "A" in trains)
            b = _leaf(b_view(x, site.pair), g, partial(b_view, pair=site.pair), "B" in trains)
            site.module.forward = partial(_lora_forward, site.module, a, b, site.pair.scaling, selected)
        for site in adapted.head:
            tensors = {key: _leaf(head_view(x, t), g, partial(head_view, tensor=t), "head" in trains)
                       for key, t in site.tensors}
            site.module.forward = partial(_head_forward, _check_head(site.module), tensors, selected)

        def forward(inputs, rows):
            selected.rows, selected.batch = rows, len(next(iter(inputs.values())))
            return adapted.model(**inputs)

        try:
            yield forward
        finally:
            for module in patched:
                module.__dict__.pop("forward", None)


class _Selection:
    """The rows of the current pass; all of them need no gather."""

    def __init__(self, num_rows: int):
        self.num_rows, self.rows, self.batch = num_rows, list(range(num_rows)), 0

    def check(self, x: Tensor) -> None:
        """A layer fed with something that all examples share (relative positions) cannot be split by peers."""
        if len(x) % self.batch:
            raise ValueError(f"train.executor = 'stacked' cannot adapt a layer whose input {tuple(x.shape)} does not lead with "
                             f"the batch of {self.batch}; allowed: 'sequential', or other lora.targets")

    def take(self, stacked: Tensor) -> Tensor:
        return stacked if len(self.rows) == self.num_rows else stacked[self.rows]


def _leaf(view: Tensor, g: Tensor | None, gradient_view, trained: bool) -> Tensor:
    leaf = view.detach()
    if trained:
        leaf.requires_grad_()
        leaf.grad = gradient_view(g)
    return leaf


def _lora_forward(module, a_all: Tensor, b_all: Tensor, scaling: float, selected: _Selection, x: Tensor, *args, **kwargs):
    """y = base(x) + s (dropout(x) A^T) B^T, with A (P, R, I), B (P, O, R) of the block of rows each example is in."""
    selected.check(x)
    result = module.base_layer(x, *args, **kwargs)
    a, b = selected.take(a_all), selected.take(b_all)
    hidden = module.lora_dropout[ADAPTER](x).to(a.dtype).reshape(len(a), -1, a.shape[-1])
    delta = torch.bmm(torch.bmm(hidden, a.mT), b.mT).view(*x.shape[:-1], b.shape[-2])
    return result + (delta * scaling).to(result.dtype)


def _head_forward(module: nn.Linear, tensors: dict[str, Tensor], selected: _Selection, x: Tensor) -> Tensor:
    weight = selected.take(tensors["weight"])  # (P, O, I)
    out = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]).to(weight.dtype), weight.mT)
    if "bias" in tensors:
        out = out + selected.take(tensors["bias"])[:, None]
    return out.view(*x.shape[:-1], weight.shape[-2])


def _check_head(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        raise ValueError(f"train.executor = 'stacked' cannot train a {type(module).__name__} in the head; "
                         "allowed: 'sequential', or lora.head = 'frozen'")
    return module


def autocasts(setting: str, device: torch.device) -> bool:
    """Whether forward passes run in bfloat16. `auto`: on a GPU."""
    return setting == "bfloat16" or (setting == "auto" and device.type == "cuda")


def choose(name: str, device: torch.device) -> Executor:
    """The executor of a recipe. `auto`: stacked on an accelerator; sequential on a CPU, where it is bit for bit the same
    however peers are hosted."""
    if name == "auto":
        name = "sequential" if device.type == "cpu" else "stacked"
    return {"sequential": Sequential, "stacked": Stacked}[name]()
