"""`dfl.Gossip`: gossip in a plain PyTorch loop, by hooks on its optimiser."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dfl.config.sources import Source
from dfl.script.joining import Peer, current, join
from dfl.script.mixing import Mixing
from dfl.script.records import with_perplexity
from dfl.script.sharding import check_engine


class Gossip:
    """Mixes the LoRA factors of `model` with those of the other peers, every `every` steps of `optimizer`.

        with dfl.Gossip(model, optimizer, every=20, method="tad", topology="ring") as gossip:
            for batch in batches:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()          # behind every 20th, this peer mixes with its neighbours
                optimizer.zero_grad()

    Under `torchrun --nproc-per-node 4` each process is a peer; alone it is the only one. A peer whose loop ends before others' waits
    at the end of the block, and mixes on with them. rank, size: this peer, and how many there are.

    model: with LoRA by PEFT, whose parameters `optimizer` has. config: a recipe, whose fields the words replace; the
    words are a recipe's (`method`, `rule`, `topology`, `trigger`, `codec`, ..., `__` for a dot). every: optimiser steps,
    10 where nobody says. rounds: how many mixes there will be, for methods that plan by it (20 where nobody says) and for
    pages. output: a folder for records, and for the adapters of all peers and of the consensus at the end; None: none.
    overwrite: replace the run that lies there.

    A model in parts (FSDP2's fully_shard) lies on the processes of this peer alone: `dfl.hf.join(processes_per_peer=...)` comes
    before their group is made, and `state_dict` is called on all of them.

    A script that has called `dfl.hf.join` has joined already; its words stand. ValueError for words that do not go together, a
    model without LoRA, and on all peers where they differ. DivergenceError where a peer's factors are not finite; ConnectionError
    where one is gone.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, every: int | None = None, *, config: Source = None,
                 rounds: int | None = None, output: str | os.PathLike | None = None, overwrite: bool = False, **words: Any):
        joined = current()
        if joined is not None and (every is not None or config is not None or words):
            raise ValueError("this process has joined already, with words of its own; give the words to the first call alone")
        if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1):
            raise ValueError(f"rounds = {rounds!r} is not allowed; allowed: a whole number from 1, or None")
        check_engine(model, optimizer)
        self._own = joined is None
        self.peer: Peer = joined or join(config, every, output or False, overwrite, **words)
        self.model, self.optimizer, self._rounds = model, getattr(optimizer, "optimizer", optimizer), rounds
        self._output = self.peer.output if output is None else os.fspath(output)
        self._state: Mapping[str, Any] | None = None
        self._mixing: Mixing | None = None
        self._hooks: list = []

    @property
    def rank(self) -> int:
        return self.peer.rank

    @property
    def size(self) -> int:
        return self.peer.size

    @property
    def rounds(self) -> int:
        """Mixes so far."""
        return self._mixing.completed if self._mixing else int((self._state or {}).get("completed", 0))

    def shard(self, examples: Any) -> Any:
        """This peer's part of examples that all peers hold alike."""
        return self.peer.shard(examples)

    def __enter__(self) -> "Gossip":
        try:
            facts = {"open": True} if self._rounds is None else {}
            self._mixing = Mixing(self.peer, self.model, self.optimizer, rounds=self._rounds, state=self._state, output=self._output,
                                  facts=facts)
        except BaseException as error:
            self.peer.leave(error)
            raise
        mixing = self._mixing
        self._hooks = [self.optimizer.register_step_pre_hook(lambda *_: mixing.before_step()),
                       self.optimizer.register_step_post_hook(lambda *_: self._stepped())]
        return self

    def _stepped(self) -> None:
        if self._mixing is not None:
            self._mixing.after_step()

    def __exit__(self, kind, error, trace) -> None:
        for hook in self._hooks:
            hook.remove()
        mixing, self._mixing = self._mixing, None
        if mixing is None:
            return
        self._state = None
        if error is not None:
            mixing.fail(error)
            return
        try:
            mixing.finish()
        except BaseException as failure:
            mixing.fail(failure)
            raise
        if self._own:
            self.peer.leave()

    def log(self, loss: float | torch.Tensor) -> None:
        """A training loss, for the record of the round at work."""
        self._inside().logged(float(loss.detach() if isinstance(loss, torch.Tensor) else loss))

    def evaluated(self, **metrics: float) -> None:
        """What was found of this peer's mixed model since the last mix: for its record. `loss` gives `perplexity` as well."""
        self._inside().evaluated(with_perplexity({name: float(value) for name, value in metrics.items()}))

    def state_dict(self) -> dict[str, Any]:
        """What this peer needs to go on beside the states of its model and its optimiser: plain values and tensors, for torch.save."""
        return self._inside().state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, before the block begins. Each peer from its own, all from the same round; the optimiser's
        state is loaded by the script.

        ValueError inside of the block.
        """
        if self._mixing is not None:
            raise ValueError("load_state_dict inside of the block: the peers have begun together already; call it before `with`")
        self._state = state

    def _inside(self) -> Mixing:
        if self._mixing is None:
            raise ValueError("gossip has not begun, or has ended: call this inside of its `with` block")
        return self._mixing
