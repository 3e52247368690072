"""`dfl.train`: a run from a script or a notebook, which leaves the process as it was and raises where the command exits."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dfl.config import resolve
from dfl.config.sources import Source, overrides_of, tree_of
from dfl.result import Result
from dfl.run.callbacks import Callback
from dfl.run.train import train as run_to_the_end


def train(config: Source = None, *, resume: bool = False, overwrite: bool = False,
          callbacks: Sequence[Callback | type[Callback]] = (), **overrides: Any) -> Result:
    """Run a configuration in this process and return what it has left.

    config: the path of a recipe, a mapping of its fields, or a `Config`; None: the defaults. overrides: fields that
    replace those of `config`, with `__` for the dot: `train__rounds=5`, `method={"name": "tad", "T": 5}`. resume,
    overwrite, callbacks: as those of the command; callbacks are classes or instances.

    A first interrupt (or SIGTERM) ends the run with its state saved: `finished` of the result is then False, and
    `resume=True` goes on. The number of torch's threads, its random numbers and the signal handlers are afterwards as
    they were before; in a thread beside the main one, no handler is set. Under torchrun, all processes call it, and all
    return the result.

    KeyboardInterrupt where a signal came before there was anything to save, ValueError for what cannot run,
    dfl.run.callbacks.CallbackError for a callback that raised, FloatingPointError for a peer that diverged (the state
    before it is saved), OSError for a disk or a process that is lost.
    """
    resolved = resolve(tree_of(config), overrides_of(overrides))
    output = Path(resolved.output)
    with _process_unchanged():
        status = run_to_the_end(resolved, resume=resume, overwrite=overwrite, callbacks=callbacks)
    if status and not (output / "recipe.yaml").is_file():
        raise KeyboardInterrupt("stopped by a signal before the run began; there is nothing to go on from")
    return Result(output)


@contextlib.contextmanager
def _process_unchanged() -> Iterator[None]:
    """torch's threads, random numbers and device as they were; of a GPU only where the process has used one before."""
    threads = torch.get_num_threads()
    used = torch.cuda.is_initialized()
    device = torch.cuda.current_device() if used else None
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else []):
            yield
    finally:
        torch.set_num_threads(threads)
        if used:
            torch.cuda.set_device(device)
