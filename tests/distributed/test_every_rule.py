"""Every rule and every kind of adapter over several processes: the bits of one process, whatever travels."""

import pytest
from every_rule import digests_of, make_trees, run_trees
from processes import run_processes
from tiny_runs import train_worker

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, dict]:
    made = make_trees(tmp_path_factory.mktemp("rules"))
    plain = made["lora"]
    made["lora, private"] = plain | {"train": plain["train"] | {"privacy": {"noise": 0.5}}}
    made["lora, flipped"] = plain | {"data": plain["data"] | {"flipped": [0, 1, 2, 3]}}
    made["lora, some away"] = plain | {"topology": {"name": "presence", "base": "ring", "away": [[1, 0, 2], [4, 1]]}}
    return made


def worker(rank: int, trees: dict[str, dict]) -> dict[str, str]:
    """A digest of every hosted peer's model, by name of the configuration."""
    return {f"{name}, peer {peer}": digest for name, run in run_trees(trees) for peer, digest in digests_of(run).items()}


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
