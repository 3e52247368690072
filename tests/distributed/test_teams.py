"""Peers of several processes each, that hold the base model in parts: the factors of peers of one process each, up to rounding."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from processes import run_processes
from safetensors.torch import load_file
from tiny_runs import adapter_digests, lasting, make_config, stop_after, train_worker, write_data

from dfl import config as configuration
from dfl.run import train as running
from dfl.run.build import in_parts, load
from dfl.run.checkpoint import read_state
from dfl.run.runtime import start
from dfl.store.checkpoints import latest
from dfl.store.records import read_lines
from dfl.training.sharding import bytes_of

pytestmark = pytest.mark.distributed

CHAT = '{"prompt": "good film", "response": "%s how what"}\n{"prompt": "a bad node", "response": "%s"}\n'
PAIR = '{"prompt": "%s film", "chosen": "good and good", "rejected": "bad"}\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("teams")
    write_data(made)
    tiny_models.save(made / "bert", "bert")
    tiny_models.save(made / "llama", "llama")
    words = tiny_models.WORDS
    (made / "chat.jsonl").write_text("".join(CHAT % (words[k % 9], " ".join(words[:k % 5 + 1])) for k in range(24)))
    (made / "pairs.jsonl").write_text("".join(PAIR % words[k % len(words)] for k in range(40)))
    return made


# dropout in the base model and in the adapters, token-weighted losses of accumulated batches, parts of unequal size, an evaluation
# whose last batch has fewer examples than a team has processes
RECIPES = {
    "classes": {"model": "bert", "data": "data.csv", "method": "tad", "lora__dropout": 0.1, "lora__head": "mixed",
                "train__batch_size": 5, "eval__batch_size": 11},
    "tokens": {"model": "llama", "data": "chat.jsonl", "model__task": "causal_lm", "data__prompt": "prompt",
               "data__response": "response", "train__accumulation": 2, "train__batch_size": 3, "lora__dropout": 0.2,
               "train__gradient_checkpointing": True, "method": "decaf", "train__state": "carried"},
    "pairs": {"model": "llama", "data": "pairs.jsonl", "model__task": "preference", "data__prompt": "prompt", "lora__adapter": "dora",
              "method": "lora", "eval__batch_size": 3, "delay": 1},
    "residual": {"model": "llama", "data": "chat.jsonl", "model__task": "causal_lm", "data__prompt": "prompt",
                 "data__response": "response", "method": "flora", "topology": "complete"},
    "cores": {"model": "bert", "data": "data.csv", "method": "fed_sb", "lora__adapter": "sb", "train__batch_size": 2},
}


def recipe(folder: Path, output: Path, name: str, **fields) -> configuration.Config:
    chosen = dict(RECIPES[name])
    model, data = chosen.pop("model"), chosen.pop("data")
    base = {"peers": 2, "train__rounds": 3, "train__lr": 0.01, "eval__every": 2, "checkpoint__every": 1, "timeout": 60}
    return make_config(folder / model, folder / data, output, **(base | chosen | fields | {"processes": None}))


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Factors of both peers, and the products of their adapters with what the rule keeps beside them."""
    found = {name: value for name, value in read_state(latest(run), range(2)).items() if name.startswith("x.")}
    for peer in ("peer-0", "peer-1"):
        folder = latest(run) / peer
        scaling = (lambda about: about["lora_alpha"] / about["r"])(json.loads((folder / "adapter_config.json").read_text()))
        tensors = load_file(folder / "adapter_model.safetensors")
        found |= {f"{peer}.{name}": scaling * tensors[name.replace("lora_A", "lora_B")] @ a for name, a in tensors.items()
                  if "lora_A" in name}
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_two_peers_of_two_processes_are_two_peers_of_one(folder, tmp_path, name):
    found, records = [], []
    run_processes(train_worker, 2, recipe(folder, tmp_path / "still", name, train__lr=0, delay=0).to_dict(), timeout=150)
    for each in (1, 2):
        config = recipe(folder, tmp_path / str(each), name, processes_per_peer=each)
        assert run_processes(train_worker, 2 * each, config.to_dict(), timeout=150) == [0] * 2 * each
        found.append(state_of(tmp_path / str(each)))
        records.append(read_lines(tmp_path / str(each) / "metrics.jsonl"))
        assert sorted(path.name for path in (tmp_path / str(each)).glob("metrics*")) == ["metrics-1.jsonl", "metrics.jsonl"]
    still = state_of(tmp_path / "still")
    assert any(not torch.allclose(value, found[0][name], atol=1e-3) for name, value in still.items())  # it has learnt something
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-5)
    for one, other in zip(*records, strict=True):
        assert one.get("train_loss_peers", []) == pytest.approx(other.get("train_loss_peers", []), rel=1e-4)
        if "eval" in one:
            for metric, values in one["eval"]["peers"].items():
                assert values == pytest.approx(other["eval"]["peers"][metric], rel=1e-4), metric


def parts_worker(rank: int, tree: dict) -> tuple[int, int]:
    """Bytes of the weights before and after."""
    config = configuration.from_dict(tree)
    runtime = start(config)
    loaded = load(config, runtime.device)
    before = bytes_of(loaded.adapted.model)
    in_parts(config, runtime, loaded)
    after = bytes_of(loaded.adapted.model)
    runtime.team.close()
    return before, after


def test_each_process_keeps_its_part_of_the_base_model(folder, tmp_path):
    config = recipe(folder, tmp_path / "run", "tokens", processes_per_peer=2)
    for before, after in run_processes(parts_worker, 2, config.to_dict()):
        assert 0.45 * before < after < 0.6 * before


