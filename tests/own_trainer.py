"""For torchrun: the peers of a recipe by a stock transformers.Trainer, patched, on the batches that `dfl train` gives them.

    torchrun --nproc-per-node 3 tests/own_trainer.py RECIPE OUTPUT      writes OUTPUT/row-K.pt, the factors of peer K as a row

With processes_per_peer: 2 in the recipe the trainers of two processes are one peer, and row-K-1.pt is what the second one has.
OUTPUT STEPS: saves behind so many steps, and the last process is killed in the next; OUTPUT resume: goes on from there.
With the word parts behind it the processes of a peer hold the model in parts, by FSDP2, for which accelerate is told that the CPUs
are GPUs.
"""

import os
import signal
import sys
import time
from pathlib import Path

import dfl.hf


def main(recipe: str, output: str, how: str = "", parts: str = "") -> None:
    from dfl.config.recipes import read_yaml
    tree = read_yaml(Path(recipe))
    words = {key: tree[key] for key in ("method", "topology", "seed", "peers") if key in tree}
    words |= {"processes_per_peer": tree.get("processes_per_peer", 1)}
    peer = dfl.hf.join(output=output, every=tree["train"]["local_steps"], train__state=tree["train"]["state"], **words)

    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from dfl.adapters.attach import bind
    from dfl.config import load
    from dfl.hf.resume import NAME
    from dfl.run.build import data_seed
    from dfl.run.build import load as load_all
    from dfl.training.stream import DataStream
    from dfl.transport.shards import whole

    class Killed(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **others):
            if state.global_step == int(how) and peer.rank == peer.size - 1 and peer.member == peer.members - 1:
                saved = [Path(output, f"peer-{k}", f"checkpoint-{how}", NAME) for k in range(peer.size)]
                while not all(path.is_file() for path in saved):  # the launcher ends the others as well
                    time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)

    config = load(recipe)
    loaded = load_all(config, torch.device("cpu"))
    train, adapted = config.train, loaded.adapted
    stream = DataStream(loaded.parts[peer.rank], train.batch_size, data_seed(config), peer.rank)
    steps = train.rounds * train.local_steps
    examples = [loaded.bundle.train.features[int(i)] for number in range(steps) for i in stream.batch(number)]
    bind(adapted, adapted.start.clone(), trains=frozenset({"A", "B"}))
    args = TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=train.batch_size // peer.members, learning_rate=train.lr,
        weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=train.clip, optim="adamw_torch", report_to="none", use_cpu=True,
        save_strategy="steps" if how else "no", save_steps=int(how) if how.isdecimal() else steps, logging_steps=1,
        disable_tqdm=True, train_sampling_strategy="sequential", remove_unused_columns=False,
        **({"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}} if parts else {}))
    if parts:
        from accelerate.state import DistributedType, PartialState
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(adapted.model, args, data_collator=loaded.bundle.task.collate, train_dataset=examples)
    dfl.hf.patch(trainer)
    if how.isdecimal():
        trainer.add_callback(Killed())
    trainer.train(resume_from_checkpoint=how == "resume")
    assert trainer.accelerator.num_processes == peer.members
    factors = [adapted.kind.layers.factors(site.module) for site in adapted.sites]
    assert not parts or all(p.to_local().numel() < p.numel() for pair in factors for p in pair)
    row = torch.cat([whole(p.detach()).flatten() for both in zip(*factors, strict=True) for p in both])
    torch.save(row, Path(output) / f"row-{peer.rank}{f'-{peer.member}' if peer.member else ''}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
