"""What of a run directory is a run's own: the marker of a directory of ours, the files that a run writes, and their removal.

    RUN/.dfl/marker.json    this directory is a run's (or a sweep's); a number that no other run has

A run puts its marker only where none of the files that it writes is there already, so that in a directory with a marker the names
below are its own. Nothing else is ever removed, nothing without a marker, nothing through a symbolic link.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

# what process 0 leaves in the folder of a run that a callback has ended
ENDED = "ended.json"
BEST = "best"  # the folder of the best models, each in the folder of its name
# a file that safetensors (0.8) is writing, before it has its name: what is left of it when the writer is killed there
_UNNAMED = r"\.tmp[0-9A-Za-z]{6}"
_OF_BEST = re.compile(r"(\.(peer-\d+|consensus)\.[0-9a-f]{16}\.draft|peer-\d+|consensus)/"
                      rf"(adapter_model\.safetensors|adapter_config\.json|best\.json|{_UNNAMED})")
STATE = ".dfl"  # the folder in a run directory for what is no result: marker and lease
FORMAT = 1
# what a run leaves at the top of its directory, in the order of removal: who finds a recipe finds all that belongs to it
_FILES = (ENDED, "metrics.jsonl", "run.json", "recipe.yaml")
_OF_PROCESS = re.compile(r"metrics-\d+\.jsonl")
# made by `dfl report` in the directory of a run; another report there may be somebody's own
REPORTS = ("report.html", "report.md")
REPORT_MARK = "made by dfl report"
# what a tracker leaves in a folder of its name
OF_TRACKERS = {"tensorboard": r"events\.out\.tfevents\.[^/]*",
               "wandb": r"(offline-)?run-.*|latest-run|debug\.log|debug-internal\.log|debug-cli\.[^/]*\.log"}
# a checkpoint whose manifest cannot be read, or is not there yet
_LAYOUT = re.compile(rf"state-\d+\.safetensors|consensus/consensus\.json|{_UNNAMED}|"
                     rf"(peer-\d+|consensus)/(adapter_model\.safetensors|adapter_config\.json|{_UNNAMED})")
_CHECKPOINT = re.compile(r"round-\d+|\.round-\d+(\.[0-9a-f]{8})?\.(draft|aside)")


def files(run: Path) -> list[str]:
    """The names of what a run leaves, or may leave, at the top of its directory, with the records of each of its processes."""
    return [*_names(run, _OF_PROCESS), *_FILES]


def records_of(process: int) -> str:
    """The file in which a process writes its records."""
    return f"metrics-{process}.jsonl" if process else "metrics.jsonl"


def all_records(run: Path) -> list[Path]:
    """The files of records that are there, that of process 0 first."""
    found = [run / name for name in sorted(_names(run, _OF_PROCESS), key=lambda name: int(name[8:-6]))]
    return [run / records_of(0), *found] if (run / records_of(0)).exists() else found


def _names(run: Path, pattern: re.Pattern) -> list[str]:
    return sorted(path.name for path in run.iterdir() if pattern.fullmatch(path.name)) if run.is_dir() else []


def mark(folder: Path, kind: str = "run") -> None:
    """Put a marker into a directory of ours; one that is there gets a new number."""
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    draft = folder / STATE / f"marker-{secrets.token_hex(8)}.draft"  # the tasks of a sweep may do this at once
    try:
        draft.write_text(json.dumps({"made_by": "dfl", "kind": kind, "format": FORMAT, "id": secrets.token_hex(16)}))
        draft.replace(folder / STATE / "marker.json")
    finally:
        draft.unlink(missing_ok=True)


def marked(folder: Path, kind: str = "run") -> bool:
    """Whether a real directory, no link to one, carries our marker."""
    path = folder / STATE / "marker.json"
    if folder.is_symlink() or (folder / STATE).is_symlink() or path.is_symlink():
        return False
    try:
        marker = json.loads(path.read_text())
        return marker["made_by"] == "dfl" and marker["kind"] == kind
    except (OSError, ValueError, KeyError, TypeError):
        return False


def marker_id(folder: Path) -> str:
    """The number of the run in a directory with our marker."""
    return json.loads((folder / STATE / "marker.json").read_text())["id"]


def is_plain_name(name: object) -> bool:
    """Whether a name can only be that of something directly inside a folder."""
    return isinstance(name, str) and name not in ("", ".", "..", STATE) and not re.search(r"[/\\\0]", name)


def inside(folder: Path, path: Path) -> bool:
    """Whether `path` is a file, or a link itself, reached from `folder` through real directories only."""
    parts = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    if not parts or ".." in parts:
        return False
    parents = [folder.joinpath(*parts[:k]) for k in range(1, len(parts))]
    return all(parent.is_dir() and not parent.is_symlink() for parent in parents) and (path.is_symlink() or path.is_file())


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint, its manifest first: half of one is none. Those that the manifest names, and no others."""
    manifest = folder / "manifest.json"
    names = _named(manifest)
    if names is None:
        names = [name for name in below(folder) if _LAYOUT.fullmatch(name)]
    return [path for path in (manifest, *(folder / name for name in names)) if not path.is_symlink() and inside(folder, path)]


