"""A task a peer on one model: what a bank of sparse adapters over orthogonal A keeps of every task, against plain averaging.

    DFL_DATA=... python benchmarks/many_tasks.py data --out $DFL_DATA/many_tasks   # train.tsv and valid.tsv
    DFL_DATA=... python benchmarks/many_tasks.py run --out DIR                     # goes on with the cells that are missing
    python benchmarks/many_tasks.py collect --out DIR

Peers and tasks: docstrings (5 labels), SST-2 (2), TREC-6 (6), on launch/recipes/many_tasks.yaml; each task is read by the
head of the peer that learns it, among its own labels. For every method and seed, by task in the order of TASKS: `own`, its
peer's adapter alone; `together`, what its peer has in the end (the sum of its bank, or an average); `sum`, the adapters of
all peers in one model; `routed`, the same weighed by the input, at two temperatures. What a task forgets is the accuracy of
its adapter learnt alone, less that once the others are there: added later (`sum`), or learnt beside it (`together`).

Methods: `alone`, a frozen A of each peer's own, orthogonal to the others'; `common A`, the contrast, the same frozen A for all;
`sparse, alone`, half of B; `bank`, the same, learnt beside the others' adapters; `lora`, A and B trained and averaged.
"""

import csv
import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from cells import command
from stamp import RESULTS, write

from dfl.adapters.attach import Rows
from dfl.adapters.router import forgetting, routed
from dfl.config import DataConfig, resolve
from dfl.config.recipes import read_yaml
from dfl.run import build
from dfl.run.loop import Hooks, Run, run_rounds
from dfl.run.runtime import start
from dfl.tasks import docstrings

TASKS = ("docstrings", "sst2", "trec6")  # as their names are sorted
BANK = {"name": "task_bank", "density": 0.5}
# Kaiming's rows have the length 1 / sqrt(3), those of an orthogonal A 1: as much reaches B
METHODS = {"alone": {"method": {**BANK, "density": 1.0, "forward": False}},
           "common A": {"method": "local", "lora.adapter": "lora", "lora.alpha": 64 * 3 ** 0.5, "train.lr_ratio.A": 0.0},
           "bank": {"method": BANK}, "sparse, alone": {"method": {**BANK, "forward": False}},
           "lora": {"method": "lora", "lora.adapter": "lora"}}
SUMMED = ("alone", "common A", "sparse, alone", "bank")
SEEDS, TEMPERATURES, MOST, WORDS = (0, 1), (0.1, 0.01), (2000, 200), 8
RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "many_tasks.yaml"


