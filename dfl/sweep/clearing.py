"""`dfl sweep --overwrite`: what an earlier sweep has written into its folder goes, and nothing else."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from dfl.store.directory import STATE, clear, marked, remove
from dfl.store.lease import acquiring, hold, owners
from dfl.transport import InProcess


def check(folder: Path, names: Sequence[str]) -> None:
    """ValueError unless the runs of these names, and the sweep itself, may be removed. Only looks.

    A run at work keeps its folder; so does everything in a folder that no sweep has marked, whatever its sweep.json says.
    """
    if not marked(folder, "sweep"):
        why = "is a symbolic link" if folder.is_symlink() else "carries no marker of a sweep of dfl"
        raise ValueError(f"output = {str(folder)!r} {why}, so nothing in it is removed; give another output")
    for run in _runs(folder, names):
        if owners(run):  # there, or dead: then its lease is as good as given back
            next(lease for lease in acquiring(run) if lease is not None).release()


def begin_again(folder: Path, names: Sequence[str]) -> list[str]:
    """Remove the runs of these names, their logs and recipes; what is left of them, as no run has written it."""
    check(folder, names)
    left = []
    for run in _runs(folder, names):
        lease = hold(run, InProcess())
        kept = clear(run)
        if not kept:  # with the lease the folder goes
            lease.made = (run, run / STATE)
        lease.release()
        left += [f"{run.name}/{name}" for name in kept]
    files = [folder / "logs" / f"{name}{end}" for name in names for end in (".log", ".failed.json")]
    files += [folder / "recipes" / f"{name}.yaml" for name in names]
    remove(folder, [path for path in files if not path.is_symlink()])
    return left


def _runs(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    return (folder / name for name in names if marked(folder / name))
