"""At n = 100,000 a peer finds its row without the other peers' rows: little memory, and nothing of size n."""

import ast
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import topologies

LARGE = [
    ("one_peer_exponential", 100_000, {}, 2),
    ("hypercube_matching", 2**17, {}, 2),
    ("alternating_ring", 100_000, {}, 2),
    ("random_matching", 100_000, {}, 2),
    ("od_equidyn", 100_000, {}, 2),
    ("ou_equidyn", 100_000, {}, 2),
    ("base_graph", 100_000, {"k": 1}, 2),
    ("base_graph", 100_000, {"k": 4}, 5),
    ("torus", 100_000, {}, 5),
    ("hypercube", 2**17, {}, 18),
    ("exponential", 100_000, {}, 18),
    ("grid_all_reduce", 100_000, {"group_size": 10}, 10),
    ("hierarchical", 100_000, {"node_size": 8}, 8),
    ("edge_activation", 100_000, {"p": 0.3, "base": "torus"}, 5),
]


@pytest.mark.parametrize("name, n, params, most", LARGE, ids=str)
def test_rows_of_large_networks(name, n, params, most):
    topologies.build(name, n, **params).neighbors(3, 0)
    tracemalloc.start()
    topology = topologies.build(name, n, **params)
    rows = [topology.neighbors(t, n // 3) for t in range(20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150_000, "a single vector over all peers is 800 kB"
    for row in rows:
        assert sum(row.values()) == pytest.approx(1, abs=1e-12) and 1 <= len(row) <= most


@pytest.mark.parametrize("name, n, params, most", LARGE, ids=str)
def test_both_ends_of_a_link_agree(name, n, params, most):
    topology, i = topologies.build(name, n, **params), n // 3
    for t in (0, 1, 5):
        for j, weight in topology.neighbors(t, i).items():
            if j != i:
                assert i in topology.receivers(t, j)
                if topology.symmetric:
                    assert topology.neighbors(t, j)[i] == pytest.approx(weight, abs=1e-15)
        assert all(i in topology.neighbors(t, j) for j in topology.receivers(t, i))


@pytest.mark.parametrize("name, n, params, most", LARGE, ids=str)
def test_large_networks_with_absent_peers(name, n, params, most):
    topology, alive = topologies.build(name, n, **params), np.random.default_rng(0).random(n) < 0.7
    for i in range(n // 3, n // 3 + 12):
        row = topology.neighbors(2, i, alive)
        assert sum(row.values()) == pytest.approx(1, abs=1e-12)
        assert row == {i: 1.0} if not alive[i] else all(alive[list(row)])


def test_base_graph_is_doubly_stochastic_in_the_large():
    """Mass is kept along links: what i takes from j, j takes from i, for digits of every kind."""
    for n, k in ((99_999, 1), (100_000, 2), (3**10 + 1, 2), (243 + 7, 2), (1000, 9)):
        topology = topologies.build("base_graph", n, k=k)
        for t in range(0, topology.period, 3):
            for i in (0, 1, n // 2, n - 2, n - 1):
                for j, weight in topology.neighbors(t, i).items():
                    assert topology.neighbors(t, j)[i] == pytest.approx(weight, abs=1e-12)


def test_nothing_here_imports_torch_or_dfl():
    root = Path(topologies.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            assert not {str(module).split(".")[0] for module in modules} & {"torch", "dfl"}, path


@pytest.mark.long
def test_numpy_and_networkx_are_enough():
    """Building, rows and dense spectra without scipy, matplotlib or cvxpy; what needs them says which extra to install."""
    code = """
import sys
for package in ("scipy", "scipy.sparse", "matplotlib", "cvxpy", "clarabel", "scs"):
    sys.modules[package] = None
import topologies
from topologies import spectrum
for weights in ("metropolis", "best_constant", "sinkhorn"):
    spectrum.slem(topologies.build("tree", 12, weights=weights).matrix(0))
plain = topologies.build("matcha", 12, optimise=False), topologies.build("matcha", 12, budget=1.0)
spectrum.contraction(plain[0]), spectrum.contraction(plain[1]), spectrum.slem(topologies.build("ring", 5000))
optima = ("fdla", "fastest_mixing_chain", "link_reliability")
wishes = [lambda rule=rule: topologies.build("tree", 12, weights=rule) for rule in optima]
wishes += [lambda: topologies.build("matcha", 12), lambda: spectrum.slem(topologies.build("tree", 900))]
for call in (*wishes, lambda: __import__("topologies.draw").draw.matplotlib_figure()):
    try:
        call()
    except (ValueError, ImportError) as error:
        print(error)
from topologies.compare import compare
names = {row["name"] for row in compare(8)}
assert "ring" in names and "matcha" not in names, names
"""
    root = Path(topologies.__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert out.stderr == "" and out.stdout.count("pip install 'dfl[topologies]'") == 6
    for wish in ("weights='fdla' needs a convex solver", "weights='link_reliability' needs", "'matcha' with optimise=True needs"):
        assert wish in out.stdout
