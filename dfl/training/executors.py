"""How the hosted peers' batches go through the one base model: one peer after the other, or all at once."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dfl.adapters.attach import Adapted, Rows, bind
from dfl.adapters.batched import uploaded
from dfl.adapters.kinds import KINDS
from dfl.adapters.layout import a_view, b_view, head_view
from dfl.adapters.peft_layers import ADAPTER

# the gradients are views of the rows of g on purpose; autograd only remarks that they are not dense
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


# bytes of the outputs of one pass on a CPU; on a GPU it is a share of its memory
ROOM, SHARE = 2**32, 4


def logit_bytes(model: nn.Module, tokens: int) -> int:
    """What a model's output over its vocabulary takes for so many tokens: as it comes, as float32, and the gradients of both; 0 where
    it has no such output."""
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        return 0
    return tokens * model.config.get_text_config().vocab_size * 12


class Executor(Protocol):
    """Yields a function (inputs, index) -> model output. `inputs` is the equal batches of the rows `index`, one after the other.

    g: gradients (P, D) of the rows of factors, for the groups in `trains`; skips: adapted layers that get none, by number.
    """

    def groups(self, num_rows: int, row_bytes: int = 0) -> list[list[int]]:
        """Which rows go through the model together; row_bytes: what the output of one takes (`logit_bytes`)."""

    def bound(self, adapted: Adapted, rows: Rows, g: Tensor | None, index: Sequence[int], trains: frozenset[str],
              skips: frozenset[int] = frozenset()): ...


class Sequential:
    """The reference: PEFT's own layers, their parameters bound to one row after the other."""

    def groups(self, num_rows: int, row_bytes: int = 0) -> list[list[int]]:
        return [[row] for row in range(num_rows)]

    @contextmanager
    def bound(self, adapted: Adapted, rows: Rows, g: Tensor | None, index: Sequence[int], trains=frozenset(),
              skips=frozenset()) -> Iterator:
        (row,) = index
        bind(adapted, rows.x[row], None if g is None else g[row], trains, skips)
        scale = 1.0 if rows.scale is None else rows.scale[row]
        selected = _Selection(1)
        if scale != 1.0:
            for site in adapted.sites:
                site.module.scaling[ADAPTER] = site.pair.scaling * scale

        def forward(inputs, index):
            selected.batch = len(next(iter(inputs.values())))
            return adapted.model(**inputs)

        try:
            with _residuals(adapted, None if rows.residual is None else rows.residual[row:row + 1], selected):
                yield forward
        finally:
            if scale != 1.0:
                for site in adapted.sites:
                    site.module.scaling[ADAPTER] = site.pair.scaling


