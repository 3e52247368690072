"""What a run has left, as objects: records, adapters and models, read from its folder. No torch before a tensor."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfl.store.directory import ENDED
from dfl.store.records import flatten, read_lines

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from dfl.config import Config


@dataclass(frozen=True)
class Result:
    """A run's folder, opened: what `dfl.train` returns, and `dfl.Result("runs/mine")` at any later time.

    It shows the folder as it was when each of its parts was first read. ValueError for a folder that holds no run.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not (self.folder / "recipe.yaml").is_file():
            raise ValueError(f"{str(self.folder)!r} holds no run (no recipe.yaml in it)")

    @cached_property
    def config(self) -> "Config":
        """The resolved configuration, a `dfl.config.Config`."""
        from dfl.store.runs import read_config
        return read_config(self.folder)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """run.json: configuration, facts of data and model, versions, hardware, commit."""
        return json.loads((self.folder / "run.json").read_text(encoding="utf-8"))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one for the evaluation before the first round, then one a round."""
        return read_lines(self.folder / "metrics.jsonl")

    def table(self) -> list[dict[str, float]]:
        """A flat row for every evaluated round, for `pandas.DataFrame`: `eval/accuracy/mean` and the like, no lists."""
        return [flatten(record) for record in self.metrics if "eval" in record]

    @property
    def rounds(self) -> int:
        """The rounds that are recorded."""
        return self.metrics[-1]["round"] if self.metrics else 0

    @property
    def finished(self) -> bool:
        """At its last round, or ended by a callback; False where a signal or an error came before."""
        return self.rounds >= self.config.train.rounds or (self.folder / ENDED).is_file()

    @property
    def baseline(self) -> "Result | None":
        """The same run without mixing, where `baseline` asked for one."""
        alone = self.folder / "baseline-local"
        return Result(alone) if (alone / "recipe.yaml").is_file() else None

    @property
    def checkpoint(self) -> Path:
        """The newest whole checkpoint. ValueError where there is none."""
        from dfl.store.targets import choose_checkpoint
        return choose_checkpoint(self.folder)

    @property
    def peers(self) -> range:
        return range(self.config.peers)

    def adapter(self, peer: int | str = "consensus") -> dict[str, "Tensor"]:
        """The PEFT state of a peer, or of the consensus, in the newest checkpoint. ValueError for no such peer."""
        from safetensors.torch import load_file
        return load_file(str(self._adapter_folder(peer) / "adapter_model.safetensors"))

    @property
    def adapters(self) -> dict[int, dict[str, "Tensor"]]:
        """The PEFT state of every peer, all of them in memory."""
        return {peer: self.adapter(peer) for peer in self.peers}

    @property
    def consensus(self) -> dict[str, "Tensor"]:
        """The PEFT state of the consensus model."""
        return self.adapter("consensus")

    def load(self, peer: int | str = "consensus") -> "PeftModel":
        """The model of a peer, or the consensus, as stock PEFT loads it: on the CPU and in evaluation mode."""
        from dfl import tasks
        from dfl.run.evaluation import with_adapter
        from dfl.seeds import derive
        seed = derive(self.config.seed, "head")
        model, _ = tasks.load_model(self.config.model, self.config.data, self._names, seed=seed)
        return with_adapter(model, self._adapter_folder(peer)).eval()

    def processor(self) -> Any:
        """The tokenizer, or image processor, that the run has used."""
        from dfl import tasks
        return tasks.load_processor(self.config.model, self.config.data, self._names)[1]

    @property
    def _names(self) -> list[str]:
        return self.facts["facts"]["label_names"]

    def _adapter_folder(self, peer: int | str) -> Path:
        from dfl.store.targets import adapter_of
        return adapter_of(self.checkpoint, str(peer))
