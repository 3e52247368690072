"""`dfl eval`: a run, a checkpoint or one model again, on the run's own evaluation examples or on any file."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfl import extensions, tasks
from dfl.config import Config, resolve
from dfl.config.recipes import parse_overrides
from dfl.metrics.choice import choose
from dfl.metrics.evaluator import in_batches
from dfl.metrics.tally import Tally
from dfl.plugins import lookup
from dfl.run import workers
from dfl.run.build import Loaded, adapt, assemble, check, data_seed, load
from dfl.run.loop import evaluate
from dfl.run.runtime import Worker, choose_device, num_threads, place_from_environment, start
from dfl.run.train import restore
from dfl.seeds import derive
from dfl.store import targets
from dfl.store.records import finite, join
from dfl.store.runs import read_config
from dfl.store.targets import ADAPTER_CONFIG, Target
from dfl.training.executors import autocasts
from dfl.transport import Transport


def evaluate_target(path: Path, overrides: Sequence[str] = (), *, data: str | None = None, run: Path | None = None,
                    peer: str | None = None, rounds: int | None = None, predictions: Path | None = None,
                    spread: bool = False) -> dict | None:
    """Evaluate what `path` names; None but on process 0.

    data: a file of examples in place of the run's own. run: the run whose examples and columns an exported model is given.
    peer: one model of a run or checkpoint. rounds: the checkpoint of a run. predictions: a file for a line per example.
    spread: over processes of its own, as many as there are cores.
    ValueError for what does not fit together.
    """
    target = targets.find(path)
    targets.check_examples(run or target.run, data)
    whole = target.kind in ("run", "checkpoint")
    if not whole and (peer is not None or rounds is not None):
        raise ValueError(f"--peer and --round choose among the models of a run; {str(path)!r} is one model")
    if rounds is not None and target.kind == "checkpoint":
        raise ValueError(f"--round {rounds}: {str(path)!r} is a checkpoint already")
    if predictions is not None and not predictions.absolute().parent.is_dir():
        raise ValueError(f"--predictions {str(predictions)!r}: its folder does not exist")
    if not whole:
        return evaluate_model(target, overrides, data, run, predictions)
    if target.run is None:
        raise ValueError(f"{str(path)!r} is a checkpoint outside of its run, whose recipe.yaml should be two folders above it")
    checkpoint = target.checkpoint or targets.choose_checkpoint(target.run, rounds)
    if peer is not None:
        one = Target("adapter", targets.adapter_of(checkpoint, peer), target.run, checkpoint)
        return evaluate_model(one, overrides, data, run, predictions)
    if predictions is not None:
        raise ValueError("--predictions are of one model: add --peer with a number, or --peer consensus")
    return evaluate_run(target.run, overrides, checkpoint=checkpoint, data=data, spread=spread)


def evaluate_run(output: Path, overrides: Sequence[str] = (), *, checkpoint: Path | None = None,
                 data: str | None = None, spread: bool = False) -> dict | None:
    """All peers and the consensus model of a run's checkpoint: the same numbers as in its record, or those on the file `data`."""
    config = in_one_process(read_config(output, overrides))
    topology = check(config)
    folder = checkpoint or targets.choose_checkpoint(output)
    names = None if data is None else label_names(output)

    def work(worker: Worker | None) -> dict | None:
        return _evaluate_run(config, topology, folder, data, names, worker)

    return workers.run(workers.count(config, automatic=spread), work)


def in_one_process(config: Config) -> Config:
    """With the whole base model in every process."""
    return config.model_copy(update={"processes_per_peer": 1})


def _evaluate_run(config: Config, topology, folder: Path, data: str | None, names, worker: Worker | None) -> dict | None:
    runtime = start(config, worker)
    try:
        loaded = load(config, runtime.device) if data is None else _load_file(config, runtime.device, names, data)
        run = assemble(config, runtime, loaded, topology, folder)
        restore(run, folder)
        result = _of_all(runtime.transport, evaluate(run), run.peers.ids)
    except BaseException as error:
        runtime.transport.leave(error)
        raise
    runtime.transport.close()
    return result and {"checkpoint": str(folder), "round": run.completed, "examples": len(loaded.bundle.valid), **finite(result)}


def _of_all(transport: Transport, result: dict, hosted: Sequence[int]) -> dict | None:
    """On process 0 the result with the values of all peers, None elsewhere."""
    told = transport.share(json.dumps({"hosted": list(hosted), **result}).encode())
    first, *others = map(json.loads, told)
    return join(first, others) if transport.rank == 0 else None


def _load_file(config: Config, device: torch.device, names: list[str], file: str) -> Loaded:
    """The model with the examples of a file. No peer trains on them, so all of them may stand as everybody's."""
    bundle = tasks.load_file(config.model, config.data, names, file, seed=derive(config.seed, "head"))
    return adapt(config, bundle, [np.arange(len(bundle.train))] * config.peers, device)


def label_names(run: Path) -> list[str]:
    """The labels that a run was trained on; the training data are not asked."""
    return targets.read_json(run / "run.json")["facts"]["label_names"]


