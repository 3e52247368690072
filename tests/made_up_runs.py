"""Run folders with made-up numbers, as a run writes them: for tests of what is read from them."""

import json
from pathlib import Path

import yaml

from dfl.config import from_dict
from dfl.store.manifest import Manifest, digest_of_file, folder_name, read
from dfl.store.records import JsonLines


def evaluation(values: list, metric: str = "accuracy", consensus=None) -> dict:
    """An `eval` of these peers; None stands for what was not finite."""
    known = [v for v in values if v is not None]
    mean = None if None in values else sum(values) / len(values)
    result = {metric: {"mean": mean, "min": min(known, default=None), "max": max(known, default=None)}, "peers": {metric: values}}
    return result | ({} if consensus is None else {"consensus": {metric: consensus}})


def record(t: int, values: list | None = None, consensus=None, metric: str = "accuracy", **more) -> dict:
    """The record of a round: 1,000 bytes and 2 seconds of work, 10 of watching."""
    found = {"round": t}
    if t:
        found |= {"trains": "A+B", "lr": 0.1, "train_loss": {"mean": 1.0 / t, "min": 0.5 / t, "max": 2.0 / t},
                  "train_loss_peers": [0.5 / t, 2.0 / t], "edges": 4, "message_bytes": 1000, "wire_bytes": 7, "control_bytes": 0,
                  "seconds": {"local": 1.5, "encode": 0.25, "exchange": 0.25, "mix": 0.0, "measure": 4.0, "evaluate": 6.0},
                  "measures": {"consensus_distance": 3.0 / t, "cross_term_relative": 0.5 / t}}
    return found | ({} if values is None else {"eval": evaluation(values, metric, consensus)}) | more


def write_run(folder: Path, records: list[dict], *, facts: dict | None = None, **fields) -> Path:
    """A run of `fields` (top-level fields of a recipe; rounds=N is train.rounds)."""
    folder.mkdir(parents=True, exist_ok=True)
    rounds = fields.pop("rounds", max((r["round"] for r in records), default=4))
    tree = {"peers": 2, "topology": "ring", "method": "lora", "output": str(folder)} | fields
    tree["train"] = {"rounds": rounds} | tree.get("train", {})
    config = from_dict(tree).to_dict()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    facts = {"primary": "accuracy", "better": {"accuracy": "higher"}} if facts is None else facts
    about = {"config": config, "facts": facts, "versions": {"torch": "2"}, "git_commit": "c0ffee"}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    lines = JsonLines(folder / "metrics.jsonl")
    for line in records:
        lines.write(line)
    lines.close()
    return folder


def write_checkpoint(run: Path, rounds: int, peers: int = 2) -> Path:
    """The files of a checkpoint, with nothing in them that could be loaded."""
    folder = run / "checkpoints" / folder_name(rounds)
    names = ["state-0.safetensors", *(f"peer-{peer}/adapter_model.safetensors" for peer in range(peers))]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    digests = {name: digest_of_file(folder / name) for name in names}
    (folder / "manifest.json").write_text(Manifest(rounds, peers, {}, digests).text())
    return folder


def sign(folder: Path) -> None:
    """The manifest of a checkpoint whose files a test has changed."""
    manifest = read(folder)
    digests = {name: digest_of_file(folder / name) for name in manifest.digests}
    (folder / "manifest.json").write_text(manifest._replace(digests=digests).text())


def write_sweep(folder: Path, runs: dict[str, dict]) -> Path:
    """The sweep.json of runs that lie in `folder` by their names: name -> fields."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [{"index": k, "name": name, "fields": fields, "output": str(folder / name)}
              for k, (name, fields) in enumerate(runs.items())]
    axes = list(dict.fromkeys(key for fields in runs.values() for key in fields))
    (folder / "sweep.json").write_text(json.dumps({"axes": axes, "runs": listed, "recipe": {}}))
    return folder