def tables(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    """(text, label, task) of the training and the validation examples, at most MOST of each task.

    SST-2 trains on parts of sentences of WORDS words or more: shorter ones say little of whole ones, which are the test.
    """
    train = [(row["question"], row["coarse"], "trec6") for row in read(folder / "trec6" / "train.tsv")][:MOST[0]]
    valid = [(row["question"], row["coarse"], "trec6") for row in read(folder / "trec6" / "test.tsv")][:MOST[1]]
    train += [(row["sentence"], f"sentiment {row['label']}", "sst2") for row in read(folder / "sst2" / "train.tsv.gz")
              if len(row["sentence"].split()) >= WORDS][:MOST[0]]
    valid += [(row["sentence"], f"sentiment {row['label']}", "sst2") for row in read(folder / "sst2" / "dev.tsv")][:MOST[1]]
    found = docstrings.load(DataConfig(max_train=MOST[0], max_valid=MOST[1]), masked=True)[:2]
    for rows, table in zip((train, valid), found, strict=True):
        rows += [(" ".join(text.split()), str(label), "docstrings")
                 for text, label in zip(table.columns["text"], table.columns["label"], strict=True)]
    return {"train": train, "valid": valid}


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def write_tables(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in tables(Path(os.environ["DFL_DATA"])).items():
        lines = ["text\tlabel\ttask", *("\t".join(part.replace("\t", " ").replace('"', "'") for part in row) for row in rows)]
        (out / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_cell(data: Path, method: str, seed: int) -> dict:
    fields = {"data.train": str(data / "train.tsv"), "data.valid": str(data / "valid.tsv"), "seed": seed, "processes": 1,
              "device": "cpu", "eval.every": 0, "measure.every": 0, **METHODS[method]}
    config = resolve(read_yaml(RECIPE), list(fields.items()))
    topology = build.check(config)
    runtime = start(config)
    run = build.assemble(config, runtime, build.load(config, runtime.device), topology)
    sent: dict[str, int] = {}
    run_rounds(run, Hooks(lambda record: count(sent, record or {}), lambda: None, lambda: False))
    return accuracies(run, method in SUMMED) | {"bytes": sent}


def count(sent: dict[str, int], record: dict) -> None:
    for name in ("payload_bytes", "index_bytes", "header_bytes", "messages"):
        sent[name] = sent.get(name, 0) + record.get("ledger", {}).get(name, 0)


def accuracies(run: Run, summed: bool) -> dict:
    owners, alone = owner_of_task(run), Rows(run.peers.rows().x)
    found = {"owners": owners, "own": by_task(run, lambda peer: bound(run, alone, peer)),
             "together": by_task(run, lambda peer: bound(run, run.rows(), peer))}
    if summed:
        found["sum"] = by_task(run, lambda peer: served(run, peer, None))
        found["routed"] = {str(one): by_task(run, lambda peer, one=one: served(run, peer, one)) for one in TEMPERATURES}
    return found


def owner_of_task(run: Run) -> list[int]:
    """The peer that trains on each task."""
    return [max(range(len(TASKS)), key=lambda peer: float(run.evaluator.tally.own.weights[peer, k])) for k in range(len(TASKS))]


def by_task(run: Run, serving_of: Callable[[int], AbstractContextManager]) -> list[float]:
    return [accuracy(run, serving_of(owner), task) for task, owner in enumerate(owner_of_task(run))]


@contextmanager
def bound(run: Run, rows: Rows, peer: int) -> Iterator:
    with run.executor.bound(run.peers.adapted, rows, None, [peer]) as forward:
        yield lambda batch: forward(run.task.inputs(batch), [peer])


@contextmanager
def served(run: Run, peer: int, temperature: float | None) -> Iterator:
    """All adapters, under the head of one peer."""
    order = [peer, *(other for other in range(len(TASKS)) if other != peer)]
    with routed(run.peers.adapted, run.peers.x[order], temperature) as model:
        yield lambda batch: model(**run.task.inputs(batch))


@torch.no_grad()
def accuracy(run: Run, serving: AbstractContextManager, task: int) -> float:
    """On the examples of one task, among the labels that it has."""
    run.peers.adapted.model.eval()
    parts = [{key: value[groups == task] for key, value in batch.items()}
             for batch, groups in zip(run.evaluator.batches, run.evaluator.groups, strict=True) if bool((groups == task).any())]
    labels = torch.cat([part["labels"] for part in parts]).unique()
    with serving as forward:
        right = sum(int((labels[forward(part).logits[:, labels].argmax(-1)] == part["labels"]).sum()) for part in parts)
    return right / sum(len(part["labels"]) for part in parts)


BYTES = ("payload_bytes", "index_bytes", "header_bytes")


def in_short(runs: list[dict]) -> dict:
    """By method, means over its seeds; what is forgotten against the adapter of the same kind that was learnt alone."""
    short: dict[str, dict] = {}
    for method in (method for method in METHODS if any(run["method"] == method for run in runs)):
        mine = {run["seed"]: run for run in runs if run["method"] == method}
        every = list(mine.values())
        short[method] = {
            "seeds": sorted(mine),
            **{name: average([run[name] for run in every if name in run]) for name in ("own", "together", "sum")},
            "routed": {str(one): average([run["routed"][str(one)] for run in every if "routed" in run]) for one in TEMPERATURES},
            "forgotten": forgotten(method, mine, runs),
            "bytes": {name: sum(run["bytes"][name] for run in every) / len(every) for name in (*BYTES, "messages")}}
    return short


def forgotten(method: str, mine: dict[int, dict], runs: list[dict]) -> list[float] | None:
    """Accuracy lost by task, mean over the seeds that both have."""
    reference, end = {"bank": ("sparse, alone", "together"), "lora": ("alone", "together")}.get(method, (method, "sum"))
    before = {run["seed"]: run["own"] for run in runs if run["method"] == reference}
    pairs = [(before[seed], run[end]) for seed, run in mine.items() if seed in before]
    return average([forgetting(torch.tensor(alone), torch.tensor(now)).tolist() for alone, now in pairs])


def average(rows: list[list[float]]) -> list[float] | None:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None


def table() -> str:
    """The table of benchmarks/README.md, of the committed result; percent, by task in the order of TASKS."""
    result = json.loads((RESULTS / "many_tasks.json").read_text())["results"]["in_short"]
    lines = ["| method | seeds | own | sum of all | routed (0.1) | routed (0.01) | in the end | forgotten | MB sent (bitmaps) |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for method, one in result.items():
        cells = [percent(one["own"]), percent(one["sum"]), percent(one["routed"]["0.1"]), percent(one["routed"]["0.01"]),
                 percent(one["together"]), percent(one["forgotten"])]
        sent, bitmaps = sum(one["bytes"][name] for name in BYTES) / 1e6, one["bytes"]["index_bytes"] / 1e6
        lines.append(f"| {method} | {len(one['seeds'])} | {' | '.join(cells)} | {sent:.1f} ({bitmaps:.2f}) |")
    return "\n".join(lines)


def percent(values: list[float] | None) -> str:
    return "" if values is None else " / ".join(f"{100 * value:.1f}" for value in values)


def run_cells(out: Path) -> None:
    if not (out / "data" / "valid.tsv").exists():  # the last that is written
        write_tables(out / "data")
    for method, seed in [(method, seed) for seed in SEEDS for method in METHODS]:
        stored = out / f"{method.replace(', ', '-').replace(' ', '-')}-s{seed}.json"
        if not stored.exists():
            found = run_cell(out / "data", method, seed)
            torn = stored.with_name(stored.name + ".part")
            torn.write_text(json.dumps({"method": method, "seed": seed, **found}, indent=1))
            torn.replace(stored)
            print(method, seed, found, flush=True)


def collect(out: Path) -> None:
    runs = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    write("many_tasks", {"recipe": "launch/recipes/many_tasks.yaml", "tasks": TASKS, "methods": METHODS, "seeds": SEEDS,
                         "examples": MOST, "words": WORDS}, {"in_short": in_short(runs), "runs": runs})


if __name__ == "__main__":
    torch.set_num_threads(1)
    command(__doc__, "runs/many_tasks_figures", data=write_tables, run=run_cells, collect=collect, table=table)
