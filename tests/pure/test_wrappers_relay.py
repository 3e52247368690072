"""RelaySGD on trees, and groups of a grid that average in turn: every model is counted once."""

import networkx as nx
import numpy as np
import pytest
import torch
from quadratics import NUM, descend, gradient

import topologies
from dfl.adapters.layout import make_layout
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, Context, build
from dfl.transport import InProcess

TREES = ["path", "star", "tree", "binomial_tree", "random_tree"]


def links(name: str) -> dict[int, list[int]]:
    w = topologies.build(name, NUM).matrix(0)
    return {i: [j for j in range(NUM) if j != i and w[i, j]] for i in range(NUM)}


def relayed(name: str, lr: float, rounds: int, start: np.ndarray) -> np.ndarray:
    """A message of its own for every direction of every link, as the paper has it."""
    near, x = links(name), start.copy()
    m = {(i, j): np.zeros(start.shape[1]) for i in near for j in near[i]}
    c = dict.fromkeys(m, 0)
    for _ in range(rounds):
        y = x - lr * gradient(x)
        sent = {(i, j): y[i] + sum((m[k, i] for k in near[i] if k != j), np.zeros_like(y[i])) for i, j in m}
        c = {(i, j): 1 + sum(c[k, i] for k in near[i] if k != j) for i, j in m}
        m = sent
        for i in near:
            count = 1 + sum(c[k, i] for k in near[i])
            x[i] = (y[i] + sum(m[k, i] for k in near[i]) + (NUM - count) * start[i]) / NUM
    return x


@pytest.mark.parametrize("name", TREES)
def test_is_its_recursion(name):
    start = np.random.default_rng(2).standard_normal((NUM, 3))
    found = descend("relay", name, rounds=30, lr=0.05, d=3, start=start)
    np.testing.assert_allclose(found.x, relayed(name, 0.05, 30, start), rtol=0, atol=1e-11)


def test_reaches_the_optimum_of_all():
    assert descend("relay", "path", rounds=400, lr=0.05, d=3).rms < 1e-4


@pytest.mark.parametrize("codec", ["none", "bfloat16"])
@pytest.mark.parametrize("name", TREES)
def test_the_mean_of_all_after_as_many_rounds_as_the_tree_is_wide(name, codec):
    """Every local phase begins at the same model of its own: then all hold the plain mean, each model counted once."""
    graph, layout = topologies.build(name, NUM), make_layout([("x", 1, 3, 1, 1.0)])
    method = build("lora", Context(layout, topology=graph), {}, {"wrapper": Choice("relay"), "codec": Choice(codec)})
    own = torch.randn(NUM, layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.zeros_like(own)
    heart, wide = Gossip(method, layout, graph, InProcess(), range(NUM), x), nx.diameter(nx.Graph(graph.graph(0)))
    for t in range(wide):
        x.copy_(own)
        heart.round(t, x)
    apart = float((x - own.mean(0)).abs().max())
    assert apart < 1e-12 if codec == "none" else 0 < apart < 0.05
    for i, near in links(name).items():  # both ends know the same
        for j in near:
            mine, other = heart.state["rule"][str(i)], heart.state["rule"][str(j)]
            assert torch.equal(mine[f"relay.out.{j}"], other[f"relay.in.{i}"])
            assert int(mine[f"relay.said.{j}"]) == int(other[f"relay.known.{i}"])


@pytest.mark.parametrize("given, said", [
    ({"topology": "ring"}, "needs a tree of 7 links that go both ways, but topology.name = 'ring' has 16 directed links"),
    ({"topology": topologies.build("random_matching", NUM)}, "needs a tree that is the same in every round"),
    ({"channel": "lossy"}, "copies have to stay equal at both ends"), ({"method": "rolora"}, "exchanges 'active', which rule"),
])
def test_refusals(given, said):
    with pytest.raises(ValueError, match=said):
        descend("relay", **{"topology": "path", "rounds": 1, "lr": 0.1} | given)


def test_moshpit_is_a_topology_under_plain_averaging():
    """Groups along the axes of a grid in turn: after as many rounds as it has axes all hold the exact mean."""
    graph = topologies.build("grid_all_reduce", NUM, group_size=2)
    start = np.random.default_rng(3).standard_normal((NUM, 3))
    found = descend("none", graph, rounds=3, lr=0.0, d=3, start=start)
    np.testing.assert_allclose(found.x, np.tile(start.mean(0), (NUM, 1)), rtol=0, atol=1e-12)
    cube = start.reshape(2, 2, 2, 3)
    first = descend("none", graph, rounds=1, lr=0.0, d=3, start=start).x.reshape(2, 2, 2, 3)
    means = [np.broadcast_to(cube.mean(axis, keepdims=True), cube.shape) for axis in range(3)]
    axes = [axis for axis in range(3) if np.allclose(first, means[axis], atol=1e-12)]
    assert len(axes) == 1  # the mean of every group of one axis
