"""Golden digests: what a few rounds of every method end in, on two graphs and with both executors.

A refactor leaves them as they are. A change of numbers is a commit of its own that writes them anew and says why:

    python tests/golden.py
"""

import hashlib
import json
import platform
import tempfile
from pathlib import Path

import torch
from every_rule import digests_of, make_trees, norm_of, run_trees

FILE = Path(__file__).with_name("golden.json")
# the second graph; those that need a fixed one have it already
GRAPHS = {"edge activation": {"name": "edge_activation", "p": 0.5}, "ring": "ring"}


def machine() -> dict[str, str]:
    """What the bits of float32 products depend on."""
    return {"torch": torch.__version__.partition("+")[0], "processor": platform.machine(),
            "instructions": torch.backends.cpu.get_cpu_capability()}


def golden_trees(folder: Path) -> dict[str, dict]:
    """Every method on both graphs; the stacked executor where it can run the adapter, on the first."""
    trees = {}
    for name, tree in make_trees(folder, layers=1).items():
        if tree["topology"] == GRAPHS["edge activation"]:
            trees |= {f"{name}; {graph}": tree | {"topology": topology} for graph, topology in GRAPHS.items()}
        else:
            trees[f"{name}; {tree['topology']}"] = tree
        if tree["lora"].get("adapter") not in ("dora", "hira"):
            trees[f"{name}; stacked"] = tree | {"train": tree["train"] | {"executor": "stacked"}}
    return trees


def measure(folder: Path) -> dict[str, dict]:
    """By name: one digest of all peers' models, and their norm."""
    found = {}
    for name, run in run_trees(golden_trees(folder)):
        digest = hashlib.sha256("".join(digests_of(run).values()).encode()).hexdigest()[:32]
        found[name] = {"digest": digest, "norm": norm_of(run)}
    return found


def main() -> None:
    torch.set_num_threads(1)
    before = json.loads(FILE.read_text())["runs"] if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        after = measure(Path(folder))
    FILE.write_text(json.dumps({"machine": machine(), "runs": after}, indent=1) + "\n")
    changed = [name for name in after if after[name] != before.get(name)]
    print(f"{len(after)} runs, {len(changed)} changed", *changed, sep="\n  ")


if __name__ == "__main__":
    main()
