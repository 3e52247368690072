"""Invariants of a round that need the loop's parts together: what trains, what starts equal, what a message costs."""

import pytest
import tiny_models
import torch
from one_round import build
from tiny_runs import local_phase, make_config, make_run, write_data
from toy import LR, PEERS, Toy

import topologies
from dfl import simulate
from dfl.adapters.layout import make_layout
from dfl.codecs import CODECS
from dfl.training.executors import Sequential


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    return tiny_models.save(folder / "model", "bert", layers=1), write_data(folder), folder / "run"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("rule", ["ffa", "rolora", "{name: tad, T: 2}"])
def test_only_the_active_factor_moves(pieces, rule, optimizer):
    config = make_config(*pieces, method=rule, train__optimizer=optimizer, train__weight_decay=0.1, train__state="carried")
    run, _ = make_run(config)
    for t in range(4):
        before, trains = run.peers.x.clone(), run.gossip.plans(t)[0].trains
        local_phase(run, t, executor=Sequential())
        for group, cut in run.peers.layout.groups.items():
            if cut.stop > cut.start:
                assert torch.equal(before[:, cut], run.peers.x[:, cut]) == (group not in trains), (t, group)


def test_the_start_is_the_base_model(pieces):
    config = make_config(*pieces)
    run, loaded = make_run(config)
    batch = run.task.collate([run.split.features[k] for k in range(4)])
    net = loaded.adapted.model.eval()
    with torch.no_grad(), Sequential().bound(loaded.adapted, run.rows(), None, [0]) as forward:
        adapted = forward(run.task.inputs(batch), [0]).logits
        with net.disable_adapter():
            base = net(**run.task.inputs(batch)).logits
    # PEFT's own copy of the head is the head
    assert torch.equal(adapted, base)
    assert (run.peers.x == run.peers.x[0]).all()


def test_one_step_on_a_full_graph_is_centralised_sgd():
    toy = Toy(0)
    toy.noise = lambda t: torch.zeros(20, 2, PEERS, 4, 32).numpy()

    def one_step(factors, t, trains):
        a, b = factors["toy"]
        residual = b @ a - torch.from_numpy(toy.targets)
        grad_a, grad_b = b.mT @ residual, residual @ a.mT
        a -= LR * grad_a
        b -= LR * grad_b

    a = toy.factors()["toy"][0].clone()
    b = torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(PEERS, 32, 4).clone()
    result = simulate("lora", topologies.build("complete", PEERS), {"toy": (a, b)}, one_step, 1)
    # the union's loss is the mean of the peers' losses
    residual = b[0] @ a[0] - torch.from_numpy(toy.targets.mean(0))
    torch.testing.assert_close(result.factors["toy"][0][3], a[0] - LR * b[0].mT @ residual, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.factors["toy"][1][7], b[0] - LR * residual @ a[0].mT, rtol=0, atol=1e-12)


def test_payload_of_roberta_large():
    """24 layers, query and value, rank 8: 786,432 numbers; half of them for a rule that sends one factor."""
    layout = make_layout([(f"{k}.{name}", 8, 1024, 1024, 2.0) for k in range(24) for name in ("query", "value")])
    assert layout.size == 786_432
    for name, share in (("lora", 1), ("tad", 1), ("decaf", 1), ("ffa", 2), ("rolora", 2), ("local", 0)):
        params = {"T": 5} if name == "tad" else {}
        length = build(name, layout, **params).length(0)
        assert 4 * length == (3_145_728 // share if share else 0)
    data, _ = CODECS["bfloat16"]().encode({"A": torch.zeros(layout.size)}, {}, None)
    assert data["A"].nbytes == 3_145_728 // 2


def test_every_rule_sees_the_same_graphs(pieces):
    runs = [make_run(make_config(*pieces, method=rule, topology="{name: edge_activation, p: 0.4}"))[0] for rule in ("lora", "decaf")]
    for t in (0, 1, 50):
        assert (runs[0].topology.matrix(t) == runs[1].topology.matrix(t)).all()
    assert all((one.batch(k) == other.batch(k)).all() for one, other in
               zip(*(run.peers.streams for run in runs), strict=True) for k in range(5))
