"""What happens in a trainer's own loop: a callback that calls the gossip of this peer where a trainer calls it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dfl.hf import resume
from dfl.script.joining import Peer
from dfl.script.mixing import Mixing
from dfl.script.records import with_perplexity

# of an evaluation, what is no metric of the model
_NO_METRIC = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens", "jit_compilation_time"}


class GossipCallback(TrainerCallback):
    """The gossip of `peer` in the loop of a trainer.

    output: the run's folder, None: none. state: what the next training goes on from, of a checkpoint (`dfl.hf.resume`).
    A mix comes behind the optimiser, the scheduler and the step count, and before logging, evaluation and saving, which therefore see
    mixed factors.
    """

    def __init__(self, peer: Peer, output: str | None, examples: int | None = None):
        self.peer, self.output, self.examples = peer, output, examples
        self.state: Mapping[str, Any] | None = None
        self.mixing: Mixing | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **others):
        """All peers start from the same factors, or from their checkpoints of the same step."""
        rounds = math.ceil(state.max_steps / self.peer.config.train.local_steps)
        self.mixing = Mixing(self.peer, model, optimizer, rounds=rounds, facts=_facts(args), state=self.state, output=self.output,
                             examples=self.examples)
        self.state = None

    def on_step_begin(self, args, state, control, **others):
        if self.mixing:
            self.mixing.prepare()

    def on_pre_optimizer_step(self, args, state, control, **others):
        if self.mixing:
            self.mixing.before_step()

    def on_step_end(self, args, state, control, **others):
        if self.mixing:
            self.mixing.after_step(last=state.global_step >= state.max_steps)

    def on_log(self, args, state, control, logs=None, **others):
        if self.mixing and logs and "loss" in logs:
            self.mixing.logged(float(logs["loss"]))

    def on_evaluate(self, args, state, control, metrics=None, **others):
        if self.mixing:
            found = metrics_of(metrics or {})
            self.mixing.evaluated(with_perplexity(found) if self.mixing.config.model.task.name == "causal_lm" else found)

    def on_save(self, args, state, control, **others):
        """What the slots remember, beside the trainer's own checkpoint, which is whole by then."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        found = self.mixing and self.mixing.state()  # of all processes of a peer, which may hold the factors in parts
        if found and self.peer.speaks and folder.is_dir():
            resume.save(folder, found)

    def on_train_end(self, args, state, control, **others):
        """Wait for those that train on; then all save together. A best model that the trainer has put back stays as it is."""
        if self.mixing:
            best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            mixing, self.mixing = self.mixing, None
            mixing.finish(keep=bool(best))

    def fail(self, error: BaseException) -> None:
        """The training has ended by an error: the others are told."""
        mixing, self.mixing = self.mixing, None
        if mixing is not None:
            mixing.fail(error)
        else:
            self.peer.leave(error)


def metrics_of(found: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a trainer's evaluation by their names here: `eval_loss` is `loss`."""
    named = {key.removeprefix("eval_"): value for key, value in found.items() if key.startswith("eval_")}
    return {key: float(value) for key, value in named.items()
            if key not in _NO_METRIC and isinstance(value, (int, float)) and not key.endswith(("_runtime", "_per_second"))}


def _facts(args) -> dict[str, Any]:
    """What the run is about, for its pages: the metric that the trainer chooses its best model by, else the loss."""
    name = (args.metric_for_best_model or "loss").removeprefix("eval_")
    way = "lower" if name.endswith("loss") or args.greater_is_better is False else "higher"
    return {"primary": name, "better": {"loss": "lower", "perplexity": "lower", "entropy": "lower", name: way}}
