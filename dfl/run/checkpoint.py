"""Checkpoints: a PEFT folder per peer, a consensus adapter, and the run state. Atomic; safetensors and JSON only.

    RUN/checkpoints/round-00020/peer-0/      adapter_model.safetensors, adapter_config.json (stock PEFT loads it)
                                consensus/   the same, with what it is in consensus.json
                                state-0.safetensors   rows, rule states, optimiser moments of the peers of process 0
                                manifest.json         written last: completed rounds and digests of all files (dfl/store/manifest.py)
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfl.adapters.attach import Adapted, Rows
from dfl.adapters.saving import save_adapter
from dfl.engine.state import owner
from dfl.store.checkpoints import aside, complete, folder_of, latest, remove_aside, rounds_of, tidy
from dfl.store.directory import records_of, remove_checkpoint
from dfl.store.lease import Lease
from dfl.store.manifest import NAME, Manifest, UnreadableError, digest_of_file, missing_adapter, read, verify
from dfl.transport.agreement import together

logger = logging.getLogger(__name__)


class Checkpointer:
    """Writes checkpoints of a run together with the other processes, and reads them for any number of processes."""

    def __init__(self, run: Path, transport, process: int, base_name: str, keep: int = 2, contents: Mapping[str, Any] | None = None,
                 lease: Lease | None = None, num_peers: int | None = None):
        """num_peers: of the run, where the folder is of this process alone and holds its own peers; None: it holds
        all. contents: digests, by name, of what the run was begun with; they are saved with every checkpoint.
        lease: is checked before every write and removal, on every process; without one the caller knows that nobody
        else writes there."""
        self.run, self.transport, self.process, self.base_name, self.keep = run, transport, process, base_name, keep
        self.contents, self._written, self.num_peers = dict(contents or {}), [], num_peers
        self.guard, self._fence = (lease.check, f".{lease.token[:8]}") if lease else (lambda: None, "")

    def save(self, rounds: int, adapted: Adapted, peers: Sequence[int], x: Tensor, rows: Rows, tensors: dict[str, Tensor],
             consensus: tuple[Rows, str] | None) -> Path:
        """Write the state after `rounds` rounds: trained rows x (P, D) and the models that they make. `consensus` is the rows of one
        and a word on what it is, on process 0.

        OSError (a full disk) leaves no half checkpoint and keeps the earlier ones. All processes raise.
        """
        target = folder_of(self.run, rounds)
        # a name of this run's own: a run that has lost the folder, and does not know it yet, writes into another draft
        draft = target.with_name(f".{target.name}{self._fence}.draft")
        self._together(draft, target, lambda: self._discard(draft) if self.process == 0 else None)
        num_peers = self.num_peers or self.transport.agree(max(peers)) + 1
        absent = [] if self.num_peers is None else [peer for peer in range(num_peers) if peer not in peers]
        self._together(draft, target, lambda: self._write(draft, adapted, peers, x, rows, tensors, consensus))
        digests = self._digests(draft)
        self._together(draft, target, lambda: self._publish(draft, target, rounds, num_peers, absent, digests)
                       if self.process == 0 else None)
        return target

    def _together(self, draft: Path, target: Path, step: Callable[[], None]) -> None:
        """One step of every process. Where one fails none goes on, and no draft is left."""
        def act() -> None:
            try:
                step()
            except (OSError, SafetensorError) as failure:  # safetensors has its own word for a full disk
                self.guard()  # the successor in the folder has taken the draft away
                raise OSError(f"checkpoint {target} could not be written: {failure}") from failure

        try:
            together(self.transport, act)
        except OSError:
            if self.process == 0:
                remove_checkpoint(draft)
            raise

    def _discard(self, draft: Path) -> None:
        self.guard()
        remove_checkpoint(draft)

    def _write(self, draft: Path, adapted, peers, x, rows, tensors, consensus) -> None:
        self.guard()
        draft.mkdir(parents=True, exist_ok=True)
        folders = [draft / f"peer-{peer}" for peer in peers]
        for row, folder in enumerate(folders):
            save_adapter(folder, adapted, rows.row(row), self.base_name)
        if consensus is not None:
            folders.append(draft / "consensus")
            save_adapter(folders[-1], adapted, consensus[0], self.base_name)
            (folders[-1] / "consensus.json").write_text(json.dumps({"consensus": consensus[1]}))
        state = {f"x.{peer}": x[row].clone().cpu() for row, peer in enumerate(peers)}
        state |= {name: value.detach().clone().contiguous().cpu() for name, value in tensors.items()}
        path = draft / f"state-{self.process}.safetensors"
        self.guard()
        save_file(state, str(path))
        # all of it is on the disk before the manifest is, which says that it is there
        files = [path, *(file for folder in folders for file in folder.iterdir())]
        self._written = [str(file.relative_to(draft)) for file in files]
        for written in (*files, *folders, draft):
            _sync(written)
        if (self.run / records_of(self.process)).exists():  # the records of its rounds are there when it is
            _sync(self.run / records_of(self.process))

    def _digests(self, draft: Path) -> dict[str, str]:
        """Of all files, by process 0 those that it sees: each process reads what it has written itself."""
        mine = json.dumps({name: digest_of_file(draft / name) for name in self._written}).encode()
        found = {}
        for told in self.transport.share(mine):
            of_process = json.loads(told)
            found |= {name: digest for name, digest in of_process.items() if self.process or (draft / name).is_file()}
        return dict(sorted(found.items()))

    def _publish(self, draft: Path, target: Path, rounds: int, num_peers: int, absent: list[int], digests: dict[str, str]) -> None:
        for process in range(self.transport.size):
            if f"state-{process}.safetensors" not in digests:
                raise OSError(f"process 0 does not see what {self.transport.describe(process)} wrote; the output must lie on a file "
                              "system that all processes share")
        missing = missing_adapter(digests, num_peers, absent)
        if missing is not None:
            raise OSError(f"process 0 does not see {missing}; the output must lie on a file system that all processes share")
        (draft / NAME).write_text(Manifest(rounds, num_peers, self.contents, digests, absent).text(), encoding="utf-8")
        _sync(draft / NAME)
        _sync(draft)
        self.guard()
        if target.exists():  # never a moment without either of the two: `tidy` brings it back
            remove_checkpoint(aside(target))
            os.replace(target, aside(target))
        os.replace(draft, target)
        for folder in (target.parent, self.run):
            _sync(folder)
        remove_aside(target)
        published = complete(self.run)
        # later rounds are left from before a return to an earlier checkpoint: the run has not come there yet
        later = [folder for folder in published if rounds_of(folder) > rounds]
        for old in later + [folder for folder in published if folder not in later][:-self.keep]:
            self.guard()
            remove_checkpoint(old)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # a file system that cannot do this for folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def choose(run: Path, transport) -> Path | None:
    """The checkpoint that all processes go on from, or None: process 0 finds it, and the others make sure that they see the same.

    ValueError on all of them, naming the first that does not, or when all checkpoints are damaged.
    """
    found = together(transport, lambda: _newest(run) if transport.rank == 0 else None)
    name, digest = (found.name, digest_of_file(found / NAME)) if found else ("", "")
    name, digest = transport.spread(f"{name} {digest}".encode()).decode().split(" ")
    if not name:
        return None
    folder = run / "checkpoints" / name
    together(transport, lambda: _see(folder, digest) if transport.rank else None)
    return folder


def _newest(run: Path) -> Path | None:
    tidy(run)
    found, published = latest(run), complete(run)
    if published and found is None:
        raise ValueError(f"output = {str(run)!r}: all of its {len(published)} checkpoints are damaged; "
                         "pass --overwrite to begin again")
    return found


def _see(folder: Path, digest: str) -> None:
    verify(folder, state_only=True)
    if digest_of_file(folder / NAME) != digest:
        raise UnreadableError(f"checkpoint {folder} is not the one that process 0 has found")


def read_state(folder: Path, peers: Sequence[int]) -> dict[str, Tensor]:
    """All tensors `x.PEER`, `rule.PEER.*` and `moments.PEER.*` of `peers`, whichever process wrote them."""
    wanted = set(peers)
    found: dict[str, Tensor] = {}
    for path in (folder / name for name in read(folder).states):
        with safe_open(str(path), framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if owner(name.split(".")[1]) in wanted}
    missing = wanted - {int(name.split(".")[1]) for name in found if name.startswith("x.")}
    if missing:
        raise UnreadableError(f"checkpoint {folder} lacks peer {min(missing)}")
    return found
