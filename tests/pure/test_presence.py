"""Peers that join, leave and return on a schedule: who is away changes nothing and hears nothing, the others go on."""

import numpy as np
import pytest
import tiny_runs
import torch
from cases import NUM, Case, start_rows
from quadratics import NUM as EIGHT
from quadratics import RING, descend, gradient, optimum
from test_grid import TOLD, train

import topologies
from dfl.engine.gossip import Gossip
from dfl.methods import Choice, check_topology
from dfl.run.train import train as whole_run
from dfl.store.records import read_lines
from dfl.transport import InProcess

# of eight: 1 joins in round 6, 4 leaves and returns, 7 leaves for good
AWAY = [[1, 0, 6], [4, 3, 9], [4, 15, 18], [7, 12]]
GRAPH = topologies.build("presence", EIGHT, away=AWAY, base="ring")


def there(t: int) -> np.ndarray:
    return np.array([not any(peer == i and start <= t < end for i, start, end in (*((*one, 10**9)[:3] for one in AWAY),))
                     for peer in range(EIGHT)])


def test_w_is_metropolis_among_those_who_are_there():
    links = (RING != 0) & ~np.eye(EIGHT, dtype=bool)
    for t in range(25):
        here = there(t)
        now = links & here[:, None] & here[None, :]
        degrees = now.sum(1)
        w = np.where(now, 1 / (1 + np.maximum(degrees[:, None], degrees[None, :])), 0)
        np.testing.assert_allclose(GRAPH.matrix(t), w + np.diag(1 - w.sum(1)), rtol=0, atol=1e-15)
        assert [GRAPH.away(t, peer) for peer in range(EIGHT)] == (~here).tolist()


def test_a_file_and_a_schedule_that_begins_anew(tmp_path):
    (tmp_path / "away.csv").write_text("peer,start,end\n2,1,3\n")
    found = topologies.build("presence", 5, away=str(tmp_path / "away.csv"), base="path", every=4)
    assert [found.away(t, 2) for t in range(8)] == [False, True, True, False] * 2 and found.period == 4
    assert topologies.build("presence", 5, away=[[2, 1, 3]], base="path").period is None


@pytest.mark.parametrize("given, words", [
    ({"away": [[8, 0, 1]]}, "a peer from 0 to 7"), ({"away": [[1, 3, 2]]}, "start <= end"), ({"away": [[1]]}, r"\[peer, start, end\]"),
    ({"away": [1, 2]}, r"\[peer, start, end\]"), ({"every": 0}, "every"), ({"base": "nowhere"}, "not known"),
    ({"away": "nowhere.csv"}, "nowhere.csv")])
def test_schedules_that_are_none(given, words):
    with pytest.raises(ValueError, match=words):
        topologies.build("presence", EIGHT, **given)


def test_plain_gossip_is_w_among_those_present_and_who_is_away_does_not_train():
    x = np.zeros((EIGHT, 3))
    for t in range(25):
        here = there(t)[:, None]
        x = GRAPH.matrix(t) @ np.where(here, x - 0.1 * gradient(x), x)
    found = descend("none", GRAPH, rounds=25, lr=0.1, d=3)
    np.testing.assert_allclose(found.x, x, rtol=0, atol=1e-12)
    assert found.ledger[7].messages == 2 * 12  # to both neighbours until it leaves


