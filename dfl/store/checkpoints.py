"""The checkpoints in a run directory: which there are, which are whole, and what a killed writer has left."""

import logging
import os
import re
from pathlib import Path

from dfl.store.directory import keep_others, remove_checkpoint
from dfl.store.manifest import NAME, UnreadableError, folder_name, verify

logger = logging.getLogger(__name__)


def folder_of(run: Path, rounds: int) -> Path:
    return run / "checkpoints" / folder_name(rounds)


def complete(run: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = (p for p in (run / "checkpoints").glob("round-*") if re.fullmatch(r"round-\d+", p.name))
    return sorted((p for p in found if p.name == folder_name(rounds_of(p)) and (p / NAME).is_file()), key=rounds_of)


def rounds_of(folder: Path) -> int:
    return int(folder.name.removeprefix("round-"))


def latest(run: Path) -> Path | None:
    """The newest checkpoint whose files are whole, or None. Damaged ones are passed over, with a warning that names the file.

    NewerError where there is one that only a newer version reads: to go on from the one before it would undo what that has done.
    """
    for folder in reversed(complete(run)):
        try:
            verify(folder)
        except UnreadableError as error:
            logger.warning("dfl: WARNING: %s; the one before it is taken, if there is one", error)
            continue
        return folder
    return None


def tidy(run: Path) -> None:
    """Remove what a killed writer left behind, and put back what it had laid aside."""
    for draft in (run / "checkpoints").glob(".round-*.draft"):
        remove_checkpoint(draft)
    for aside in (run / "checkpoints").glob(".round-*.aside"):
        target = aside.with_name(aside.name.removeprefix(".").removesuffix(".aside"))
        if target.exists():
            remove_aside(target)
        else:
            os.replace(aside, target)


def aside(target: Path) -> Path:
    """Where a checkpoint lies while another of the same round takes its place."""
    return target.with_name(f".{target.name}.aside")


def remove_aside(target: Path) -> None:
    """The checkpoint that `target` has replaced; what somebody else has put into it stays, in `target`."""
    remove_checkpoint(aside(target))
    if aside(target).is_dir():
        keep_others(aside(target), target)
