"""Own scripts under the real torchrun: a patched trainer against `dfl train`, TRL on real text, stop and resume."""

import configparser
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny_models
import tiny_runs
import torch
import yaml
from safetensors.torch import load_file
from tiny_runs import rows_of

from dfl.store.checkpoints import latest
from dfl.store.runs import read_run

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]  # a start of torchrun takes ten CPU seconds for each of its processes
TESTS = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def torchrun(processes: int, *words, status: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(["torchrun", "--standalone", "--nproc-per-node", str(processes), *map(str, words)], cwd=cwd, text=True,
                          env=ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}, capture_output=True)
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.core
@pytest.mark.parametrize(("method", "state"), [("tad", "fresh"), ("decaf", "carried")])
def test_a_patched_trainer_ends_where_dfl_train_does(tmp_path, method, state):
    """Three mixes, the same batches in the same order, the same optimiser; moments anew in every round, or carried and turned."""
    folder = tiny_runs.make_folder(tmp_path)
    config = tiny_runs.make_config(folder / "bert", folder / "data.csv", tmp_path / "run", peers=3, topology="star", method=method,
                                   train__rounds=3, train__local_steps=2, train__state=state, train__lr=0.01, model__dropout=0,
                                   eval__every=0)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(config.to_dict()))
    tiny_runs.train(config)
    expected = rows_of(latest(tmp_path / "run"), 3)
    torchrun(3, TESTS / "own_trainer.py", recipe, tmp_path / "script")
    found = torch.stack([torch.load(tmp_path / "script" / f"row-{k}.pt") for k in range(3)])
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    run = read_run(tmp_path / "script")
    assert run.done == 3 and run.finished and all(len(record["train_loss_peers"]) == 3 for record in run.records)
    losses = [record["train_loss"]["mean"] for record in read_run(tmp_path / "run").records[1:]]
    assert [record["train_loss"]["mean"] for record in run.records] == pytest.approx(losses, abs=1e-4)


