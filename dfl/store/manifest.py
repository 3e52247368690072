"""The manifest of a checkpoint: what belongs to it, with digests, and the version of the format, of which older ones are upgraded.

    {"version": 4, "rounds": 20, "peers": 8, "absent": [],
     "contents": {"base model": ..., "training labels": ..., ...},    digests of what the run was begun with
     "sha256": {"peer-0/adapter_model.safetensors": ..., "state-0.safetensors": ..., ...},
     "self": ...}                                                     digest of all of the above

Only the files that it names are read; whatever else lies in the folder is nobody's.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

NAME, VERSION = "manifest.json", 4


class UnreadableError(ValueError):
    """A checkpoint whose files are missing, or are not those that its manifest names."""


class NewerError(ValueError):
    """A checkpoint of a format that only a later version of the project reads: not damaged, and nothing to pass over."""


class Manifest(NamedTuple):
    """rounds: completed ones. absent: peers that were not there, and have nothing in it. contents: by name, digests of
    data, partition and base model; empty where they were not saved."""

    rounds: int
    peers: int
    contents: Mapping[str, Any]
    digests: Mapping[str, str]
    absent: Collection[int] = ()

    @property
    def states(self) -> list[str]:
        """The files with the state of the peers."""
        return [name for name in self.digests if re.fullmatch(r"state-\d+\.safetensors", name)]

    def text(self) -> str:
        tree = {"version": VERSION, "rounds": self.rounds, "peers": self.peers, "absent": list(self.absent),
                "contents": dict(self.contents), "sha256": dict(self.digests)}
        return json.dumps(tree | {"self": _digest_of(tree)}, indent=1)


def _digest_of(tree: Mapping[str, Any]) -> str:
    whole = {key: value for key, value in tree.items() if key != "self"}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _from_1(tree: dict) -> dict:
    """The first version named neither itself nor the peers, and had no digest of itself."""
    if tree.keys() != {"rounds", "sha256"}:
        raise ValueError(f"it holds {', '.join(tree)}")
    peers = {int(found[1]) for name in tree["sha256"] if (found := re.match(r"peer-(\d+)/", name))}
    return {"version": 3, "rounds": tree["rounds"], "peers": len(peers), "contents": {}, "sha256": tree["sha256"]}


def _from_2(tree: dict) -> dict:
    """The same, of a run whose recipe named its method under `rule` (`dfl.config.recipes.upgraded`); what was saved is as it was."""
    return tree | {"version": 3}


def _from_3(tree: dict) -> dict:
    """The same, when all peers were there."""
    return tree | {"version": 4, "absent": []}


# version k -> a tree of version k + 1 from one of version k; the files beside the manifest may stay as they are, or get a key there
# that says how they are to be read
UPGRADES: dict[int, Callable[[dict], dict]] = {1: _from_1, 2: _from_2, 3: _from_3}


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint; its files are not looked at.

    UnreadableError where it is damaged or does not name the state and the adapters of all peers with their digests; NewerError.
    """
    try:
        tree = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if "version" in tree and tree["self"] != _digest_of(tree):  # so it stays in later versions
            raise ValueError("it is not what was written")
        version = _count(tree.get("version", 1), "version", 1)
        if version > VERSION:
            raise NewerError(f"checkpoint {folder} has format version {version}, and this version of dfl reads up to {VERSION}; "
                             "go on with the newer one that wrote it")
        while version < VERSION:
            tree, version = UPGRADES[version](tree), version + 1
        return _checked(tree, folder)
    except NewerError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableError(f"checkpoint {folder} has no readable manifest: {_said(error)}") from None


def _said(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _checked(tree: dict, folder: Path) -> Manifest:
    digests, peers = tree["sha256"], _count(tree["peers"], "peers", 1)
    rounds = _count(tree["rounds"], "rounds", 0)
    if folder.name != folder_name(rounds):
        raise ValueError(f"it is of round {rounds}")
    for name, digest in digests.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or name == NAME:
            raise ValueError(f"it names {name!r}, which is no file of a checkpoint")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"the digest of {name} is none")
    absent = [_count(peer, "absent", 0) for peer in tree["absent"]]
    found = Manifest(rounds, peers, dict(tree["contents"]), dict(digests), absent)
    missing = missing_adapter(digests, peers, absent)
    if missing is not None or not found.states:
        raise ValueError("it names no state" if missing is None else f"it does not name {missing}")
    return found


def _count(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} = {value!r}")
    return value


def missing_adapter(names: Collection[str], peers: int, absent: Collection[int] = ()) -> str | None:
    """The first of the adapters of so many peers, but those absent, that is not among the names; None where all are."""
    wanted = (f"peer-{peer}/adapter_model.safetensors" for peer in range(peers) if peer not in absent)
    return next((name for name in wanted if name not in names), None)


def folder_name(rounds: int) -> str:
    return f"round-{rounds:05}"


def verify(folder: Path, state_only: bool = False) -> int:
    """Check all digests, or those of the run state; the number of completed rounds.

    UnreadableError names the first bad file; NewerError for a format that cannot be read here.
    """
    manifest = read(folder)
    for name in manifest.states if state_only else manifest.digests:
        path = folder / name
        if not path.is_file() or digest_of_file(path) != manifest.digests[name]:
            raise UnreadableError(f"checkpoint {folder}: {name} is missing or damaged")
    return manifest.rounds


def digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