def _named(manifest: Path) -> list[str] | None:
    """None for a manifest that is not there or cannot be read."""
    try:
        names = list(json.loads(manifest.read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [name for name in names if not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts and name]


def below(folder: Path) -> list[str]:
    """Everything below a folder that is no directory, links not followed, as relative names."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else ():
        if path.is_dir() and not path.is_symlink():
            found += [f"{path.name}/{name}" for name in below(path)]
        else:
            found.append(path.name)
    return found


def remove(folder: Path, files: Iterable[Path]) -> None:
    """Remove files below a folder, and the directories that become empty; never through a link."""
    parents = set()
    for path in files:
        if inside(folder, path):
            path.unlink()
            parents |= {parent for parent in path.parents if folder in parent.parents}
    for parent in sorted(parents, key=lambda parent: -len(parent.parts)):
        _remove_if_empty(parent)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # it holds something that is not ours
        pass


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint of a run, or a draft of one. What somebody else has put there stays."""
    if folder.is_symlink() or folder.parent.is_symlink():
        return
    remove(folder, checkpoint_files(folder))
    for inner in [*(folder.glob("peer-*")), folder / "consensus", folder]:
        if not inner.is_symlink():
            _remove_if_empty(inner)


def keep_others(old: Path, new: Path) -> None:
    """Move what is left in a checkpoint that was replaced to the one in its place, and remove its directory."""
    for name in below(old):
        target = new / name
        if not target.exists() and not target.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            (old / name).rename(target)
    for inner in sorted((path for path in old.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        _remove_if_empty(inner)
    _remove_if_empty(old)


def written(run: Path) -> list[Path]:
    """The files that the run in a directory with our marker is known to have written, in the order of their removal."""
    found = []
    for folder in _folders(run / "checkpoints", _CHECKPOINT.fullmatch):
        found += checkpoint_files(folder)
    for folder in _folders(run, re.compile(r"baseline-.+").fullmatch):
        if marked(folder):
            found += [*written(folder), folder / STATE / "marker.json"]
    found += [run / BEST / name for name in below(run / BEST) if _OF_BEST.fullmatch(name)]
    for name, pattern in OF_TRACKERS.items():
        found += [run / name / below for below in below(run / name) if re.fullmatch(pattern, below)]
    found += [run / name for name in REPORTS if made_by_report(run / name)]
    found += [run / f".{name}.draft" for name in files(run)] + [run / name for name in files(run)]
    return [path for path in found if inside(run, path) and (not path.is_symlink() or path.relative_to(run).parts[0] == "wandb")]


def made_by_report(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    raw = path.read_bytes()  # the mark of a page is in its head, that of tables in their last line
    return REPORT_MARK.encode() in raw[:1000] + raw[-100:]


def _folders(parent: Path, matches: Callable[[str], object]) -> list[Path]:
    """The real directories directly in one."""
    if parent.is_symlink() or not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if matches(path.name) and path.is_dir() and not path.is_symlink())


def others(run: Path, ours: Iterable[Path]) -> list[str]:
    """What of a run directory is not among `ours`, as relative names; a directory without any of ours by its name alone."""
    keep = set(ours)
    holding = {parent for path in keep for parent in path.parents}

    def look(folder: Path) -> Iterator[str]:
        for path in sorted(folder.iterdir()):
            if path in holding and not path.is_symlink():
                yield from look(path)
            elif path not in keep and path != run / STATE and not _is_empty_own(run, path):
                yield path.relative_to(run).as_posix() + ("/" if path.is_dir() and not path.is_symlink() else "")

    return list(look(run))


def _is_empty_own(run: Path, path: Path) -> bool:
    """A directory that a killed run has left without a file in it."""
    own = path == run / "checkpoints" or path.parent == run / "checkpoints" and _CHECKPOINT.fullmatch(path.name)
    return bool(own) and path.is_dir() and not path.is_symlink() and not below(path)


def clear(run: Path) -> list[str]:
    """Remove what the run in a directory with our marker has written; what is left, as it is somebody else's."""
    ours = written(run)
    left = others(run, ours)
    remove(run, ours)
    for folder in _folders(run / "checkpoints", _CHECKPOINT.fullmatch):
        remove_checkpoint(folder)
    if not (run / "checkpoints").is_symlink():
        _remove_if_empty(run / "checkpoints")
    return left


def in_the_way(run: Path, files: Iterable[str], folders: Iterable[str], going: Iterable[Path] = ()) -> Path | None:
    """The first of what a new run would write and somebody else has put there; `going`: files that are removed before.

    In a directory without our marker that is anything with such a name, in one with it what is a link, or of another kind.
    """
    going, ours = set(going), marked(run)
    for path in (run / name for name in files):
        if (path.exists() or path.is_symlink()) and path not in going:
            return path
    for path in (run / name for name in folders):
        if path.is_symlink() or (path.exists() and not (ours and path.is_dir())):
            return path
    return None
