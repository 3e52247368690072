"""The state of gossip beside a trainer's own checkpoint: `peer-K/checkpoint-40/dfl.safetensors`.

It is written last, so that a checkpoint that has it is whole; and it says of which peer of which run it is.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dfl.script.joining import Peer
from dfl.transport.agreement import together

NAME = "dfl.safetensors"


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """All or nothing. OSError for a disk that is full."""
    about = {key: value for key, value in state.items() if key != "tensors"}
    draft = folder / f".{NAME}.draft"
    try:
        save_file(dict(state["tensors"]), str(draft), metadata={"dfl": json.dumps(about)})
    except SafetensorError as error:
        raise OSError(f"{str(folder / NAME)!r} could not be written: {error}") from error
    os.replace(draft, folder / NAME)


def read(folder: Path) -> dict[str, Any]:
    """What `save` was given. ValueError for a checkpoint without it, or with one that is damaged."""
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"checkpoint {str(folder)!r} holds no state of gossip ({NAME}): it was not saved by a patched trainer; "
                         "allowed: one that was, or training from the start")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads(file.metadata()["dfl"])
            return about | {"tensors": {name: file.get_tensor(name) for name in file.keys()}}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None


def choose(peer: Peer, given: str | os.PathLike | bool | None, own: Path) -> Path | None:
    """The checkpoint that this peer goes on from; all peers choose together, and go on from the same step.

    given: what the trainer was told; True: the newest step of which every peer has a whole checkpoint; a path: that checkpoint,
    or the one of its name in this peer's own folder. ValueError on all peers where there is none.
    """
    if given is None or given is False:
        name = ""
    elif given is True:
        name = _newest(peer, own)
    else:
        name = Path(given).name
    found = None if not name else own / name if (own / name / NAME).is_file() or given is True else Path(os.fspath(given))  # type: ignore[arg-type]
    told = [data.decode() for data in peer.transport.share(name.encode())]
    other = next((k for k, one in enumerate(told) if one != told[0]), None)
    if other is not None:
        raise ValueError(f"peer {other} goes on from {told[other] or 'the start'}, and peer 0 from {told[0] or 'the start'}; all go "
                         "on from the same step")
    return found


def _newest(peer: Peer, own: Path) -> str:
    steps = sorted(int(folder.name.removeprefix("checkpoint-")) for folder in own.glob("checkpoint-*")
                   if (folder / NAME).is_file() and folder.name.removeprefix("checkpoint-").isdecimal())
    told = [set(json.loads(data)) for data in peer.transport.share(json.dumps(steps).encode())]
    common = set.intersection(*told)

    def newest() -> str:
        if not common:
            raise ValueError(f"no step has a whole checkpoint of every peer (peer 0: {sorted(told[0]) or 'none'}; here, in "
                             f"{str(own)!r}: {steps or 'none'}); resume_from_checkpoint = True goes on from one")
        return f"checkpoint-{max(common)}"

    return together(peer.transport, newest)
