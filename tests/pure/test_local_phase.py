"""The local phase is a protocol: `dfl train`, `dfl.simulate` and a loop of one's own fill it, and gossip follows."""

import inspect

import pytest
import tiny_runs
import torch

import topologies
from dfl import methods, simulate
from dfl.adapters.layout import a_view, b_view, make_layout, pack, unpack
from dfl.engine.gossip import Gossip
from dfl.engine.memory import REMEMBERED
from dfl.methods import Context
from dfl.run.loop import Hooks, run_rounds
from dfl.simulation import OwnStep
from dfl.slots import Plan
from dfl.training import hosted
from dfl.training.base import LocalTrainer
from dfl.training.phase import ModelTrainer
from dfl.transport import InProcess

NUM, ROUNDS = 4, 5
START = {"layer": (torch.randn(NUM, 2, 6, generator=torch.Generator().manual_seed(0)),
                   torch.randn(NUM, 5, 2, generator=torch.Generator().manual_seed(1)))}
TARGETS = torch.randn(NUM, 5, 6, generator=torch.Generator().manual_seed(2))


def gradients(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ||B A - target||² / 2 for every peer."""
    rest = b @ a - TARGETS
    return b.mT @ rest, rest @ a.mT


class Mine:
    """Somebody's own trainer: it knows rows and a layout, no task, model or class of ours."""

    def __init__(self, layout):
        self.layout = layout

    def run(self, x, plans, corrections, t, *, residuals=None, after_step=None, halt=None):
        (pair,) = self.layout.pairs
        a, b = a_view(x, pair), b_view(x, pair)
        loss = (b @ a - TARGETS).square().sum((1, 2)) / 2
        grad_a, grad_b = gradients(a, b)
        for name, factor, gradient in (("A", a, grad_a), ("B", b, grad_b)):
            if name in plans[0].trains:
                factor.sub_(0.02 * gradient)
        return loss


@pytest.mark.parametrize("method", ["lora", "ffa", "rolora", "decaf", "hetlora"])
def test_a_trainer_of_ones_own_before_gossip_is_the_simulation(method):
    def local_step(factors, t, trains):
        a, b = factors["layer"]
        found = gradients(a.clone(), b.clone())
        for name, factor, gradient in zip("AB", (a, b), found, strict=True):
            if name in trains:
                factor.sub_(0.02 * gradient)

    start = START if method != "ffa" else {"layer": (START["layer"][0][:1].repeat(NUM, 1, 1), START["layer"][1])}
    graph = topologies.build("ring", NUM)
    want = simulate(method, graph, start, local_step, ROUNDS, measure_every=0).factors["layer"]
    layout, x = pack(start)
    context = Context(layout, peers=NUM, topology=graph, rounds=ROUNDS)
    gossip = Gossip(methods.build(method, context), layout, graph, InProcess(), range(NUM), x)
    trainer, losses = Mine(layout), []
    for t in range(ROUNDS):
        losses.append(trainer.run(x, gossip.plans(t), gossip.corrections(), t, residuals=gossip.residuals()))
        gossip.round(t, x)
    for found, wanted in zip(unpack(x, layout)["layer"], want, strict=True):
        assert torch.equal(found, wanted)
    assert losses[-1].mean() < losses[0].mean()


@pytest.mark.parametrize("trainer", [ModelTrainer, OwnStep, Mine])
def test_all_of_them_are_called_as_the_protocol_says(trainer):
    wanted, found = (inspect.signature(of.run).parameters for of in (LocalTrainer, trainer))
    assert [(p.name, p.kind, p.default) for p in found.values()] == [(p.name, p.kind, p.default) for p in wanted.values()]


def test_dfl_train_calls_whoever_trains(tmp_path, monkeypatch):
    """The loop asks for rows to be changed and for losses; who does it knows of no step of ours."""
    root = tiny_runs.make_folder(tmp_path)
    run, _ = tiny_runs.make_run(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run"))
    calls = []

    class Constant:
        def run(self, x, plans, corrections, t, *, residuals=None, after_step=None, halt=None):
            calls.append((t, plans[0].trains, len(corrections)))
            x[:, run.peers.layout.groups["B"]] += torch.arange(1.0, 5.0)[:, None]
            return torch.full((len(x),), 3.0)

    monkeypatch.setattr(type(run), "trainer", Constant())
    records = []
    run_rounds(run, Hooks(records.append, lambda: None, lambda: False))
    assert calls == [(t, frozenset("AB"), 4) for t in range(4)]
    assert [record["train_loss"]["mean"] for record in records[1:]] == [3.0] * 4
    b = run.peers.x[:, run.peers.layout.groups["B"]]
    torch.testing.assert_close(b.mean(), torch.tensor(4 * 2.5), rtol=1e-5, atol=0)  # mixing keeps the mean


def test_what_a_plan_leaves_out_stays_in_a_callers_step():
    layout = make_layout([("layer", 2, 6, 5, 1.0)])
    x = torch.ones(3, layout.size)
    masks = torch.rand(3, layout.size, generator=torch.Generator().manual_seed(0)) < 0.5
    plans = [Plan(frozenset("B"), frozenset(), mask) for mask in masks]

    def add(factors, t, trains):
        for factor in factors["layer"]:
            factor.add_(1)

    losses = OwnStep(layout, add).run(x, plans, [None] * 3, 0)
    trained = torch.zeros_like(masks)
    trained[:, layout.groups["B"]] = masks[:, layout.groups["B"]]
    assert torch.equal(x, 1.0 + trained) and losses.isnan().all()


def test_what_peers_and_gossip_have_saved_is_told_apart_by_its_name(tmp_path):
    """One file holds both; a name that both use would be read back as the other's."""
    root = tiny_runs.make_folder(tmp_path)
    run, _ = tiny_runs.make_run(tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run", train__state="carried"))
    run.trainer.run(run.peers.x, run.gossip.plans(0), [None] * 4, 0, halt=lambda left: left == 3)
    slots = {name.partition(".")[0] for name in run.peers.state_tensors()}
    assert slots <= set(hosted.SLOTS) and {"moments", "part", "generator"} <= slots
    assert not set(hosted.SLOTS) & {"rule", "x", "pending", "bases", *REMEMBERED, *run.gossip.state}
