"""A device that is elsewhere, on the CPU: tensors on it compute, but not together with tensors of the host, as on a GPU.

It calls itself `meta`, since torch knows no device that is made up. What a GPU would refuse is a DeviceError: an operation on
tensors of both, but for copies, for single numbers of the host and for places that index.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dfl.adapters.batched import as_on_a_gpu

ELSEWHERE = torch.device("meta")
_CROSS = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}


class DeviceError(RuntimeError):
    pass


class There(Tensor):
    """A tensor on that device; `inner` is what it holds."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        found = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
                                              dtype=inner.dtype, device=ELSEWHERE)
        found.inner = inner
        return found

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"There({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _call(func, args, kwargs):
    name, given = func._schema.name, [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = [value for value in given if isinstance(value, There)]
    if any(value.device == ELSEWHERE and not isinstance(value, There) for value in given):
        raise DeviceError(f"{name}: a list as an index or torch.tensor(..., device=) makes the host wait; `uploaded` does not")
    if there and name not in _CROSS and any(value.dim() for value in given if not isinstance(value, There)):
        raise DeviceError(f"{name} of tensors on two devices: {[(tuple(v.shape), isinstance(v, There)) for v in given]}")
    target = kwargs.get("device")
    goes = torch.device(target) == ELSEWHERE if target is not None else bool(there) and (
        name not in ("aten::index", "aten::index_put_", "aten::copy_") or isinstance(args[0], There))
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    same = {id(value.inner): value for value in there}
    return tree_map(lambda value: same.get(id(value), There(value)) if goes and isinstance(value, Tensor) else value, found)


def _inner(value):
    return value.inner if isinstance(value, There) else value


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


@contextmanager
def elsewhere():
    """Tensors may be made there meanwhile, and moved; generators of that device are those of the host."""
    with as_on_a_gpu(), _Mode(), mock.patch.object(torch, "Generator", _Generator):
        yield ELSEWHERE


def back(value: Tensor) -> Tensor:
    """What a tensor there holds."""
    assert isinstance(value, There), "it is on the host"
    return value.inner