def chat_recipe(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Of two peers of two processes, with losses of unequally many tokens; and the rows of two peers of one by `dfl train`."""
    lines = [{"prompt": "good film", "response": " ".join(tiny_models.WORDS[:k % 5 + 1])} for k in range(48)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tiny_runs.make_config(tiny_models.save(tmp_path / "llama", "llama"), tmp_path / "chat.jsonl", tmp_path / "run", peers=2,
                                   method="tad", method__T=1, train__rounds=3, train__local_steps=2, train__state="carried",
                                   train__lr=0.01, eval__every=0, model__task="causal_lm", data__prompt="prompt",
                                   data__response="response")
    tiny_runs.train(config)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump(config.to_dict() | {"processes_per_peer": 2}))
    return recipe, rows_of(latest(tmp_path / "run"), 2)


def test_a_peer_of_two_processes_ends_where_one_of_one_does(tmp_path):
    """Two peers, whose trainers are data parallel over two processes each; one that was killed and goes on ends in the same bits."""
    recipe, expected = chat_recipe(tmp_path)
    torchrun(4, TESTS / "own_trainer.py", recipe, tmp_path / "script")
    rows = {name: torch.load(tmp_path / "script" / f"row-{name}.pt") for name in ("0", "0-1", "1", "1-1")}
    assert torch.equal(rows["0"], rows["0-1"]) and torch.equal(rows["1"], rows["1-1"])
    torch.testing.assert_close(torch.stack([rows["0"], rows["1"]]), expected, rtol=0, atol=1e-5)
    run = read_run(tmp_path / "script")
    assert run.done == 3 and run.finished and sorted(path.name for path in (tmp_path / "script").glob("metrics*")) == \
        ["metrics-1.jsonl", "metrics.jsonl"]
    torchrun(4, TESTS / "own_trainer.py", recipe, tmp_path / "halves", "3", status=1)
    torchrun(4, TESTS / "own_trainer.py", recipe, tmp_path / "halves", "resume")
    assert all(torch.equal(torch.load(tmp_path / "halves" / f"row-{name}.pt"), row) for name, row in rows.items())


LOOP = """
import sys
import own_loop
import torch
import torch.distributed as dist
import dfl

each, folder = int(sys.argv[1]), sys.argv[2]
inner = own_loop.model()
optimizer = own_loop.adamw(inner)
gossip = dfl.Gossip(inner, optimizer, 2, method="tad", method__T=1, topology="ring", processes_per_peer=each)
net, peer = inner, gossip.peer
if each > 1:
    dist.init_process_group("gloo")
    net = torch.nn.parallel.DistributedDataParallel(inner, find_unused_parameters=True)
with gossip:
    for number in range(6):
        x, y = (part[peer.member::each] for part in own_loop.batch(gossip.rank, number, 6))
        (net(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
torch.save(torch.cat([v.flatten() for v in own_loop.factors(inner).values()]), f"{folder}/{each}-{gossip.rank}-{peer.member}.pt")
"""


PARTS = """
import own_loop
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import dfl.hf

each, folder = int(sys.argv[1]), sys.argv[2]
peer = dfl.hf.join(method="tad", method__T=1, topology="ring", every=2, processes_per_peer=each, output=False)
net = own_loop.model()
if each > 1:
    dist.init_process_group("gloo")
    for layer in (net.base_model.model.first, net.base_model.model.second):
        fully_shard(layer)
    fully_shard(net)
optimizer = own_loop.adamw(net)
with dfl.Gossip(net, optimizer) as gossip:
    for number in range(6):
        x, y = (part[peer.member::each] for part in own_loop.batch(gossip.rank, number, 6))
        (net(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
torch.save(torch.cat([v.flatten() for v in own_loop.factors(net).values()]), f"{folder}/{each}-{gossip.rank}-{peer.member}.pt")
"""


@pytest.mark.parametrize("loop", [LOOP, PARTS], ids=["data parallel", "in parts"])
def test_a_plain_loop_on_several_processes_of_a_peer_is_that_of_one(tmp_path, loop):
    (tmp_path / "loop.py").write_text(f"import sys; sys.path.append({str(TESTS)!r})\n{loop}")
    for each in (1, 2):
        torchrun(2 * each, tmp_path / "loop.py", each, tmp_path)
    for peer in (0, 1):
        alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in (f"1-{peer}-0", f"2-{peer}-0", f"2-{peer}-1"))
        torch.testing.assert_close(first, alone, rtol=0, atol=1e-5)
        assert torch.equal(first, second)


def test_a_trainer_that_holds_its_model_in_parts_ends_where_dfl_train_does(tmp_path):
    """By FSDP2 of accelerate and transformers, on the two processes of each of two peers; killed, it goes on to the same bits."""
    recipe, expected = chat_recipe(tmp_path)
    torchrun(4, TESTS / "own_trainer.py", recipe, tmp_path / "script", "", "parts")
    rows = {name: torch.load(tmp_path / "script" / f"row-{name}.pt") for name in ("0", "0-1", "1", "1-1")}
    assert torch.equal(rows["0"], rows["0-1"]) and torch.equal(rows["1"], rows["1-1"])
    torch.testing.assert_close(torch.stack([rows["0"], rows["1"]]), expected, rtol=0, atol=1e-5)
    assert read_run(tmp_path / "script").done == 3
    torchrun(4, TESTS / "own_trainer.py", recipe, tmp_path / "halves", "3", "parts", status=1)
    torchrun(4, TESTS / "own_trainer.py", recipe, tmp_path / "halves", "resume", "parts")
    assert all(torch.equal(torch.load(tmp_path / "halves" / f"row-{name}.pt"), row) for name, row in rows.items())


GRPO = """
import sys
import datasets
import dfl.hf
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

model, output = sys.argv[1:]
peer = dfl.hf.join(method="lora", topology="ring", every=2, output=output)
asked = []


def reward(completions, **_others):
    asked.append(len(completions))
    return [float(len(text) % 7) for text in completions]


args = GRPOConfig(output_dir=output, max_steps=4, per_device_train_batch_size=4, num_generations=4, max_completion_length=8,
                  learning_rate=0.01, use_cpu=True, bf16=False, report_to=[], save_strategy="no", logging_steps=1)
data = datasets.Dataset.from_dict({"prompt": ["good film", "bad film", "good day", "bad day"] * 4})
trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=peer.shard(data),
                      peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
dfl.hf.patch(trainer)
trainer.train()
assert sum(asked) >= 16, asked
"""


def test_two_peers_of_a_grpo_script(tmp_path):
    """Answers are drawn and rewarded by each peer alone; factors are mixed, here to the mean of two."""
    pytest.importorskip("trl")
    tiny_models.save(tmp_path / "llama", "llama")
    (tmp_path / "grpo.py").write_text(GRPO)
    torchrun(2, tmp_path / "grpo.py", tmp_path / "llama", tmp_path / "run")
    run, rows = read_run(tmp_path / "run"), rows_of(latest(tmp_path / "run"), 2)
    assert run.done == 2 and run.finished and not run.problems
    assert torch.equal(rows[0], rows[1])
    moved = load_file(latest(tmp_path / "run") / "peer-0" / "adapter_model.safetensors")
    assert any("lora_B" in name and bool(value.any()) for name, value in moved.items())  # which begin at zero


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_oldest_transformers_and_trl_that_we_name_keep_the_contract(tmp_path):
    """The newest are those of this environment. The tests of a patched trainer, and of DPOTrainer where there are data."""
    declared = configparser.ConfigParser()
    declared.read(TESTS.parent / "setup.cfg")
    wanted = declared["options"]["install_requires"] + declared["options.extras_require"]["trl"]
    oldest = [f"{name}=={re.search(rf'^{name}>=([0-9.]+)$', wanted, re.M)[1]}.0" for name in ("transformers", "trl")]
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path / "old")]
    subprocess.run([*install, oldest[0], f"numpy=={version('numpy')}"], check=True)  # with what it wants older than the newest does
    subprocess.run([*install, "--no-deps", oldest[1]], check=True)  # which would bring a torch
    env = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path / 'old'}"}
    told = subprocess.run([sys.executable, "-c", "import transformers, trl; print(transformers.__version__, trl.__version__)"],
                          env=env, text=True, capture_output=True)
    assert told.stdout.split() == [one.partition("==")[2] for one in oldest], told.stderr
    tests = [TESTS / "pure" / "test_hf.py", f"{TESTS}/real/test_own_trainers.py::test_two_peers_of_a_dpo_script"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-5000:]
