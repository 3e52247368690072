"""A step that all processes take, or none: the first error of any of them is raised by all."""

from collections.abc import Callable
from typing import TypeVar

from dfl.transport.base import Transport

Result = TypeVar("Result")


def together(transport: Transport, step: Callable[[], Result]) -> Result:
    """`step()` of every process. Where it fails on one, all raise what the first of those said, so that none goes on alone."""
    error = None
    try:
        result = step()
    except (ValueError, OSError) as failure:
        error = failure
    if not transport.agree(error is not None):
        return result
    kind = "" if error is None else "ValueError " if isinstance(error, ValueError) else "OSError "
    said = [data.decode() for data in transport.share((kind + " ".join(str(error).split()) if kind else "").encode())]
    first = next(process for process, text in enumerate(said) if text)
    if first == transport.rank == 0:
        raise error
    kind, _, text = said[first].partition(" ")
    where = f"{transport.describe(first)}: " if first else ""
    raise (ValueError if kind == "ValueError" else OSError)(where + text) from error
