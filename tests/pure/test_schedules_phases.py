"""TAD's own phases: what the run's graphs do to a frozen factor decides, the same for everybody, whenever it is asked."""

import json

import numpy as np
import pytest
import tiny_runs
import yaml
from one_round import build
from test_rules import LAYOUT
from toy import Toy

import topologies
from dfl import simulate
from dfl.run import train
from dfl.schedules import phases
from dfl.schedules.phases import Phases


def graph(p=0.1, n=10, seed=3):
    return topologies.build("edge_activation", n, p=p, base="complete", seed=seed)


def word(chosen, rounds) -> str:
    return "".join(chosen(t) for t in range(rounds))


def kept(topology, first, last) -> float:
    """The share of its squared disagreement that a frozen factor keeps over the rounds first .. last, by the covariance."""
    n = topology.num_peers
    covariance = np.eye(n) - 1 / n
    for t in range(first, last + 1):
        covariance = topology.matrix(t) @ covariance @ topology.matrix(t).T
    return np.trace(covariance - covariance.mean(0)) / (n - 1)


def runs_of(letters: str) -> list[tuple[str, int, int]]:
    """(factor, first round, last round) of each phase."""
    starts = [t for t in range(len(letters)) if t == 0 or letters[t] != letters[t - 1]]
    return [(letters[s], s, e - 1) for s, e in zip(starts, [*starts[1:], len(letters)], strict=True)]


