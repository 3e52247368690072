"""What a checkpoint of a run holds, and the way back from one."""

import json
from pathlib import Path

import torch

from dfl.engine import state as trees
from dfl.run.build import bases_of
from dfl.run.checkpoint import Checkpointer, read_state
from dfl.run.loop import Pending, Run
from dfl.run.pace import SaveClock
from dfl.store.manifest import verify
from dfl.store.records import finite

# a stop asked for by a signal: "try again later", as in sysexits.h
STOPPED = 75


def clock_of(run: Run) -> SaveClock:
    """For checkpoints of rows, two moments and adapters, in float32."""
    chosen = run.config.checkpoint
    return SaveClock(None if chosen.every else chosen.minutes, 16 * run.config.peers * run.peers.layout.size)


def save(run: Run, saver: Checkpointer, alone: bool = False) -> Path:
    """A checkpoint of the state after `run.completed` rounds, together with the other processes; its folder. alone: without the
    consensus model, which takes all of them."""
    merged = None if alone else run.consensus()
    tensors = trees.flatten(run.gossip.state) | run.peers.state_tensors()
    if run.pending is not None:
        about = _as_tensor({name: value for name, value in run.pending._asdict().items() if name != "table"})
        for row, peer in enumerate(run.peers.ids):
            tensors |= {f"pending.{peer}.row": run.pending.table[row], f"pending.{peer}.about": about}
    if run.config.lora.start == "gradient" and 0 in run.peers.ids:
        tensors["bases.0"] = run.peers.adapted.cores.bases
    return saver.save(run.completed, run.peers.adapted, run.peers.ids, run.peers.x, run.rows(), tensors,
                      (merged, run.consensus_is) if saver.transport.rank == 0 and not alone else None)


def restore(run: Run, folder: Path) -> None:
    """Go on from a checkpoint, whatever number of processes wrote it. ValueError where its adapters lie between other bases."""
    run.completed = verify(folder)
    if run.config.lora.start == "gradient" and not torch.equal(run.peers.adapted.cores.bases, bases_of(folder)):
        raise ValueError(f"checkpoint {folder} has other bases than the run that is to go on from it (lora.start = 'gradient')")
    found = read_state(folder, run.peers.ids)
    for row, peer in enumerate(run.peers.ids):
        run.peers.x[row] = found[f"x.{peer}"].to(run.peers.device)
    slots = {name: value for name, value in found.items() if name.partition(".")[0] in run.gossip.state}
    run.gossip.restore(placed(trees.unflatten(slots), run.gossip.state, run.peers.device))
    run.merged = None
    in_part = any(name.startswith("part.") for name in found)
    last = run.completed if in_part else run.completed - 1
    run.peers.load_state(found, run.gossip.plans(last)[0].trains if last >= 0 else frozenset())
    run.resumed = True
    about = found.get(f"pending.{run.peers.ids[0]}.about")  # of process 0 what peer 0 has
    if about is not None:
        table = torch.stack([found[f"pending.{peer}.row"] for peer in run.peers.ids])
        run.pending = Pending(table, **json.loads(bytes(about.numpy())))


def placed(tree: trees.Tree, fresh: trees.Tree, device: torch.device) -> trees.Tree:
    """What was remembered, where the round looks for it: as in the state of a run that has not begun, else with the rows, but for what
    a message has beside its numbers, and who has got it, which is the host's."""
    def home(slot: str, key: str, name: str) -> torch.device:
        like = fresh.get(slot, {}).get(key, {}).get(name)
        if like is not None:
            return like.device
        return torch.device("cpu") if name.startswith(("meta.", "numel.")) or name == "known" else device

    return {slot: {key: {name: value.to(home(slot, key, name)) for name, value in state.items()} for key, state in held.items()}
            for slot, held in tree.items()}


def _as_tensor(record: dict) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(finite(record)).encode()), dtype=torch.uint8)
