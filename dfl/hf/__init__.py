"""Gossip with a Hugging Face or TRL trainer: `join` before its arguments are made, `patch` before it trains (README.md)."""

import os
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from dfl.config.sources import Source, tree_of
from dfl.script import joining
from dfl.script.joining import Peer

if TYPE_CHECKING:
    from transformers import Trainer

    AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

__all__ = ["Peer", "join", "patch"]


def join(config: Source = None, *, every: int | None = None, output: str | os.PathLike | bool | None = None, overwrite: bool = False,
         **words: Any) -> Peer:
    """Become one of the peers of this script, before TrainingArguments (SFTConfig, DPOConfig, ...) is made.

    Of torchrun, srun or mpirun every process is a peer, and takes its rank for itself: it meets the others in a private group, sees
    one GPU from then on, and the launcher's variables are removed, so that transformers, accelerate and TRL find a process
    that is alone. Without a launcher it is.

    config: the path of a recipe, or a mapping of its fields, which the words replace; the words are a recipe's (`method`, `rule`,
    `topology`, `schedule`, `trigger`, `codec`, `channel`, `guard`, `wrapper`, `seed`, ..., `__` for a dot). every: optimiser
    steps between two mixes, 10 where nobody says. processes_per_peer=2: every two processes are one peer, which find the
    variables of a world of two, so that a trainer runs data parallel (DDP, FSDP2) in there. output: the run's folder; None: the
    trainer's output_dir, False: no run folder. overwrite: replace the run that lies there.

    ValueError where words do not go together, or need a loop of ours, and on all processes where theirs differ; ConnectionError
    where the others do not come.
    """
    each = words.get("processes_per_peer") or tree_of(config).get("processes_per_peer") or 1
    peer = joining.join(config, every, output, overwrite, before=partial(joining.own_gpus, each=each), **words)
    if peer.members == 1:
        joining.forget_launcher()
    return peer


def patch(trainer: "AnyTrainer") -> "AnyTrainer":
    """Have a transformers.Trainer (SFTTrainer, DPOTrainer, ...) mix its LoRA factors with the other peers'; the same trainer.

    Its output_dir gets a folder for each peer, its run_name and data_seed become this peer's own. ValueError for a trainer that
    splits its model or its data over processes that are not this peer's, for one with DeepSpeed, and before `join`.
    """
    from dfl.hf.trainer import patched  # transformers takes seconds
    return patched(trainer)
