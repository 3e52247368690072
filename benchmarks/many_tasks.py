"""A task a peer on one model: what a bank of sparse adapters over orthogonal A keeps of every task, against plain averaging.

    DFL_DATA=... python benchmarks/many_tasks.py data --out $DFL_DATA/many_tasks   # train.tsv and valid.tsv
    DFL_DATA=... python benchmarks/many_tasks.py run --out DIR                     # goes on with the cells that are missing
    python benchmarks/many_tasks.py collect --out DIR

Peers and tasks: TREC-6 (6 labels), SST-2 (2), docstrings (5), on launch/recipes/many_tasks.yaml; one frozen head of 13 labels.
For every method and seed the accuracy of each model on each task (rows: models, columns: tasks in the order of TASKS):
own, each peer's adapter alone; together, what each peer has in the end (the sum of its bank, or the average);
routed, the bank weighed by the input at several temperatures. `forgetting` is own less together, on a peer's own task.
"""

import argparse
import csv
import gzip
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from stamp import write

from dfl.adapters.attach import Rows
from dfl.adapters.router import forgetting, routed
from dfl.config import DataConfig, resolve
from dfl.config.recipes import read_yaml
from dfl.run import build
from dfl.run.loop import Hooks, Run, run_rounds
from dfl.run.runtime import start
from dfl.tasks import docstrings

TASKS = ("docstrings", "sst2", "trec6")  # as their names are sorted
PLAIN = {"lora.adapter": "lora", "train.lr_ratio.A": 0.125}  # a rate for B that is none for A
METHODS = {"bank": {}, "lora": {"method": "lora", **PLAIN}, "local": {"method": "local", **PLAIN},
           "bank, trained alone": {"method": {"name": "task_bank", "density": 0.5, "forward": False}},
           "bank, dense": {"method": {"name": "task_bank", "density": 1.0}}}
SEEDS, TEMPERATURES, MOST = (0, 1, 2), (0.1, 0.03), (2000, 200)
RECIPE = Path(__file__).parent.parent / "launch" / "recipes" / "many_tasks.yaml"


def tables(folder: Path) -> dict[str, list[tuple[str, str, str]]]:
    """(text, label, task) of the training and the validation examples, at most MOST of each task."""
    train = [(row["question"], row["coarse"], "trec6") for row in read(folder / "trec6" / "train.tsv")][:MOST[0]]
    valid = [(row["question"], row["coarse"], "trec6") for row in read(folder / "trec6" / "test.tsv")][:MOST[1]]
    train += [(row["sentence"], f"sentiment {row['label']}", "sst2") for row in read(folder / "sst2" / "train.tsv.gz")][:MOST[0]]
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
    sent: list[int] = []
    run_rounds(run, Hooks(lambda record: sent.append((record or {}).get("message_bytes", 0)), lambda: None, lambda: False))
    return matrices(run, method.startswith("bank")) | {"message_bytes": sum(sent)}


def matrices(run: Run, bank: bool) -> dict:
    alone = Rows(run.peers.rows().x)
    found = {"own": [accuracy(run, bound(run, alone, peer)) for peer in range(len(TASKS))],
             "together": [accuracy(run, bound(run, run.rows(), peer)) for peer in range(len(TASKS))]}
    if bank:
        found["sum"] = [accuracy(run, served(run, None))]
        found["routed"] = {str(one): accuracy(run, served(run, one)) for one in TEMPERATURES}
    owners = owner_of_task(run)
    ends = {name: torch.tensor([found[name][owners[k]][k] for k in range(len(TASKS))]) for name in ("own", "together")}
    return found | {"owners": owners, "forgetting": forgetting(ends["own"], ends["together"]).tolist()}


def owner_of_task(run: Run) -> list[int]:
    """The peer that trains on each task."""
    return [max(range(len(TASKS)), key=lambda peer: float(run.evaluator.tally.own.weights[peer, k])) for k in range(len(TASKS))]


@contextmanager
def bound(run: Run, rows: Rows, peer: int) -> Iterator:
    with run.executor.bound(run.peers.adapted, rows, None, [peer]) as forward:
        yield lambda batch: forward(run.task.inputs(batch), [peer])


@contextmanager
def served(run: Run, temperature: float | None) -> Iterator:
    with routed(run.peers.adapted, run.peers.x, temperature) as model:
        yield lambda batch: model(**run.task.inputs(batch))


@torch.no_grad()
def accuracy(run: Run, serving) -> list[float]:
    """On every task, of one model. Only the task's own labels are competed for by the data, all 13 by the model."""
    right, seen = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
    run.peers.adapted.model.eval()
    with serving as forward:
        for batch, groups in zip(run.evaluator.batches, run.evaluator.groups, strict=True):
            hits = (forward(batch).logits.argmax(-1) == batch["labels"]).float()
            right.index_add_(0, groups, hits)
            seen.index_add_(0, groups, torch.ones_like(hits))
    return (right / seen).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "run", "collect"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not os.environ.get("DFL_DATA"):
        sys.exit("set DFL_DATA to the folder with trec6/, sst2/ and minilm-l6-fp16/, as the heads of launch/recipes describe")
    torch.set_num_threads(1)
    if args.what != "collect":
        write_tables(args.out if args.what == "data" else args.out / "data")
    cells = [(method, seed) for seed in SEEDS for method in METHODS]
    for method, seed in cells if args.what == "run" else ():
        stored = args.out / f"{method.replace(', ', '-').replace(' ', '-')}-s{seed}.json"
        if not stored.exists():
            found = run_cell(args.out / "data", method, seed)
            stored.write_text(json.dumps({"method": method, "seed": seed, **found}, indent=1))
            print(method, seed, found["forgetting"], flush=True)
    if args.what == "collect":
        runs = [json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]
        write("many_tasks", {"recipe": "launch/recipes/many_tasks.yaml", "tasks": TASKS, "methods": METHODS, "seeds": SEEDS,
                             "examples": MOST}, runs)


if __name__ == "__main__":
    main()
