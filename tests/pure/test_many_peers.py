"""What a process does grows with the peers that it hosts, and not with their square: calls and table entries are counted."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
import torch

import topologies
from dfl.adapters.layout import empty_rows, make_layout
from dfl.metrics import measures
from dfl.metrics.layers import diagnose
from dfl.metrics.measures import apart, measure, of_receivers, seen
from dfl.training.hosted import HostedPeers
from dfl.training.phase import ModelTrainer
from dfl.transport import InProcess

ROOT = Path(__file__).parent.parent.parent
LAYOUT = make_layout([("q", 2, 7, 5, 1.0), ("o", 2, 4, 9, 2.0)])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("many"))


def look_at(w):
    x = empty_rows(len(w), LAYOUT.size, dtype=torch.float64)
    x.copy_(torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return seen(x, torch.from_numpy(w) @ x, w, range(len(w)), LAYOUT)


@pytest.mark.parametrize("graph", ["ring", "star", "exponential", "complete"])
def test_receivers_that_are_looked_at_apart_give_the_measures_of_all_at_once(graph, monkeypatch):
    look = look_at(topologies.build(graph, 24).matrix(0))
    whole, layers = measure(InProcess(), look, 24), diagnose(InProcess(), look, 24)
    assert apart(look.weights) == [range(24)]
    monkeypatch.setattr(measures, "FEW", 8)
    parts = apart(look.weights)
    assert [row for part in parts for row in part] == list(range(24))
    assert (len(parts) == 1) == (graph == "complete"), "where all see all, one table is the least"
    assert measure(InProcess(), look, 24) == pytest.approx(whole, rel=1e-9)
    for name, by_layer in diagnose(InProcess(), look, 24).items():
        assert by_layer == pytest.approx(layers[name], rel=1e-9, abs=1e-6), name


def test_tables_of_pairs_grow_with_the_peers_and_not_with_their_square():
    def entries(num: int) -> int:
        look = look_at(topologies.build("ring", num).matrix(0))
        return sum((len(part.before) + len(part.after)) ** 2 for part in (of_receivers(look, rows) for rows in apart(look.weights)))

    assert entries(1200) < 2.2 * entries(600)


def calls_of_steps(root, tmp_path, monkeypatch, num: int) -> int:
    """How often a local phase that may be halted asks for the steps of a peer."""
    run, _ = tiny_runs.make_run(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / f"run{num}", peers=num,
                                                      partition="iid"))
    calls, steps = [], HostedPeers.steps
    with monkeypatch.context() as patch:
        patch.setattr(HostedPeers, "steps", lambda peers, row: calls.append(row) or steps(peers, row))
        left: list[int] = []
        trainer = ModelTrainer(run.peers, run.task, run.split, run.executor)
        trainer.run(run.peers.x, run.gossip.plans(0), [None] * num, 0, halt=lambda steps: bool(left.append(steps)))
    assert left == list(range(2 * num, 0, -1)), "two steps of each peer are left at first, then one less before each step"
    return len(calls)


def test_a_step_asks_nothing_of_the_other_peers(root, tmp_path, monkeypatch):
    assert calls_of_steps(root, tmp_path, monkeypatch, 12) <= 3 * calls_of_steps(root, tmp_path, monkeypatch, 4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "nadam"])
def test_a_step_shows_the_optimiser_the_peers_that_take_it_alone(root, tmp_path, optimizer):
    run, _ = tiny_runs.make_run(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run", train__optimizer=optimizer,
                                                      train__lr_ratio__B=4.0))
    peers, before = run.peers, run.peers.x.clone()
    peers.g.fill_(0.5)
    peers.optimizer.step(0, 0, [2], frozenset({"A", "B"}))
    shown = [parameter for shared in peers.optimizer.torch.param_groups for parameter in shared["params"]]
    assert {parameter.data_ptr() for parameter in shown} == {cut.data_ptr() for cut in peers.optimizer.params[2].values()}
    moved = (peers.x != before).any(1).tolist()
    assert moved == [False, False, True, False]
    peers.optimizer.step(0, 1, [0, 1, 3], frozenset({"B"}))
    assert torch.equal(peers.x[:, run.peers.layout.groups["A"]][[0, 1, 3]], before[:, run.peers.layout.groups["A"]][[0, 1, 3]])
    rates = {shared["ratio"]: shared["lr"] for shared in peers.optimizer.torch.param_groups}
    assert rates[4.0] == pytest.approx(4 * rates[1.0])


def test_help_waits_for_nothing_but_the_command_line():
    program = "import sys; before = set(sys.modules)\nfrom dfl.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" \
              "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = done.stderr.split()
    assert "usage: dfl" in done.stdout
    assert {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) == {"dfl"}, "a package beside Python's own"
    assert len([name for name in loaded if name.startswith("dfl")]) < 25 and len(loaded) < 200, loaded
