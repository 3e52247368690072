"""What the host asks tensors for: on a GPU each time it would wait until all that has been begun is done."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# read one number, compare all, or find out how many there are
_OPERATIONS = {f"aten::{name}" for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")}
_METHODS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in _OPERATIONS and _on_device(args[0]):
            self.found.append(name)
        if name in ("aten::index", "aten::index_put_", "aten::index_put"):
            self.found += [f"{name} by a mask" for index in args[1] if index is not None and index.dtype == torch.bool]
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """While active, `found` names each time that a number of a tensor is asked for.

    On a CPU all tensors are the host's. Whole numbers are taken to be so on a GPU as well: they are ranks, places and counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._operations = _Operations(self.found)

    def __enter__(self) -> "Reads":
        self._operations.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._operations.__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _METHODS and _on_device(args[0]):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def _on_device(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype == torch.bool