class Stacked:
    """All peers in one pass: base layers are read once, adapter products are batched over the rows of X_PD.

    The leading dimension of every adapted layer's input must be the batch, peer after peer, as it is in most of
    transformers; ValueError where it is not. Gradients of x's rows accumulate in the rows of g.
    room: bytes that the outputs of a pass may take; peers that need more go in several passes, as equal as possible.
    """

    def __init__(self, room: int = ROOM):
        self.room = room

    def groups(self, num_rows: int, row_bytes: int = 0) -> list[list[int]]:
        most = max(1, self.room // row_bytes) if row_bytes else max(1, num_rows)
        parts = -(-num_rows // most)
        return [list(range(num_rows * k // parts, num_rows * (k + 1) // parts)) for k in range(parts)]

    @contextmanager
    def bound(self, adapted: Adapted, rows: Rows, g: Tensor | None, index: Sequence[int], trains=frozenset(),
              skips=frozenset()) -> Iterator:
        x = rows.x
        selected = _Selection(len(x))
        patched = [site.module for site in adapted.sites] + [site.module for site in adapted.head]
        scale = None if rows.scale is None else uploaded(rows.scale, x, x.dtype)
        for number, site in enumerate(adapted.sites):
            a = _leaf(a_view(x, site.pair), g, partial(a_view, pair=site.pair), "A" in trains and number not in skips)
            b = _leaf(b_view(x, site.pair), g, partial(b_view, pair=site.pair), "B" in trains and number not in skips)
            scaling = site.pair.scaling if scale is None else site.pair.scaling * scale
            site.module.forward = partial(_lora_forward, site.module, a, b, scaling, selected)
        for site in adapted.head:
            tensors = {key: _leaf(head_view(x, t), g, partial(head_view, tensor=t), "head" in trains)
                       for key, t in site.tensors}
            site.module.forward = partial(_head_forward, _check_head(site.module), tensors, selected)

        def forward(inputs, index):
            selected.rows, selected.batch = index, len(next(iter(inputs.values())))
            return adapted.model(**inputs)

        try:
            with _residuals(adapted, rows.residual, selected):
                yield forward
        finally:
            for module in patched:
                module.__dict__.pop("forward", None)


class _Selection:
    """The rows of the current pass; all of them need no gather."""

    def __init__(self, num_rows: int):
        self.num_rows, self.rows, self.batch = num_rows, list(range(num_rows)), 0
        self._places: tuple[list[int], Tensor] | None = None

    def check(self, x: Tensor) -> None:
        """A layer fed with something that all examples share (relative positions) cannot be split by peers."""
        if self.num_rows > 1 and len(x) % self.batch:
            raise ValueError(f"train.executor = 'stacked' cannot adapt a layer whose input {tuple(x.shape)} does not lead with "
                             f"the batch of {self.batch}; allowed: 'sequential', or other lora.targets")

    def take(self, stacked: Tensor) -> Tensor:
        if len(self.rows) == self.num_rows:
            return stacked
        if self._places is None or self._places[0] != list(self.rows):  # a list would be sent to a GPU at every layer
            self._places = list(self.rows), uploaded(list(self.rows), stacked)
        return stacked[self._places[1]]


def _leaf(view: Tensor, g: Tensor | None, gradient_view, trained: bool) -> Tensor:
    leaf = view.detach()
    if trained:
        leaf.requires_grad_()
        leaf.grad = gradient_view(g)
    return leaf


def _lora_forward(module, a_all: Tensor, b_all: Tensor, scaling: float | Tensor, selected: _Selection, x: Tensor, *args, **kwargs):
    """y = base(x) + (s dropout(x) A^T) B^T, with A (P, R, I), B (P, O, R) of the block of rows each example is in."""
    if module.disable_adapters:
        return module.base_layer(x, *args, **kwargs)
    selected.check(x)
    result = module.base_layer(x, *args, **kwargs)
    scale = selected.take(scaling)[:, None, None] if isinstance(scaling, Tensor) else scaling
    return _plus(result, _inner(selected.take(a_all), module.lora_dropout[ADAPTER](x)) * scale, selected.take(b_all))


def _inner(a: Tensor, x: Tensor) -> Tensor:
    """x A^T (P, M, R), with A (P, R, I) of the block of rows each example is in, of M tokens."""
    return torch.bmm(x.to(a.dtype).reshape(len(a), -1, a.shape[-1]), a.mT)


def _plus(result: Tensor, inner: Tensor, b: Tensor) -> Tensor:
    """result + inner B^T with B (P, O, R), in one pass over the result where types are alike: those that scale and add by themselves
    take as long as both products."""
    if result.dtype != inner.dtype:
        return result + torch.bmm(inner, b.mT).view(result.shape).to(result.dtype)
    return torch.baddbmm(result.reshape(len(b), -1, b.shape[1]), inner, b.mT).view(result.shape)


@contextmanager
def _residuals(adapted: Adapted, residual: Tensor | None, selected: _Selection) -> Iterator:
    """Adds s (x G^T) F^T to the adapted layers' output, for residuals (P, D_E): part of the frozen model, so there is no dropout and
    no gradient."""
    handles = []
    for site, pair in zip(adapted.sites, adapted.residual.pairs, strict=True) if residual is not None else ():
        hook = partial(_residual_hook, a_view(residual, pair), b_view(residual, pair), pair.scaling, selected)
        handles.append(site.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _residual_hook(g_all: Tensor, f_all: Tensor, scaling: float, selected: _Selection, module, args, output: Tensor) -> Tensor:
    if module.disable_adapters:
        return output
    selected.check(args[0])
    return _plus(output, _inner(selected.take(g_all), args[0]) * scaling, selected.take(f_all))


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


EXECUTORS: dict[str, Callable[[], Executor]] = {"sequential": Sequential, "stacked": Stacked}


def choose(name: str, device: torch.device, adapter: str = "lora") -> Executor:
    """The executor of a recipe. `auto`: stacked on an accelerator; sequential on a CPU, where it is bit for bit the same
    however peers are hosted, and for kinds of adapter that cannot be stacked. ValueError for one that cannot run the kind."""
    able = KINDS[adapter].executors
    if name == "auto":
        name = "sequential" if device.type == "cpu" or "stacked" not in able else "stacked"
    if name not in able:
        raise ValueError(f"train.executor = {name!r} cannot run lora.adapter = {adapter!r}; allowed: {', '.join(able)}")
    if name == "stacked" and device.type == "cuda":
        return Stacked(torch.cuda.get_device_properties(device).total_memory // SHARE)
    return EXECUTORS[name]()
