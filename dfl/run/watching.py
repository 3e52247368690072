"""What a run does by itself at its evaluations: end when nothing gets better, keep the best models. Callbacks of our own."""

import json
import math
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from dfl.adapters.saving import save_adapter
from dfl.config import Config
from dfl.run.callbacks import Callback, Control, RunView
from dfl.store.directory import BEST
from dfl.store.records import read_lines


def own_callbacks(config: Config, base_name: str) -> list[Callback]:
    """Those that the configuration asks for."""
    found: list[Callback] = [Patience(config.eval.patience, config.eval.min_delta)] if config.eval.patience else []
    return [*found, *([KeepBest(base_name)] if config.checkpoint.best else [])]


def primary_value(evaluation: dict, metric: str) -> float:
    """Of the consensus model, or of the mean over peers where that is not evaluated."""
    value = evaluation["consensus"][metric] if "consensus" in evaluation else evaluation[metric]["mean"]
    return math.nan if value is None else value


class Patience(Callback):
    """Ends a run when `patience` evaluations in a row were not better by `min_delta` than the best before them."""

    def __init__(self, patience: int, min_delta: float):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.waited = math.nan, 0

    def on_train_begin(self, run: RunView, control: Control) -> None:
        self.best, self.waited = math.nan, 0
        if run.resumed and run.process == 0:  # what process 0 asks for holds for all
            for line in read_lines(run.output / "metrics.jsonl"):
                if "eval" in line and line["round"] <= run.round:
                    self._look(run, line["eval"])

    def on_evaluate(self, run: RunView, control: Control, evaluation: dict) -> None:
        self._look(run, evaluation)
        control.should_training_stop |= self.waited >= self.patience

    def _look(self, run: RunView, evaluation: dict) -> None:
        value = primary_value(evaluation, run.primary)
        gain = value - self.best if run.higher_is_better() else self.best - value
        if math.isnan(self.best) or gain > self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1


class KeepBest(Callback):
    """Keeps, in folders of their own, the adapter of each peer and of the consensus that was best at an evaluation."""

    def __init__(self, base_name: str):
        self.base_name = base_name

    def on_evaluate(self, run: RunView, control: Control, evaluation: dict) -> None:
        inner, metric, rows = run._run, run.primary, run._run.rows()
        for index, (peer, value) in enumerate(zip(run.peers, evaluation["peers"][metric], strict=True)):
            self._keep(run, f"peer-{peer}", value, lambda index=index: rows.row(index))
        if run.process == 0 and "consensus" in evaluation:
            # made for the evaluation; before the first round that is of any peer
            self._keep(run, "consensus", evaluation["consensus"][metric], lambda: inner.merged or rows.row(0))

    def _keep(self, run: RunView, name: str, value: float | None, model: Any) -> None:
        folder = run.output / BEST / name
        about = folder / "best.json"
        before = json.loads(about.read_text())["value"] if about.is_file() else None
        if value is None or math.isnan(value) or (before is not None and not _better(value, before, run.higher_is_better())):
            return
        draft = folder.with_name(f".{name}.{secrets.token_hex(8)}.draft")
        try:
            save_adapter(draft, run._run.peers.adapted, model(), self.base_name)
            (draft / "best.json").write_text(json.dumps({"round": run.round, "metric": run.primary, "value": value}))
            _replace(folder, draft)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _better(value: float, before: float, higher: bool) -> bool:
    return value > before if higher else value < before


def _replace(folder: Path, draft: Path) -> None:
    """File by file, the note last: whoever reads it finds the adapter that it is about."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(draft.iterdir(), key=lambda path: path.name == "best.json"):
        os.replace(path, folder / path.name)