@pytest.mark.parametrize("p", [0.02, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("theta", [0.3, 0.01])
def test_a_phase_ends_when_the_frozen_factor_has_come_together(p, theta):
    topology, rounds = graph(p), 120
    found = runs_of(word(Phases(topology, [rounds], theta), rounds))
    assert [factor for factor, *_ in found] == list("BA" * len(found))[:len(found)]
    for _, first, last in found[:-2]:  # the end of the run decides about the last two
        assert last - first + 1 == rounds // 4 or kept(topology, first, last) <= theta
        assert last == first or kept(topology, first, last - 1) > theta
    factor, first, last = found[-1]
    assert factor == "A" and last == rounds - 1
    assert kept(topology, first, last) <= theta or last - first + 1 >= rounds // 4


def test_known_graphs():
    assert word(Phases(topologies.build("complete", 8), [6], 0.01), 6) == "BABABA"
    # one-peer exponential averages exactly after log2(8) rounds
    assert word(Phases(topologies.build("one_peer_exponential", 8), [24], 0.01), 24) == "BBBAAABBBAAABBBAAABBBAAA"
    # nothing ever comes together: only the cap ends a phase
    assert word(Phases(graph(0.0), [12], 0.01, 2), 12) == "BBAABBAABBAA" and word(Phases(graph(0.0), [12], 0.01), 12) == "BBBAAABBBAAA"


@pytest.mark.parametrize("rounds", range(1, 30))
@pytest.mark.parametrize("p", [0.02, 0.2])
def test_a_run_of_any_length_begins_with_b_and_ends_with_a(rounds, p):
    letters = word(Phases(graph(p), [rounds], 0.01), rounds)
    assert letters[0] == "B" and letters[-1] == ("A" if rounds > 1 else "B")


def test_any_round_can_be_asked_for_first():
    letters = word(Phases(graph(), [60], 0.01), 60)
    for t in (59, 45, 30, 0):
        assert Phases(graph(), [60], 0.01)(t) == letters[t]
    backwards = Phases(graph(), [60], 0.01)
    assert "".join(backwards(t) for t in reversed(range(60)))[::-1] == letters


def test_a_longer_run_keeps_the_phases_it_had():
    short, long = (word(Phases(graph(), ends, 0.01), ends[-1]) for ends in ([40], [40, 70]))
    assert long.startswith(short) and long[40] == "B" and long[-1] == "A"
    # the same rounds divided without knowing of the shorter run are others: that it ended there matters
    assert not word(Phases(graph(), [70], 0.01), 70).startswith(short)


def test_random_vectors_stand_for_the_product_where_there_are_many_peers(monkeypatch):
    topology, rounds = graph(0.01, n=60), 200
    exact = runs_of(word(Phases(topology, [rounds], 0.01), rounds))
    monkeypatch.setattr(phases, "EXACT_PEERS", 8)
    assert phases.probes(60).shape == (60, 64)
    sampled = runs_of(word(Phases(topology, [rounds], 0.01), rounds))
    for _, first, last in sampled[:-2]:
        assert kept(topology, first, last) <= 0.02 and kept(topology, first, last - 1) > 0.005
    assert abs(len(exact) - len(sampled)) <= 2 and sampled[-1][0] == "A" and kept(topology, *sampled[-1][1:]) <= 0.02


@pytest.mark.parametrize("name, params", [("edge_activation", {"p": 0.3}), ("one_peer_exponential", {})])
def test_transposed_products(name, params):
    entries = topologies.build(name, 9, **params).entries(2)
    x = np.random.default_rng(0).standard_normal((9, 3))
    np.testing.assert_allclose(entries.apply_transposed(x), entries.dense().T @ x, atol=1e-14)
    np.testing.assert_allclose(entries.apply_transposed(x[:, 0]), entries.dense().T @ x[:, 0], atol=1e-14)


def test_the_rule_trains_by_them():
    rule = build("tad", LAYOUT, topology=graph(), rounds=60)
    assert "".join("".join(rule.trains(t)) for t in range(60)) == word(Phases(graph(), [60], 0.01), 60)
    assert rule.facts["T"] == "auto" and "0.01 of its squared disagreement" in rule.facts["reason"]
    assert rule.sends(0) == {"A", "B"}
    seen = []
    toy = Toy(0)
    simulate("tad", graph(), toy.factors(), lambda factors, t, trains: seen.append("".join(trains)), 60, measure_every=0, cap=7)
    assert "".join(seen) == word(Phases(graph(), [60], 0.01, 7), 60)


@pytest.mark.long
def test_it_ends_nearer_than_the_interval_that_ignored_parity():
    """The calibrated interval, round(3 / sqrt(1 - rho)) = 10 at p = 0.02, ends 150 rounds in a phase of B."""
    assert round(3 / (1 - topologies.spectrum.contraction(graph(0.02))) ** 0.5) == 10
    means = []
    for params in ({"T": 10}, {}):
        found = [(toy, simulate("tad", graph(0.02, seed=seed), toy.factors(), toy.local_step, 150, measure_every=0, **params))
                 for seed, toy in ((seed, Toy(seed)) for seed in range(3))]
        means.append(np.mean([toy.peer_loss(result.factors) for toy, result in found]))
    assert means[1] < 0.9 * means[0]


@pytest.mark.parametrize("params, message", [
    ({"theta": 0}, "method.theta = 0 is not allowed; allowed: a number above 0 and below 1"), ({"theta": 1.0}, "method.theta = 1.0"),
    ({"theta": "small"}, "method.theta = 'small'"), ({"cap": 0}, "method.cap = 0 is not allowed; allowed: a whole number from 1"),
    ({"ends": [5, 5]}, "method.ends"), ({"ends": [20]}, "method.ends = .20. is not allowed"), ({"ends": 3}, "method.ends = 3"),
    ({"topology": None}, "method.T = 'auto' needs the topology and the number of rounds")])
def test_bad_values_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        build("tad", LAYOUT, **{"topology": graph(), "rounds": 20} | params)


def test_a_graph_that_never_mixes_is_refused():
    toy = Toy(0)
    with pytest.raises(ValueError, match="needs a topology that mixes, but its spectral gap is 0.0e"):
        simulate("tad", graph(0.0), toy.factors(), toy.local_step, 5)


def test_a_run_that_is_made_longer_knows_where_it_had_ended(tmp_path):
    root = tiny_runs.make_folder(tmp_path)

    def config(rounds):
        return tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run", method="tad", train__rounds=rounds,
                                     eval__every=0, topology="{name: edge_activation, p: 0.3}")

    def trained():
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return "".join(line["trains"] for line in lines if line["round"])
    assert train.train(config(5)) == 0
    short = trained()
    for _ in range(2):  # the second time it is whole already, and remembers
        assert train.train(config(9), resume=True) == 0
        assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["method"]["ends"] == [5]
        assert trained().startswith(short) and short[-1] == "A" and trained()[5] == "B" and trained()[-1] == "A"
    assert len(trained()) == 9
