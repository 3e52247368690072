"""The job that every system does: docstrings told apart by the first layers of MiniLM, with LoRA by PEFT, in a plain PyTorch loop.

All trained numbers lie in one vector, so that a system that sends vectors packs nothing.
"""

import os

import torch
from torch import Tensor, nn

from dfl.config import resolve
from dfl.run import build

PEERS, LOCAL_STEPS, BATCH, LR = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_STEPS"]), 8, 2e-3
EVERY = max(1, LOCAL_STEPS)  # steps of the optimiser in a round
RECIPE = {
    "peers": PEERS, "seed": 0, "method": "lora", "topology": "ring", "partition": "iid", "baseline": None, "threads": 1,
    "model": {"name": "minilm", "task": "sequence_classification", "layers": 2, "dropout": 0.0, "head_std": 0.1},
    "data": {"source": "docstrings", "max_length": 40, "max_train": 4000, "max_valid": 300},
    # 96 x (384 + 384) numbers for two matrices of two layers: 1.18 MB, as LoRA of rank 8 on a model of 100 M
    "lora": {"rank": 96, "alpha": 192, "targets": ["query", "value"], "head": "frozen"},
    "train": {"local_steps": EVERY, "batch_size": BATCH, "lr": LR}, "eval": {"every": 0},
}


class Job:
    """A peer of the job. vector (D,): its trained numbers, which the model's parameters are views of; model: with LoRA."""

    def __init__(self, rank: int):
        config = resolve(RECIPE)
        loaded = build.load(config, torch.device("cpu"))
        self.task, self.train, self.valid = loaded.bundle.task, loaded.bundle.train, loaded.bundle.valid
        self.part, self.model = loaded.parts[rank], loaded.adapted.model
        named = [(name, p) for name, p in self.model.named_parameters() if "lora_" in name]
        self.parameters = [p.requires_grad_() for _, p in named]
        self.vector = torch.cat([p.detach().flatten() for p in self.parameters])
        for parameter, view in zip(self.parameters, self.views(), strict=True):
            parameter.data = view
        self.draw = torch.Generator().manual_seed(rank)
        self.optimizer: torch.optim.Optimizer | None = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0)
        self.model.train()

    def views(self) -> list[Tensor]:
        start, found = 0, []
        for parameter in self.parameters:
            found.append(self.vector[start:start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()
        return found

    def loss(self, model: nn.Module) -> Tensor:
        """Of the next batch."""
        chosen = torch.randint(len(self.part), (BATCH,), generator=self.draw).tolist()
        return model(**self.task.collate([self.train.features[self.part[i]] for i in chosen])).loss

    def step(self) -> None:
        self.loss(self.model).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the 300 examples kept apart that this peer's model tells right."""
        self.model.eval()
        right = 0
        for start in range(0, len(self.valid.features), 50):
            batch = self.task.collate(self.valid.features[start:start + 50])
            labels = batch.pop("labels")
            right += int((self.model(**batch).logits.argmax(-1) == labels).sum())
        self.model.train()
        return right / len(self.valid.features)
