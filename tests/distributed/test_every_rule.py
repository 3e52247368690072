"""Every rule and every kind of adapter over several processes: the bits of one process, whatever travels."""

import hashlib

import pytest
from processes import run_processes
from tiny_models import save
from tiny_runs import train_worker, write_data

from dfl import config as configuration
from dfl import rules
from dfl.assemble import assemble, check, load
from dfl.rounds import Hooks, run_rounds
from dfl.runtime import start

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
# what a rule asks of a run, beside its name
WANTS = {"tad": {"rule": {"name": "tad", "T": 1}}, "flora": {"topology": "complete"}, "fedex_choco": {"topology": "ring"},
         "fed_svd": {"topology": "ring"}, "fed_sb": {"lora": {"adapter": "sb", "rank": 2}},
         "ravan": {"lora": {"adapter": "ravan", "rank": 4, "heads": 2}}, "dora": {"lora": {"adapter": "dora", "rank": 2}},
         "hira": {"lora": {"adapter": "hira", "rank": 2}}}
UNEQUAL = {"rank": [1, 2, 3, 4, 4], "alpha": [2, 2, 6, 8, 4], "head": "mixed"}


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("rules")
    save(folder / "model", "bert")
    plain = {"peers": 5, "model": {"name": str(folder / "model")}, "lora": {"rank": 2},
             "data": {"source": "file", "train": str(write_data(folder)), "max_length": 16},
             "topology": {"name": "edge_activation", "p": 0.5}, "train": {"rounds": 3, "local_steps": 2, "batch_size": 4, "lr": 0.01},
             "eval": {"every": 0}, "measure": {"every": 0, "layers": 0}, "threads": 1, "device": "cpu"}
    made = {name: plain | {"rule": name} | WANTS.get(name, {}) for name in rules.RULES}
    made |= {f"{name}, unequal ranks": plain | WANTS.get(name, {}) | {"rule": name, "lora": UNEQUAL}
             for name in rules.RULES if rules.accepts(name, "ranks")}
    made["plora, unequal slots"] = plain | {"rule": {"name": "plora", "slots": [1, 2, 1, 2, 2]},
                                            "lora": {"rank": 2, "head": "mixed"}}
    made["lora, PiSSA"] = plain | {"rule": "lora", "lora": {"rank": 2, "start": "pissa"}}
    heads = WANTS["ravan"]["lora"] | {"start": "gradient", "start_step": 1.0}
    made["ravan, first gradient"] = plain | {"rule": "ravan", "lora": heads}
    made["fedhl, in half precision"] = plain | {"rule": "fedhl", "codec": "float16"}
    return made


def worker(rank: int, trees: dict[str, dict]) -> dict[str, str]:
    """Train all configurations one after the other in one group: a digest of every peer's model, by name of the configuration."""
    runtime, found = None, {}
    for name, tree in trees.items():
        config = configuration.from_dict(tree)
        topology = check(config)
        runtime = runtime or start(config)
        run = assemble(config, runtime, load(config, runtime.device), topology)
        run_rounds(run, Hooks(lambda record: None, lambda: None, lambda: False))
        rows = run.peers.rows()
        for row, peer in enumerate(run.peers.ids):
            beside = b"" if rows.residual is None else rows.residual[row].numpy().tobytes()
            found[f"{name}, peer {peer}"] = hashlib.sha256(rows.x[row].numpy().tobytes() + beside).hexdigest()
    return found


def test_hosting_does_not_matter(trees):
    one = run_processes(worker, 1, trees, timeout=200)[0]
    two = run_processes(worker, 2, trees, timeout=200)
    assert len(one) == 5 * len(trees)
    together = two[0] | two[1]
    assert [name for name in one if one[name] != together[name]] == []
    # every configuration is a run of its own
    assert len(set(one.values())) > 4 * len(trees)


@pytest.mark.parametrize("name", ["lora", "fed_sb", "ravan", "dora", "hira"])
def test_processes_with_one_kind_of_adapter_belong_together(trees, tmp_path, name):
    """Each draws PEFT's own start from a generator that nobody seeds; none of that may count as the base model."""
    assert run_processes(train_worker, 2, trees[name] | {"output": str(tmp_path / "run")}) == [0, 0]