def evaluate_model(target: Target, overrides: Sequence[str], data: str | None, run: Path | None,
                   predictions: Path | None) -> dict | None:
    """One adapter or one whole model, as stock transformers and PEFT load it. Of several processes the first does it all."""
    run = run or target.run
    if run is None and data is None:
        raise ValueError(f"{str(target.folder)!r} holds no examples: give --data FILE, or --run RUN for the run's own")
    config, names = settings(target, overrides, run)
    extensions.load(config.plugins)
    choose(config.eval, lookup("model.task", tasks.TASKS, config.model.task.name), 2)
    place = place_from_environment()
    if place.rank != 0:
        return None
    device = choose_device(config, place)
    torch.set_num_threads(num_threads(config))
    bundle = _examples(config, names, data)
    model = with_adapter(bundle.model, target.folder) if target.kind == "adapter" else bundle.model
    tally = Tally(choose(config.eval, bundle.task, len(names)), len(bundle.valid))
    row, answers = _score(model.to(device).eval(), bundle, tally, config, device)
    result = {"target": str(target.folder), "examples": len(bundle.valid), **tally.values(row)[0]}
    if predictions is not None:
        rows = prediction_rows(bundle.valid, answers, config)
        predictions.write_text("".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        result["predictions"] = str(predictions)
    return finite(result)


def _examples(config: Config, names: list[str], data: str | None) -> tasks.Bundle:
    seed = derive(config.seed, "head")
    if data is not None:
        return tasks.load_file(config.model, config.data, names, data, seed=seed)
    return tasks.load(config.model, config.data, seed=seed, data_seed=data_seed(config))


def settings(target: Target, overrides: Sequence[str], run: Path | None) -> tuple[Config, list[str]]:
    """The configuration under which one model is evaluated, and its labels: those of the run, or what the folder tells.

    The model is the target's: the base of an adapter, or the folder itself.
    """
    told = targets.about(target.folder) if run is None or (target.folder / targets.ABOUT).is_file() else {}
    if run is not None:
        tree, names = read_config(run).to_dict(), label_names(run)
    else:
        tree, names = {"model": told["model"], "data": told["data"], "eval": told.get("eval", {})}, told["label_names"]
    if target.kind == "model":
        tree["model"] = (told["model"] if told else {"task": tree["model"]["task"]}) | {"name": str(target.folder.resolve())}
    elif run is None:
        base = targets.read_json(target.folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        tree["model"] = told["model"] | {"name": str(base)}
    return resolve(tree, parse_overrides(list(overrides))), names


def with_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Stock PEFT's model. ValueError for an adapter that does not fit, where PEFT would leave parts as they were drawn."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            return PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # RuntimeError for shapes, ValueError for names, OSError, KeyError: it does not fit
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{str(folder)!r} cannot be loaded on this base model: {said}") from error


@torch.no_grad()
def _score(model: torch.nn.Module, bundle: tasks.Bundle, tally: Tally, config: Config,
           device: torch.device) -> tuple[torch.Tensor, list[dict]]:
    """The tally's row (1, ...) of all examples, in the order and type of a run's evaluation; what the model says to each example."""
    task, split = bundle.task, bundle.valid
    added, answers = torch.zeros(1, tally.width, dtype=torch.float64), [{}] * len(split)
    kept = torch.zeros(1, len(split), tally.kept_width, dtype=torch.float64)
    for chunk in in_batches(split, config.eval.batch_size):
        batch = {key: value.to(device) for key, value in task.collate([split.features[i] for i in chunk]).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocasts(config.train.autocast, device)):
            batch = _with_reference(model, task, batch)
            output = model(**task.inputs(batch))
        outcome = task.outcome(output, batch)
        added += tally.of_batch(outcome, 1, None).cpu()
        if tally.kept:
            kept[:, chunk] = tally.of_examples(outcome, 1).cpu()
        for i, answer in zip(chunk, task.answers(output, batch), strict=True):
            answers[i] = answer
    return torch.cat([added, kept.flatten(1)], 1), answers


def _with_reference(model: torch.nn.Module, task: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the base model says, where the task asks. ValueError for a whole model, in which the base is no more."""
    if not getattr(task, "needs_reference", False):
        return batch
    if not hasattr(model, "disable_adapter"):
        raise ValueError(f"model.task = {task.name!r} compares a model with its base, which a merged model holds no more; give the "
                         "adapter, or --model.task causal_lm")
    with model.disable_adapter():
        return {**batch, "reference": task.score(model(**task.inputs(batch)), batch)}


def prediction_rows(split: tasks.Split, answers: list[dict], config: Config) -> list[dict]:
    """A row per example, in the order of the file: its line, its texts, its label and what the model says."""
    fields = {name: split.columns[name] for name in (config.data.text, config.data.pair, config.data.prompt, config.data.response,
                                                     config.data.image) if name in split.columns}
    rows = []
    for i, answer in enumerate(answers):
        row = {"line": split.lines[i], **{name: values[i] for name, values in fields.items() if isinstance(values[i], str)}}
        if split.label_names:
            label, said = split.label_names[split.labels[i]], split.label_names[answer["prediction"]]
            row |= {"label": label, "prediction": said, "correct": said == label}
        rows.append(row | {key: value for key, value in answer.items() if key not in row})
    return rows
