"""Checkpoints: a PEFT folder per peer, a consensus adapter, and the run state. Atomic; safetensors and JSON only.

    RUN/checkpoints/round-00020/peer-0/      adapter_model.safetensors, adapter_config.json (stock PEFT loads it)
                                consensus/   the same, with what it is in consensus.json
                                state-0.safetensors   rows, rule states, optimiser moments of the peers of process 0
                                manifest.json         written last: completed rounds, digests of all state files
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dfl.adapters import ADAPTER, Adapted, bind


class UnreadableError(ValueError):
    """A checkpoint whose files are missing or do not have the digests its manifest names."""


def save_adapter(folder: Path, adapted: Adapted, x: Tensor, base_name: str) -> None:
    """One row as a folder that `PeftModel.from_pretrained(base, folder)` loads."""
    folder.mkdir(parents=True)
    bind(adapted, x)
    tensors = get_peft_model_state_dict(adapted.model, adapter_name=ADAPTER, save_embedding_layers=False)
    # clones: a view must not carry the rows beside it
    save_file({name: value.detach().clone().contiguous().cpu() for name, value in tensors.items()},
              str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = adapted.model.peft_config[ADAPTER]
    was, training = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base_name, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.base_model_name_or_path, config.inference_mode = was, training


def folder_of(run: Path, rounds: int) -> Path:
    return run / "checkpoints" / f"round-{rounds:05}"


class Checkpointer:
    """Writes checkpoints of a run together with the other processes, and reads them for any number of processes."""

    def __init__(self, run: Path, transport, process: int, base_name: str, keep: int = 2):
        self.run, self.transport, self.process, self.base_name, self.keep = run, transport, process, base_name, keep

    def save(self, rounds: int, adapted: Adapted, peers: Sequence[int], x: Tensor, tensors: dict[str, Tensor],
             consensus: tuple[Tensor, str] | None) -> Path:
        """Write the state after `rounds` rounds. `consensus` is the row and a word on what it is, on process 0.

        OSError (a full disk) leaves no half checkpoint and keeps the earlier ones. All processes raise.
        """
        target = folder_of(self.run, rounds)
        draft = target.with_name(f".{target.name}.draft")
        if self.process == 0:
            shutil.rmtree(draft, ignore_errors=True)
        self.transport.agree(0)
        self._together(draft, target, lambda: self._write(draft, adapted, peers, x, tensors, consensus))
        self._together(draft, target, lambda: self._publish(draft, target, rounds) if self.process == 0 else None)
        return target

    def _together(self, draft: Path, target: Path, step: Callable[[], None]) -> None:
        """One step of every process. Where one fails none goes on, and no draft is left."""
        error = None
        try:
            step()
        except (OSError, SafetensorError) as failure:  # safetensors has its own word for a full disk
            error = failure
        if self.transport.agree(int(error is not None)):
            if self.process == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise OSError(f"checkpoint {target} could not be written: {error or 'another process failed'}") from error

    def _write(self, draft: Path, adapted, peers, x, tensors, consensus) -> None:
        draft.mkdir(parents=True, exist_ok=True)
        for row, peer in enumerate(peers):
            save_adapter(draft / f"peer-{peer}", adapted, x[row], self.base_name)
        if consensus is not None:
            save_adapter(draft / "consensus", adapted, consensus[0], self.base_name)
            (draft / "consensus" / "consensus.json").write_text(json.dumps({"consensus": consensus[1]}))
        state = {f"x.{peer}": x[row].clone().cpu() for row, peer in enumerate(peers)}
        state |= {name: value.detach().clone().contiguous().cpu() for name, value in tensors.items()}
        save_file(state, str(draft / f"state-{self.process}.safetensors"))

    def _publish(self, draft: Path, target: Path, rounds: int) -> None:
        digests = {str(p.relative_to(draft)): _digest(p) for p in sorted(draft.rglob("*")) if p.is_file()}
        _write_synced(draft / "manifest.json", json.dumps({"rounds": rounds, "sha256": digests}, indent=1))
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
        published = complete(self.run)
        # later rounds are left from before a return to an earlier checkpoint: the run has not come there yet
        later = [folder for folder in published if _rounds(folder) > rounds]
        for old in later + [folder for folder in published if folder not in later][:-self.keep]:
            shutil.rmtree(old)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def complete(run: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = (p for p in (run / "checkpoints").glob("round-*") if re.fullmatch(r"round-\d+", p.name))
    return sorted((p for p in found if (p / "manifest.json").is_file()), key=_rounds)


def _rounds(folder: Path) -> int:
    return int(folder.name.removeprefix("round-"))


def latest(run: Path) -> Path | None:
    """The newest checkpoint whose files are whole, or None. Damaged ones are passed over."""
    for folder in reversed(complete(run)):
        try:
            verify(folder)
        except UnreadableError:
            continue
        return folder
    return None


def verify(folder: Path) -> int:
    """Check all digests; the number of completed rounds. UnreadableError names the first bad file."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        rounds, digests = int(manifest["rounds"]), manifest["sha256"].items()
        if rounds != _rounds(folder):
            raise ValueError(f"it is of round {rounds}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"checkpoint {folder} has no readable manifest: {error}") from None
    for name, digest in digests:
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise UnreadableError(f"checkpoint {folder}: {name} is missing or damaged")
    return rounds


def read_state(folder: Path, peers: Sequence[int]) -> dict[str, Tensor]:
    """All tensors `x.PEER`, `rule.PEER.*` and `moments.PEER.*` of `peers`, whichever process wrote them."""
    wanted = {str(peer) for peer in peers}
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name.split(".")[1] in wanted}
    missing = wanted - {name.split(".")[1] for name in found if name.startswith("x.")}
    if missing:
        raise UnreadableError(f"checkpoint {folder} lacks peer {min(missing, key=int)}")
    return found


def rows_of(folder: Path, num_peers: int) -> Tensor:
    """X_ND of a checkpoint."""
    state = read_state(folder, range(num_peers))
    return torch.stack([state[f"x.{peer}"] for peer in range(num_peers)])