def test_tracking_waits_with_who_is_away():
    """K-GT of those who are there; c of the others stays, so that all c sum to zero still, and rounds away are no steps."""
    x, c, lr, steps = np.zeros((EIGHT, 3)), np.zeros((EIGHT, 3)), 0.03, 2
    for t in range(40):
        w, here, y = GRAPH.matrix(t), there(t)[:, None], x.copy()
        for _ in range(steps):
            y = np.where(here, y - lr * (gradient(y) + c), y)
        z = (x - y) / (steps * lr)
        c, x = np.where(here, c - z + w @ z, c), w @ y
    found = descend("gradient_tracking", GRAPH, rounds=40, lr=lr, d=3, local_steps=steps)
    np.testing.assert_allclose(found.x, x, rtol=0, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("wrapper", ["exact_diffusion", "gradient_tracking", "led", "outer"])
def test_while_away_nothing_moves_and_all_together_come_to_the_optimum_again(wrapper):
    graph = topologies.build("presence", EIGHT, away=[[2, 40, 60], [5, 50, 70]], base="ring")
    left, back = (descend(wrapper, graph, rounds=rounds, lr=0.1, d=3).x for rounds in (40, 60))
    assert (left[2] == back[2]).all() and not (left[5] == back[5]).all()
    if wrapper != "outer":
        assert np.abs(descend(wrapper, graph, rounds=250, lr=0.1, d=3).x - optimum(3)).max() < 1e-4


SLOTS = {"plain": {}, "event": {"trigger": Choice("event", {"threshold": 0.4})}, "efhc": {"trigger": Choice("efhc", {
    "r": 0.3, "bandwidth": 1.0})}, "late": {"trigger": Choice("late", {"share": 0.9})}, "int8": {"codec": Choice("int8")},
    "ahead": {"delay": 1}, "tracking": {"wrapper": Choice("gradient_tracking")}, "momentum": {"wrapper": Choice("momentum_tracking")},
    "quasi": {"wrapper": Choice("quasi_global")}, "clock": {"network": Choice("links", {"compute": 1.0, "latency": 0.5})}}


@pytest.mark.parametrize("setting", SLOTS)
@pytest.mark.parametrize("name", ["lora", "decaf", "fedhl"])
def test_who_is_away_keeps_all_it_has_and_the_mean_moves_by_those_who_are_there(name, setting):
    if name != "lora" and "wrapper" in SLOTS[setting]:
        return
    graph = topologies.build("presence", NUM, away=[[1, 2, 5], [3, 0, 4]], base="ring")
    case = Case(name, slots=SLOTS[setting], topology=graph)
    check_topology(case.rule.method, graph)
    x = start_rows(case).double()
    heart = Gossip(case.rule.method, case.layout, graph, InProcess(), range(NUM), x)
    for t in range(8):
        before = x.clone()
        held = {peer: dict(heart.state["rule"][str(peer)]) for peer in range(NUM)}
        heart.begin(t, x, **TOLD)
        train(x, case, t, heart)
        away = [peer for peer in range(NUM) if graph.away(t, peer)]
        assert torch.equal(x[away], before[away])
        mean = x.mean(0)
        report = heart.round(t, x, **TOLD)
        assert torch.equal(x[away], before[away]) and not set(away) & set(report.mixed)
        for peer in away:
            state, sent = heart.state["rule"][str(peer)], report.ledger[peer]
            assert all(torch.equal(value, held[peer][key]) for key, value in state.items() if not key.endswith(".last"))
            assert (sent.messages, sent.broadcasts, sent.due) == (0, 0, 0)
        if name == "lora" and setting != "late":
            torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=1e-12)
    if setting == "clock":  # 3 joins in round 4 and is then as late as its neighbours
        assert heart.clock.now(3) == pytest.approx(float(heart.clock.now(0)), abs=3)


def test_who_returns_is_greeted_and_who_was_never_met_is_told_what_was_said():
    graph = topologies.build("presence", NUM, away=[[1, 0, 2]], base="ring")
    for trigger, expected in ((Choice("event", {"threshold": 1e9, "decay": "constant"}), [4, 0, 4, 0]),
                              (Choice("efhc", {"r": 1e9, "bandwidth": 1.0}), [0, 0, 4, 0])):
        case = Case("lora", slots={"trigger": trigger}, topology=graph)
        x = start_rows(case)
        heart = Gossip(case.rule.method, case.layout, graph, InProcess(), range(NUM), x)
        assert [heart.round(t, x).messages for t in range(4)] == expected


@pytest.mark.parametrize("slots, words", [({"codec": Choice("sign")}, "same in every round"),
                                          ({"channel": Choice("over_the_air")}, "same in every round"),
                                          ({"wrapper": Choice("relay")}, "same in every round")])
def test_what_needs_everybody_in_every_round_is_refused(slots, words):
    graph = topologies.build("presence", NUM, away=[[1, 0, 2]], base="ring")
    with pytest.raises(ValueError, match=words):
        check_topology(Case("lora", slots=slots, topology=graph).rule.method, graph)


def test_a_run_stops_and_goes_on_where_somebody_is_away(tmp_path, monkeypatch):
    """With carried moments: who is away keeps factors, moments and the count of its steps; the same bits after a stop."""
    from dfl.run import train as running
    root = tiny_runs.make_folder(tmp_path)
    given = {"topology": "{name: presence, base: ring, away: [[1, 1, 3], [2, 0, 2]]}", "train__rounds": 4, "train__local_steps": 3,
             "train__state": "carried", "method": "lora", "eval__every": 0, "processes": 1, "wrapper": "gradient_tracking"}

    def config(name: str, **more):
        return tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / name, **given | more)

    assert whole_run(config("whole")) == 0
    with monkeypatch.context() as patch:  # between two steps of the third round
        tiny_runs.stop_after(running, 3, 5, patch.setattr)
        whole_run(config("halves"))
    assert whole_run(config("halves"), resume=True) == 0
    assert tiny_runs.adapter_digests(tmp_path / "whole") == tiny_runs.adapter_digests(tmp_path / "halves")
    assert whole_run(config("short", train__rounds=2)) == 0 and whole_run(config("start", train__rounds=1)) == 0
    short, start = (tiny_runs.adapter_digests(tmp_path / name) for name in ("short", "start"))
    assert [short[f"peer-{peer}"] == start[f"peer-{peer}"] for peer in range(4)] == [False, True, True, False]
    assert all(line["messages"] == expected for line, expected in zip(
        [line["ledger"] for line in read_lines(tmp_path / "whole" / "metrics.jsonl") if "ledger" in line], (4, 2, 4, 8), strict=True))
