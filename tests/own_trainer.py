"""For torchrun: the peers of a recipe by a stock transformers.Trainer, patched, on the batches that `dfl train` gives them.

    torchrun --nproc-per-node 3 tests/own_trainer.py RECIPE OUTPUT      writes OUTPUT/row-K.pt, the factors of peer K as a row
"""

import sys
from pathlib import Path

import dfl.hf


def main(recipe: str, output: str) -> None:
    from dfl.config.recipes import read_yaml
    tree = read_yaml(Path(recipe))
    words = {key: tree[key] for key in ("method", "topology", "seed", "peers") if key in tree}
    peer = dfl.hf.join(output=output, every=tree["train"]["local_steps"], train__state=tree["train"]["state"], **words)

    import torch
    from transformers import Trainer, TrainingArguments

    from dfl.adapters.attach import bind
    from dfl.config import load
    from dfl.run.build import data_seed
    from dfl.run.build import load as load_all
    from dfl.training.stream import DataStream

    config = load(recipe)
    loaded = load_all(config, torch.device("cpu"))
    train, adapted = config.train, loaded.adapted
    stream = DataStream(loaded.parts[peer.rank], train.batch_size, data_seed(config), peer.rank)
    steps = train.rounds * train.local_steps
    examples = [loaded.bundle.train.features[int(i)] for number in range(steps) for i in stream.batch(number)]
    bind(adapted, adapted.start.clone(), trains=frozenset({"A", "B"}))
    args = TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=train.batch_size, learning_rate=train.lr, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=train.clip, optim="adamw_torch", report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True, train_sampling_strategy="sequential", remove_unused_columns=False)
    trainer = Trainer(adapted.model, args, data_collator=loaded.bundle.task.collate, train_dataset=examples)
    dfl.hf.patch(trainer)
    trainer.train()
    row = torch.cat([p.detach().flatten() for sites in ([s.a for s in adapted.sites], [s.b for s in adapted.sites]) for p in sites])
    torch.save(row, Path(output) / f"row-{peer.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
