"""Push-sum and Push-DIGing on one-way links: against dense recursions, at the plain mean, with a mass that is conserved."""

import networkx as nx
import numpy as np
import pytest
import tiny_runs
import torch
from quadratics import NUM, Given, descend, gradient, optimum

import topologies
from dfl.adapters.layout import make_layout
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, Context, build
from dfl.run.train import train
from dfl.simulation import Rows
from dfl.store.records import read_lines
from dfl.transport import InProcess


def ring_with_chord(n: int) -> np.ndarray:
    """A directed ring and 0 -> 2; every sender divides equally among itself and whom it sends to."""
    a = np.eye(n)
    for j in range(n):
        a[(j + 1) % n, j] = 1
    a[2, 0] = 1
    return a / a.sum(0)


CHORD = ring_with_chord(NUM)
GRAPH = Given(CHORD, sums="column")


def run(wrapper, a: np.ndarray, x: torch.Tensor, rounds: int, lr: float = 0.0, codec: str = "none"):
    """Gossip of rows with each peer's own descent in between; the heart and what X sums to in every round."""
    layout = make_layout([("x", 1, x.shape[1] - 1, 1, 1.0)])
    method = build("lora", Context(layout), {}, {"wrapper": Choice(wrapper), "codec": Choice(codec)})
    graph = Given(a, sums="column")
    heart, sums = Gossip(method, layout, Rows(graph, columns=True), InProcess(), range(len(x)), x), []
    for t in range(rounds):
        if lr:
            x[:, :-1] -= lr * torch.from_numpy(gradient(x[:, :-1].numpy()))
        heart.round(t, x, lr=lr, local_steps=1)
        mass = torch.stack([heart.state["rule"][str(i)]["push.mass"][0] for i in range(len(x))])
        sums.append((float(mass.sum()), (mass[:, None] * x).sum(0), mass))
    return heart, sums


def test_without_steps_everybody_ends_at_the_plain_mean():
    """Five peers, x = 0 .. 4: the mean is 2 at all of them; the transposed weights would say 2.235."""
    x = torch.arange(5.0, dtype=torch.float64)[:, None].repeat(1, 2)
    _, sums = run("push_sum", ring_with_chord(5), x, 120)
    torch.testing.assert_close(x, torch.full_like(x, 2.0), rtol=0, atol=1e-12)
    expected = torch.tensor([0.88235, 0.58824, 1.17647, 1.17647, 1.17647], dtype=torch.float64)
    torch.testing.assert_close(sums[-1][2], expected, rtol=0, atol=5e-6)
    assert np.sort(np.abs(np.linalg.eigvals(ring_with_chord(5))))[-2] == pytest.approx(0.736, abs=1e-3)
    assert all(mass > 0 for _, _, masses in sums for mass in masses.tolist())


@pytest.mark.parametrize("codec", ["none", "bfloat16", "int8"])
def test_mass_is_kept_and_the_sum_moves_by_local_steps_alone(codec):
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = x.sum(0)
    _, sums = run("push_sum", ring_with_chord(5), x, 30, codec=codec)
    for mass, total, _ in sums:
        assert mass == pytest.approx(5, abs=1e-12)
        torch.testing.assert_close(total, before, rtol=0, atol=1e-11)


def test_push_sum_is_its_recursion():
    """X <- A (X - lr g(X / m)), m <- A m."""
    x, m = np.zeros((NUM, 3)), np.ones((NUM, 1))
    for _ in range(40):
        x, m = CHORD @ (x - 0.1 * gradient(x / m)), CHORD @ m
    np.testing.assert_allclose(descend("push_sum", GRAPH, rounds=40, lr=0.1, d=3).x, x / m, rtol=0, atol=1e-12)


def test_its_row_of_the_table():
    assert descend("push_sum", GRAPH, rounds=50, lr=0.1).largest == pytest.approx(0.936193, abs=1e-6)
    assert descend("push_sum", GRAPH, rounds=300, lr=0.1).largest == pytest.approx(0.936743, abs=1e-6)


@pytest.mark.long
def test_push_diging_is_its_recursion_and_exact():
    """X <- A X - lr Y, m <- A m, Z = X / m, Y <- A Y + g(Z) - g(Z before)."""
    x, m, lr = np.zeros((NUM, 3)), np.ones((NUM, 1)), 0.05
    g = y = gradient(x)
    for _ in range(60):
        x, m = CHORD @ x - lr * y, CHORD @ m
        new = gradient(x / m)
        y, g = CHORD @ y + new - g, new
    np.testing.assert_allclose(descend("push_diging", GRAPH, rounds=60, lr=lr, d=3).x, x / m, rtol=0, atol=1e-12)
    assert descend("push_diging", GRAPH, rounds=400, lr=0.05, d=3).rms < 2e-4


@pytest.mark.long
def test_push_diging_with_local_steps_is_exact_too():
    assert descend("push_diging", GRAPH, rounds=400, lr=0.015, d=3, local_steps=3).rms < 1e-4
    assert descend("push_sum", GRAPH, rounds=100, lr=0.01, d=3, local_steps=3).rms > 0.05


def test_where_rows_sum_to_one_too_push_sum_is_plain_gossip_to_the_bit():
    graph = topologies.build("one_peer_exponential", NUM)
    given = {"rounds": 25, "lr": 0.1, "d": 3, "local_steps": 2}
    assert (descend("push_sum", graph, **given).x == descend("none", graph, **given).x).all()


def test_a_recipe_on_one_way_links(tmp_path):
    """The whole run, with measures of rows that do not sum to one."""
    root = tiny_runs.make_folder(tmp_path)
    given = {"topology": "{name: star, weights: push_sum}", "wrapper": "push_sum", "processes": 1}
    assert train(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run", **given)) == 0
    assert all(np.isfinite(record["measures"]["cross_term"]) for record in read_lines(tmp_path / "run" / "metrics.jsonl")
               if "measures" in record)


@pytest.mark.parametrize("given, said", [
    ({"topology": topologies.build("star", NUM, weights="uniform")}, "wrapper.name = 'push_sum' needs W.t. whose columns sum to one"),
    ({"topology": Given(topologies.build("star", NUM, weights="uniform").matrix(0), sums=None)}, "whose columns sum to one"),
    ({"channel": "lossy"}, "loses messages, which 'lora' cannot have"),
    ({"trigger": Choice("event", {"threshold": 0.1})}, "mean something in their own round alone"),
    ({"trigger": Choice("periodic", {})}, "leaves messages out, which wrapper.name = 'push_sum'"),
])
def test_refusals(given, said):
    with pytest.raises(ValueError, match=said):
        descend("push_sum", **{"topology": GRAPH, "rounds": 1, "lr": 0.1} | given)


def test_plain_gossip_on_such_weights_is_still_refused():
    graph = topologies.build("networkx", NUM, graph=nx.DiGraph(nx.path_graph(NUM)), weights="push_sum")
    with pytest.raises(ValueError, match="has columns that sum to one, but not rows: .* or wrapper: push_sum"):
        descend("none", graph, rounds=1, lr=0.1)
    assert descend("push_sum", graph, rounds=200, lr=0.0001).x.shape == (NUM, 1)
    assert optimum(1).shape == (1,)
