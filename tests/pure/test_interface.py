"""`dfl.train` from a script: what it takes, what it returns, and that the process is afterwards as it was before."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest
import tiny_runs
import torch
import yaml
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file

import dfl
from dfl import interface
from dfl.cli import main
from dfl.config import resolve
from dfl.run.callbacks import CallbackError
from dfl.run.train import train as run_to_the_end
from dfl.training.base import DivergenceError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.make_folder(tmp_path_factory.mktemp("interface"))


@pytest.fixture
def tree(root, tmp_path):
    """A recipe's fields, as somebody has them in a notebook; a path is a Path."""
    config = tiny_runs.make_config(root / "bert", root / "data.csv", tmp_path / "run")
    return config.to_dict() | {"output": tmp_path / "run"}


@contextlib.contextmanager
def unchanged():
    """What a process has of its own: more threads than a run takes, random numbers, handlers of signals."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    handlers, random = [signal.getsignal(number) for number in SIGNALS], torch.get_rng_state()
    try:
        yield
        assert torch.get_num_threads() == 3 and torch.equal(torch.get_rng_state(), random)
        assert [signal.getsignal(number) for number in SIGNALS] == handlers
    finally:
        torch.set_num_threads(before)


class Broken(dfl.Callback):
    def on_round_end(self, run, control, record):
        raise ZeroDivisionError("no")


class Signal(dfl.Callback):
    def on_round_end(self, run, control, record):
        if run.round == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.long
def test_twice_in_one_process_gives_the_bits_of_the_command(tree, tmp_path):
    with unchanged():
        first = dfl.train(tree)
    torch.rand(7)  # what the process draws does not reach the run
    with unchanged():
        second = dfl.train(tree, output=tmp_path / "second")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree | {"output": str(tmp_path / "third")}))
    assert main(["train", str(tmp_path / "my.yaml")]) == 0
    one, two, three = (tiny_runs.adapter_digests(run) for run in (first.folder, second.folder, tmp_path / "third"))
    assert len(one) == 5 and one == two == three


@pytest.mark.long
def test_a_path_a_mapping_and_a_config_are_the_same(tree, tmp_path):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree | {"output": str(tmp_path / "run")}))
    overrides = {"train__rounds": 1, "method": {"name": "tad", "T": 2}, "overwrite": True, "train__betas": (0.8, 0.9)}
    trees = [dfl.train(config, **overrides).config.to_dict() for config in (
        tree, tmp_path / "my.yaml", str(tmp_path / "my.yaml"), resolve(tree | {"output": str(tmp_path / "run")}))]
    assert trees[0] == trees[1] == trees[2] == trees[3]
    assert trees[0]["train"]["rounds"] == 1 and trees[0]["train"]["betas"] == [0.8, 0.9]
    assert trees[0]["method"] == {"name": "tad", "T": 2}


@pytest.mark.long
def test_what_it_returns_is_what_the_run_has_left(tree, tmp_path):
    result = dfl.train(tree, baseline="local", method="decaf")
    assert result.finished and result.rounds == 4 and [record["round"] for record in result.metrics] == [0, 1, 2, 3, 4]
    assert [row["round"] for row in result.table()] == [0, 2, 4]
    assert result.table()[-1]["eval/accuracy/mean"] == result.metrics[-1]["eval"]["accuracy"]["mean"]
    assert result.baseline.finished and result.baseline.config.method.name == "local" and result.baseline.baseline is None
    stored = load_file(result.checkpoint / "peer-2" / "adapter_model.safetensors")
    assert all(torch.equal(stored[name], value) for name, value in result.adapter(2).items()) and stored
    assert list(result.adapters) == list(result.peers) == [0, 1, 2, 3]
    for peer, state in ((2, result.adapter(2)), ("consensus", result.consensus)):
        model = result.load(peer)
        assert isinstance(model, PeftModel) and not model.training
        loaded = get_peft_model_state_dict(model)
        assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert model(**result.processor()(["good film"], return_tensors="pt")).logits.shape == (1, 2)
    assert result.metrics == dfl.Result(tmp_path / "run").metrics
    with pytest.raises(ValueError, match="peer '4' is not in .* allowed: 0 to 3, consensus"):
        result.load(4)


@pytest.mark.long
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(tree, tmp_path):
    with unchanged():
        halted = dfl.train(tree, callbacks=[Signal])
    assert not halted.finished and halted.rounds < 4
    with unchanged():
        done = dfl.train(tree, resume=True)
    whole = dfl.train(tree, output=tmp_path / "whole")
    assert done.finished and done.rounds == 4
    assert tiny_runs.adapter_digests(done.folder) == tiny_runs.adapter_digests(whole.folder)


def test_errors_are_raised_and_change_nothing_either(tree):
    cases = ((ValueError, "train.lr = 'fast'", {"train__lr": "fast"}),
             (ValueError, "unknown key 'trian'", {"trian__lr": 1}),
             (ValueError, "no such column", {"data__label": "lable"}),
             (CallbackError, "ZeroDivisionError", {"callbacks": [Broken], "overwrite": True}),
             (DivergenceError, "diverged in round", {"train__lr": 1e38, "train__clip": None, "overwrite": True}))
    for expected, said, given in cases:
        with unchanged(), pytest.raises(expected, match=said):
            dfl.train(tree, **given)
    with pytest.raises(ValueError, match="already holds a run"):
        dfl.train(tree)
    with pytest.raises(ValueError, match="config = 5 is not allowed"):
        dfl.train(5)
    with pytest.raises(ValueError, match="holds no run"):
        dfl.Result("nowhere")


def test_a_signal_before_there_is_a_run_is_an_interrupt(tree, monkeypatch):
    monkeypatch.setattr(interface, "run_to_the_end", lambda *given, **more: 75)
    with pytest.raises(KeyboardInterrupt, match="before the run began"):
        dfl.train(tree)


@pytest.mark.long
def test_a_thread_beside_the_main_one_may_train(tree, tmp_path):
    found = []
    with unchanged():
        thread = threading.Thread(target=lambda: found.append(dfl.train(tree)))
        thread.start()
        thread.join()
    run_to_the_end(resolve(tree | {"output": str(tmp_path / "main")}))
    assert found and found[0].finished
    assert tiny_runs.adapter_digests(found[0].folder) == tiny_runs.adapter_digests(tmp_path / "main")


def test_importing_dfl_waits_for_no_torch():
    program = "import sys, dfl; dfl.Result; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
