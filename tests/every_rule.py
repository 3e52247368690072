"""A configuration of a second for every rule and every kind of adapter, and the models that such runs end in."""

import hashlib
from pathlib import Path

import torch
from tiny_models import save
from tiny_runs import write_data

from dfl import config as configuration
from dfl import methods
from dfl.run.build import assemble, check, load
from dfl.run.loop import Hooks, Run, run_rounds
from dfl.run.runtime import start

# what a rule asks of a run, beside its name
WANTS = {"tad": {"method": {"name": "tad", "T": 1}}, "flora": {"topology": "complete"}, "fedex_choco": {"topology": "ring"},
         "fed_svd": {"topology": "ring"}, "fed_sb": {"lora": {"adapter": "sb", "rank": 2}},
         "ravan": {"lora": {"adapter": "ravan", "rank": 4, "heads": 2}}, "dora": {"lora": {"adapter": "dora", "rank": 2}},
         "hira": {"lora": {"adapter": "hira", "rank": 2}},
         "task_bank": {"lora": {"adapter": "orthogonal", "rank": 2}}}
UNEQUAL = {"rank": [1, 2, 3, 4, 4], "alpha": [2, 2, 6, 8, 4], "head": "mixed"}


def make_trees(folder: Path, layers: int = 3) -> dict[str, dict]:
    """Recipes of five peers and three rounds on a tiny model of `layers` layers in `folder`, by name."""
    save(folder / "model", "bert", layers)
    plain = {"peers": 5, "model": {"name": str(folder / "model")}, "lora": {"rank": 2},
             "data": {"source": "file", "train": str(write_data(folder)), "max_length": 16},
             "topology": {"name": "edge_activation", "p": 0.5}, "train": {"rounds": 3, "local_steps": 2, "batch_size": 4, "lr": 0.01},
             "eval": {"every": 0}, "measure": {"every": 0, "layers": 0}, "device": "cpu"}
    made = {name: plain | {"method": name} | WANTS.get(name, {}) for name in methods.METHODS}
    made |= {f"{name}, unequal ranks": plain | WANTS.get(name, {}) | {"method": name, "lora": UNEQUAL}
             for name in methods.METHODS if methods.accepts(name, "ranks")}
    made["plora, unequal slots"] = plain | {"method": {"name": "plora", "slots": [1, 2, 1, 2, 2]},
                                            "lora": {"rank": 2, "head": "mixed"}}
    made["lora, PiSSA"] = plain | {"method": "lora", "lora": {"rank": 2, "start": "pissa"}}
    heads = WANTS["ravan"]["lora"] | {"start": "gradient", "start_step": 1.0}
    made["ravan, first gradient"] = plain | {"method": "ravan", "lora": heads}
    made["fedhl, in half precision"] = plain | {"method": "fedhl", "codec": "float16"}
    made["hetlora, rounded"] = plain | {"method": "hetlora", "codec": "bfloat16", "lora": UNEQUAL}
    made["tad, rounded"] = plain | {"method": {"name": "tad", "T": 1}, "codec": "bfloat16"}
    return made


def run_trees(trees: dict[str, dict]):
    """Train all configurations one after the other in the group of this process: (name, run at its end)."""
    runtime = None
    for name, tree in trees.items():
        config = configuration.from_dict(tree)
        topology = check(config)
        runtime = runtime or start(config)
        run = assemble(config, runtime, load(config, runtime.device), topology)
        run_rounds(run, Hooks(nobody_is_rejected, lambda: None, lambda: False))
        yield name, run


def nobody_is_rejected(record: dict | None) -> None:
    assert record is None or not record.get("rejected"), record


def digests_of(run: Run) -> dict[int, str]:
    """Of what the model reads of every hosted peer, by peer."""
    rows, found = run.rows(), {}
    for row, peer in enumerate(run.peers.ids):
        residual = b"" if rows.residual is None else rows.residual[row].contiguous().numpy().tobytes()
        found[peer] = hashlib.sha256(rows.x[row].numpy().tobytes() + residual).hexdigest()
    return found


def norm_of(run: Run) -> float:
    """Of all rows together, residuals included: what a machine that rounds otherwise has to come near to."""
    rows = run.rows()
    squares = sum(part.double().square().sum() for part in (rows.x, rows.residual) if part is not None)
    return float(torch.as_tensor(squares).sqrt())