def stopped_worker(rank: int, tree: dict, stopped: dict) -> list:
    """A whole run, and one that is stopped in the middle of its second round and goes on."""
    config, halves = configuration.from_dict(tree), configuration.from_dict(stopped)
    found = [running.train(config)]
    if rank % 2 == 0:
        stop_after(running, 1, steps=1)
    found.append(running.train(halves))
    from dfl.transport import stopping
    running.StopSignal, running.Halt = stopping.StopSignal, stopping.Halt
    return [*found, running.train(halves, resume=True)]


def test_stopped_between_two_steps_and_resumed_ends_in_the_same_bits(folder, tmp_path):
    whole, halves = (recipe(folder, tmp_path / name, "tokens", processes_per_peer=2, train__local_steps=3).to_dict()
                     for name in ("whole", "halves"))
    assert run_processes(stopped_worker, 4, whole, halves, timeout=150) == [[0, running.STOPPED, 0]] * 4
    assert adapter_digests(tmp_path / "halves") == adapter_digests(tmp_path / "whole")
    assert [lasting(line) for line in read_lines(tmp_path / "halves" / "metrics.jsonl")] == \
        [lasting(line) for line in read_lines(tmp_path / "whole" / "metrics.jsonl")]


def killed_worker(rank: int, tree: dict, victim: int) -> str:
    """Process `victim` is killed behind its second step."""
    from dfl.training import together
    if rank == victim:
        steps, take = [], together.Together._pass

        def last(*arguments):
            steps.append(1)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return take(*arguments)

        together.Together._pass = last
    started = time.monotonic()
    try:
        running.train(configuration.from_dict(tree))
    except ConnectionError as error:
        assert time.monotonic() - started < 60
        return str(error)
    return "finished"


@pytest.mark.parametrize("victim", [2, 3])
def test_the_others_name_the_peer_that_has_lost_a_process(folder, tmp_path, victim):
    config = recipe(folder, tmp_path / "run", "tokens", processes_per_peer=2)
    said = run_processes(killed_worker, 4, config.to_dict(), victim, timeout=120, lost=[victim])
    assert "(peer 1, host " in said[0], said
    other = said[5 - victim]
    assert f"process {victim}, which holds another part of the same base model, is gone" in other, said
    if victim == 3:  # the first process of its peer has told the run why
        assert "process 3, which holds another part" in said[0], said


def silent_worker(rank: int, tree: dict, victim: int, folder: str) -> str:
    """Process `victim` is stopped before its third pass, and the others would wait for ten minutes; the last words of who ends lie
    in a file."""
    from dfl.training import together
    from dfl.transport import watch
    watch.SILENT_SECONDS, watch.BEAT_SECONDS = 3.0, 0.5
    with open(f"{folder}/said-{rank}", "wb") as file:
        os.dup2(file.fileno(), 2)
    if rank == victim:
        passes, name = [], "gradients" if rank % 2 == 0 else "_pass"
        take = getattr(together.Together, name)

        def last(*arguments):
            passes.append(1)
            if len(passes) == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            return take(*arguments)

        setattr(together.Together, name, last)
    try:
        running.train(configuration.from_dict(tree))
    except ConnectionError as error:
        return str(error)
    return "finished"


@pytest.mark.parametrize("victim", [2, 3])
def test_a_stopped_process_of_a_peer_is_named_long_before_the_timeout(folder, tmp_path, victim):
    """Its fellow, which waits for a layer of the base model or for what comes next, ends with a line; the other peer is told."""
    config = recipe(folder, tmp_path / "run", "tokens", processes_per_peer=2, timeout=600)
    started = time.monotonic()
    said = run_processes(silent_worker, 4, config.to_dict(), victim, str(tmp_path), timeout=90, lost=[2, 3])
    assert time.monotonic() - started < 60
    assert "(peer 1, host " in said[0] and "has shown no life for" in said[0], said
    words = f"process {victim}, which holds another part of the same base model, has shown no life for 3 s"
    until = time.monotonic() + 20
    while words not in (tmp_path / f"said-{5 - victim}").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert words in (tmp_path / f"said-{5 - victim}").read_text()
    assert victim == 2 or words in said[0], said


def failing_worker(rank: int, tree: dict) -> str:
    """Process 3 cannot read what the others read."""
    if rank == 3:
        tree = tree | {"data": tree["data"] | {"train": "nowhere.jsonl"}}
    try:
        running.train(configuration.from_dict(tree))
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "finished"


def test_an_error_of_a_process_that_serves_is_told_to_all(folder, tmp_path):
    said = run_processes(failing_worker, 4, recipe(folder, tmp_path / "run", "tokens", processes_per_peer=2).to_dict(), timeout=120)
    assert all("nowhere.jsonl" in text for text in said if "nothing" not in text), said


def uneven_worker(rank: int, tree: dict) -> str:
    with pytest.raises(ValueError) as error:
        running.train(configuration.from_dict(tree))
    return str(error.value)


def test_processes_that_are_no_multiple_are_refused_by_all(folder, tmp_path):
    config = recipe(folder, tmp_path / "run", "classes", processes_per_peer=2)
    for text in run_processes(uneven_worker, 3, config.to_dict()):
        assert text == "processes_per_peer = 2 and 3 process(es) were started; allowed: a multiple of 2, as by torchrun " \
                       "--nproc-per-node 2"
