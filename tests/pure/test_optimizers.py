"""Schedules and optimisers by the names that people know: as transformers has them, and resumed to the bit."""

import importlib.util

import pytest
import torch
from test_packing import text_config
from tiny_runs import assert_goes_on, local_phase, make_run

from dfl.config import TrainConfig
from dfl.config.optimizers import OPTIMIZERS, SCHEDULES
from dfl.training.optimizer import learning_rate

STEPS, WARMUP = 200, 20
THEIRS = {
    "constant": ("constant_with_warmup", {}), "constant_with_warmup": ("constant_with_warmup", {}), "linear": ("linear", {}),
    "cosine": ("cosine", {}), "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": 3}),
    "cosine_with_min_lr": ("cosine_with_min_lr", {"min_lr_rate": 0.1}), "polynomial": ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    "inverse_sqrt": ("inverse_sqrt", {}),
    "warmup_stable_decay": ("warmup_stable_decay", {"num_decay_steps": 40, "decay_type": "linear"})}
OURS = {"cosine_with_restarts": {"num_cycles": 3}, "cosine_with_min_lr": {"min_lr_rate": 0.1},
        "polynomial": {"power": 2.0, "end": 1e-2}, "warmup_stable_decay": {"decay": 0.2}}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_that_of_transformers(name):
    from transformers import get_scheduler
    theirs, params = THEIRS[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS, scheduler_specific_kwargs=params)
    train = TrainConfig(lr=1e-3, schedule={"name": name, **OURS.get(name, {})}, warmup=WARMUP / STEPS)
    for step in range(STEPS):
        assert learning_rate(train, step / STEPS) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-12), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("fields, said", [
    ({"train__schedule": "greedy"}, "train.schedule = 'greedy' is not known.*allowed: constant, .*warmup_stable_decay"),
    ({"train__schedule": "{name: cosine, power: 2}"}, "train.schedule.power = 2: 'cosine' has no such parameter"),
    ({"train__schedule": "cosine_with_min_lr"}, "train.schedule.min_lr_rate is missing"),
    ({"train__schedule": "inverse_sqrt"}, "train.schedule = 'inverse_sqrt' falls from the end of the warm-up on; give train.warmup"),
    ({"train__optimizer": "adam8"}, "train.optimizer = 'adam8' is not known.*allowed: adamw, sgd"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type = 'reduce_lr_on_plateau' has no counterpart here")])
def test_what_there_is_not_is_refused(tmp_path, fields, said):
    with pytest.raises(ValueError, match=said):
        text_config(tmp_path, **fields)


def test_names_of_transformers_are_understood(tmp_path):
    known = importlib.util.find_spec("bitsandbytes") is not None
    found = text_config(tmp_path, lr_scheduler_type="cosine_with_restarts", optim="adamw_bnb_8bit" if known else "rmsprop")
    assert found.train.schedule.name == "cosine_with_restarts" and found.train.optimizer == ("adamw_8bit" if known else "rmsprop")


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    with pytest.raises(ValueError, match=r"train.optimizer = 'lion_8bit' is one of bitsandbytes, which is not installed; pip install"):
        text_config(tmp_path, train__optimizer="lion_8bit")


def needs(name):
    package = OPTIMIZERS[name].source.partition(".")[0]
    missing = importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


ON_CPU = [needs(name) for name, one in OPTIMIZERS.items() if not one.paged]


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("fields", [{"train__state": "carried"}, {}, {"train__state": "carried", "method": "decaf"}], ids=str)
def test_stopped_runs_go_on_to_the_same_bits(tmp_path, monkeypatch, name, fields):
    """With moments across rounds, also where the basis of the factors turns, and in the middle of a round."""
    fields = {"train__optimizer": name, "train__rounds": 3, "eval__every": 0, "measure__layers": 0,
              "lora__rank": 128 if name.endswith("8bit") else 8} | fields  # bitsandbytes keeps less than 4096 numbers as they are
    assert_goes_on(text_config, tmp_path, monkeypatch, 3, **fields)


@pytest.mark.parametrize("name", ON_CPU)
def test_it_learns_and_a_round_that_trains_one_factor_leaves_the_other(tmp_path, name):
    run, _ = make_run(text_config(tmp_path, train__optimizer=name, method="{name: tad, T: 1}"))
    before = run.peers.x.clone()
    local_phase(run)
    a, b = (run.peers.layout.groups[group] for group in "AB")
    assert torch.equal(run.peers.x[:, a], before[:, a]) and (run.peers.x[:, b] != before[:, b]).any(1).all()


@pytest.mark.parametrize("name", [needs("paged_adamw_8bit")])
def test_a_paged_one_needs_a_gpu(tmp_path, name):
    with pytest.raises(ValueError, match="train.optimizer = 'paged_adamw_8bit' moves moments .* allowed on a CPU: adamw_8bit"):
        make_run(text_config(tmp_path, train__optimizer=name))


@pytest.mark.parametrize("name", [needs("adamw_8bit")])
def test_moments_of_a_byte_take_a_quarter(tmp_path, name):
    """A row of more than 4096 numbers: smaller ones bitsandbytes keeps in float32."""
    sizes = {}
    for optimizer in ("adamw", name):
        run, _ = make_run(text_config(tmp_path, train__optimizer=optimizer, lora__rank=128, train__state="carried"))
        local_phase(run)
        sizes[optimizer] = sum(value.nbytes for key, value in run.peers.optimizer.all_moments().items() if ".B." in key)
    assert sizes[name] < 0.6 * sizes["adamw"], sizes
