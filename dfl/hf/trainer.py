"""`patch`: what a trainer must not do on its own, what every peer has for itself, and the callback that mixes."""

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.training_args import ParallelMode

from dfl.hf import resume
from dfl.hf.callback import GossipCallback
from dfl.script.joining import Peer, current
from dfl.script.sharding import DEEPSPEED, FSDP1


def patched(trainer: Any) -> Any:
    """As `dfl.hf.patch` says."""
    peer = current()
    if peer is None:
        raise ValueError("dfl.hf.join() comes first: before TrainingArguments (SFTConfig, ...) is made")
    if not isinstance(trainer, Trainer):
        raise ValueError(f"patch takes a transformers.Trainer or one of its kind, such as SFTTrainer; got a {type(trainer).__name__}")
    check(trainer, peer)
    folder = Path(trainer.args.output_dir)
    own_names(trainer, peer)
    output = str(folder) if peer.output is None else peer.output or None
    data = trainer.train_dataset
    callback = GossipCallback(peer, output, len(data) if hasattr(data, "__len__") else None)
    trainer.add_callback(callback)
    original = trainer.train

    def train(resume_from_checkpoint=None, *arguments, **named):
        try:
            checkpoint = resume.choose(peer, resume_from_checkpoint, Path(trainer.args.output_dir))
            callback.state = None if checkpoint is None else resume.read(checkpoint)
            return original(None if checkpoint is None else str(checkpoint), *arguments, **named)
        except BaseException as error:
            callback.fail(error)
            raise

    trainer.train = train
    return trainer


def check(trainer: Any, peer: Peer) -> None:
    """ValueError for a trainer that is more than one process with one model, and for what all peers would do to one place."""
    args = trainer.args
    if any(isinstance(callback, GossipCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("this trainer is patched already")
    _check_sharding(trainer, peer)
    if peer.members > 1:
        if args.parallel_mode != ParallelMode.DISTRIBUTED or args.world_size != peer.members:
            raise ValueError(f"the trainer knows of {args.world_size} process(es), and {peer.members} are this peer "
                             "(processes_per_peer); call dfl.hf.join() before TrainingArguments (SFTConfig, ...) is made")
    elif args.parallel_mode != ParallelMode.NOT_PARALLEL:
        raise ValueError(f"the trainer is {args.parallel_mode.value}: it would split its data over {args.world_size} process(es) and "
                         f"{args.n_gpu} GPU(s), or add up gradients over them; call dfl.hf.join() before TrainingArguments "
                         "(SFTConfig, ...) is made and before anything touches a GPU")
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size = True begins again in the middle, which the other peers cannot know; allowed: False")
    if args.push_to_hub and peer.size > 1:
        raise ValueError(f"push_to_hub = True: all {peer.size} peers would push into one repository; push the consensus afterwards "
                         "(dfl export OUTPUT --push OWNER/NAME)")


def _check_sharding(trainer: Any, peer: Peer) -> None:
    """ValueError for a model in parts that gossip cannot read, or that are not this peer's alone."""
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(f"the trainer uses DeepSpeed: {DEEPSPEED}")
    if not getattr(trainer.args, "fsdp", None):
        return
    if not trainer.is_fsdp_enabled:
        raise ValueError("fsdp is given, and accelerate divides no model without GPUs or with one process: it would train data "
                         "parallel, each process with all of the model; leave fsdp out, or run on GPUs (use_cpu = False) with "
                         "dfl.hf.join(processes_per_peer=...)")
    if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_config: {FSDP1}; give fsdp_config = {{'version': 2}}")
    if peer.members == 1:
        raise ValueError("the trainer uses FSDP, and one process is this peer; give dfl.hf.join(processes_per_peer=...) the processes "
                         "that hold the model together")


def own_names(trainer: Any, peer: Peer) -> None:
    """Folder, name and order of examples of this peer alone: each is process 0 to its trainer, and equal seeds would shuffle alike."""
    args = trainer.args
    before, own = str(args.output_dir), str(Path(args.output_dir) / f"peer-{peer.rank}")
    args.output_dir = own
    if str(getattr(args, "logging_dir", None) or "").startswith(before):
        args.logging_dir = own + args.logging_dir[len(before):]
    args.run_name = f"{args.run_name or Path(before).name}-peer-{peer.rank}"
    if peer.rank or args.data_seed is not None:
        args.data_seed = (args.seed if args.data_seed is None else args.data_seed) + peer.rank
        trainer.accelerator.dataloader_config.data_seed = args.data_seed
