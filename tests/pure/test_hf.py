"""`dfl.hf` in one process: what the launcher has said is forgotten, what a trainer must not do, names, and a peer alone."""

import json
import types
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
import transformers
from own_loop import without_launcher  # noqa: F401
from transformers.training_args import ParallelMode

import dfl.hf
from dfl.cli import main
from dfl.hf import callback, resume
from dfl.run.runtime import Place
from dfl.script import joining
from dfl.store.runs import read_run

pytestmark = pytest.mark.usefixtures("without_launcher")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("hf") / "llama", "llama", layers=1)


def make_trainer(llama: Path, output: Path, **options) -> transformers.Trainer:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    examples = [{"input_ids": torch.randint(0, 20, (6,)), "labels": torch.randint(0, 20, (6,))} for _ in range(12)]
    given = {"max_steps": 5, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "logging_steps": 1,
             "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2} | options
    return transformers.Trainer(model, transformers.TrainingArguments(output_dir=str(output), **given), train_dataset=examples,
                                eval_dataset=examples[:4])


def factors(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora" in name}


def test_a_peer_alone_trains_evaluates_and_leaves_a_run(llama, tmp_path):
    dfl.hf.join(every=2, method="lora")
    trainer = dfl.hf.patch(make_trainer(llama, tmp_path / "out", eval_strategy="steps", eval_steps=2, eval_on_start=True))
    trainer.train()
    run = read_run(tmp_path / "out")
    assert [record["round"] for record in run.records] == [0, 1, 2, 3] and run.finished and run.total == 3 and not run.problems
    assert all("perplexity" in record["eval"] for record in run.records[:3])
    assert all(record["train_loss"]["mean"] > 0 for record in run.records[1:])
    assert run.facts["primary"] == "loss" and run.facts["shards"]["examples"] == [12]
    saved = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(llama),
                                           tmp_path / "out/checkpoints/round-00003/peer-0")
    for name, value in factors(trainer).items():
        assert torch.equal(saved.get_parameter(name), value), name


def test_the_run_of_a_script_is_exported_and_says_whose_examples_it_had(llama, tmp_path, capsys):
    dfl.hf.join(every=2, method="lora")
    dfl.hf.patch(make_trainer(llama, tmp_path / "out", eval_strategy="steps", eval_steps=5)).train()
    assert main(["export", str(tmp_path / "out"), "--peer", "consensus", "--output", str(tmp_path / "adapter")]) == 0
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Trained on what the script gave each peer (12 to 12 examples a peer)" in card and "optimiser |" not in card
    assert "On the script's own evaluation examples" in card
    assert main(["eval", str(tmp_path / "out")]) == 2
    assert "give --data FILE" in capsys.readouterr().err
    (tmp_path / "texts.csv").write_text("text\nthe graph of a node\nthe tensor\n")
    assert main(["eval", str(tmp_path / "out"), "--peer", "0", "--data", str(tmp_path / "texts.csv"), "--data.text", "text"]) == 0


def test_alone_it_trains_as_a_script_without_these_lines_does(llama, tmp_path):
    plain = make_trainer(llama, tmp_path / "plain")
    plain.train()
    dfl.hf.join(every=2, method="lora", output=False)
    patched = dfl.hf.patch(make_trainer(llama, tmp_path / "patched"))
    patched.train()
    for name, value in factors(plain).items():
        assert torch.equal(value, factors(patched)[name]), name
    assert not (tmp_path / "patched" / "run.json").exists()  # output = False


def test_a_stopped_training_goes_on_to_the_same_factors(llama, tmp_path):
    dfl.hf.join(every=2, method="tad", overwrite=True, topology="ring")
    whole = dfl.hf.patch(make_trainer(llama, tmp_path / "out", save_strategy="steps", save_steps=3))
    whole.train()
    for name in ("checkpoint-5",):
        (tmp_path / "out" / "peer-0" / name / resume.NAME).unlink()  # as if it had been killed while it saved
    again = dfl.hf.patch(make_trainer(llama, tmp_path / "out", save_strategy="steps", save_steps=3))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5
    for name, value in factors(whole).items():
        assert torch.equal(value, factors(again)[name]), name
    run = read_run(tmp_path / "out")
    assert [record["round"] for record in run.records] == [1, 2, 3] and run.about["resumed"]


def test_resume_names_what_a_checkpoint_lacks(llama, tmp_path):
    peer = dfl.hf.join(output=False)
    with pytest.raises(ValueError, match="no step has a whole checkpoint of every peer"):
        resume.choose(peer, True, tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=r"holds no state of gossip \(dfl.safetensors\)"):
        resume.read(resume.choose(peer, str(tmp_path / "checkpoint-3"), tmp_path))
    (tmp_path / "checkpoint-3" / resume.NAME).write_bytes(b"half of a fi")
    with pytest.raises(ValueError, match="is damaged"):
        resume.read(tmp_path / "checkpoint-3")
    assert resume.choose(peer, None, tmp_path) is None


@pytest.mark.parametrize(("change", "said"), [
    ({"args": {"auto_find_batch_size": True}}, "auto_find_batch_size"), ({"is_deepspeed_enabled": True}, "DeepSpeed"),
    ({"args": {"fsdp": True}, "members": 2}, "accelerate divides no model without GPUs"),
    ({"args": {"fsdp": True}, "is_fsdp_enabled": True, "version": 1, "members": 2}, "give fsdp_config = {'version': 2}"),
    ({"args": {"fsdp": True}, "is_fsdp_enabled": True, "version": 2}, "one process is this peer; give .*processes_per_peer"),
    ({"args": {"parallel_mode": ParallelMode.DISTRIBUTED}}, "distributed"),
    ({"args": {"parallel_mode": ParallelMode.NOT_DISTRIBUTED}}, "before anything touches a GPU"),
    ({"members": 2}, "2 are this peer"), ({"members": 3, "args": {"parallel_mode": ParallelMode.DISTRIBUTED}}, "3 are this peer"),
    ({"args": {"push_to_hub": True}, "size": 4}, "one repository")])
def test_a_trainer_that_splits_a_peer_is_refused(change, said):
    from dfl.hf.trainer import check
    args = {"auto_find_batch_size": False, "push_to_hub": False, "world_size": 2, "n_gpu": 2,
            "parallel_mode": ParallelMode.NOT_PARALLEL} | change.get("args", {})
    handler = types.SimpleNamespace(callbacks=[])
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(**args), callback_handler=handler, is_deepspeed_enabled=False,
                                    is_fsdp_enabled=False)
    plugin = types.SimpleNamespace(fsdp_version=change.get("version"))
    trainer.accelerator = types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin))
    vars(trainer).update({key: value for key, value in change.items() if key.startswith("is_")})
    with pytest.raises(ValueError, match=said):
        check(trainer, types.SimpleNamespace(size=change.get("size", 1), rank=0, members=change.get("members", 1)))


def test_patch_wants_a_trainer_and_join_before_it(llama, tmp_path):
    with pytest.raises(ValueError, match="comes first"):
        dfl.hf.patch(object())
    dfl.hf.join(output=False)
    with pytest.raises(ValueError, match="got a object"):
        dfl.hf.patch(object())
    trainer = dfl.hf.patch(make_trainer(llama, tmp_path))
    with pytest.raises(ValueError, match="patched already"):
        dfl.hf.patch(trainer)
    with pytest.raises(ValueError, match="joined already"):
        dfl.hf.join()


def test_every_peer_has_names_of_its_own(llama, tmp_path):
    from dfl.hf.trainer import own_names
    trainer = make_trainer(llama, tmp_path / "out", seed=7)
    own_names(trainer, types.SimpleNamespace(rank=2, size=4))
    assert trainer.args.output_dir == str(tmp_path / "out" / "peer-2") and trainer.args.run_name == "out-peer-2"
    assert trainer.args.data_seed == 9 == trainer.accelerator.dataloader_config.data_seed
    trainer = make_trainer(llama, tmp_path / "out", seed=7, run_name="mine")
    own_names(trainer, types.SimpleNamespace(rank=0, size=1))
    assert (trainer.args.run_name, trainer.args.data_seed) == ("mine-peer-0", None)  # the order of a script that is alone


def test_the_launcher_is_forgotten():
    """transformers, accelerate and TRL must find one process: each of these variables would split data or model."""
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1",
           "PMI_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "HOME": "/me"}
    joining.forget_launcher(env)
    assert env == {"HOME": "/me"}


def test_mpirun_counts_as_a_launcher_where_it_says_where_to_meet():
    env = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        joining.from_mpi(dict(env))
    found = joining.from_mpi(env | {"MASTER_ADDR": "host", "MASTER_PORT": "29500"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("2", "4", "0")
    assert joining.from_mpi({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}).get("RANK") is None


def test_the_processes_of_a_peer_see_its_gpus(tmp_path):
    seen = []
    for rank in range(4):
        joining.own_gpus(Place(rank, 4, rank, 4), env := {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, tmp_path, each=2)
        seen.append(env["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4,5", "4,5", "6,7", "6,7"]


@pytest.mark.parametrize(("env", "local_rank", "seen"), [
    ({"CUDA_VISIBLE_DEVICES": "4,6,7"}, 1, "6"), ({"CUDA_VISIBLE_DEVICES": "4,6"}, 3, "6"), ({}, 1, "1"), ({}, 5, "2"),
    ({"CUDA_VISIBLE_DEVICES": ""}, 1, "")])
def test_a_peer_sees_one_gpu(env, local_rank, seen, tmp_path):
    for name in ("0000:1a", "0000:2a", "0000:3a"):
        (tmp_path / name).mkdir()
    joining.own_gpus(Place(local_rank, 8, local_rank, 8), env, tmp_path)
    assert env["CUDA_VISIBLE_DEVICES"] == seen


def test_metrics_of_an_evaluation():
    found = {"eval_loss": 1.0, "eval_runtime": 3.0, "eval_samples_per_second": 9.0, "eval_mean_token_accuracy": 0.5, "epoch": 1.0,
             "eval_num_tokens": 7, "eval_long_runtime": 1.0}
    assert callback.metrics_of(found) == {"loss": 1.0, "mean_token_accuracy": 0.5}


def test_an_error_in_the_training_ends_the_gossip(llama, tmp_path):
    dfl.hf.join(every=2, output=tmp_path / "run")
    trainer = dfl.hf.patch(make_trainer(llama, tmp_path / "out"))

    class Broken(transformers.TrainerCallback):
        def on_step_end(self, *arguments, **named):
            raise RuntimeError("no more")

    trainer.add_callback(Broken())
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert joining.current() is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["facts"]["processes"] == 1


def test_axolotl_s_plug_in_keeps_its_contract(llama, tmp_path, monkeypatch):
    """The methods that axolotl 0.19 calls, by name and parameters, and when: `register` before the arguments are made."""
    import inspect

    from dfl.hf import axolotl
    contract = {"get_input_args": ["self"], "register": ["self", "cfg"], "post_trainer_create": ["self", "cfg", "trainer"]}
    for name, parameters in contract.items():
        assert list(inspect.signature(getattr(axolotl.GossipPlugin, name)).parameters) == parameters
        if axolotl.BasePlugin is not object:
            assert list(inspect.signature(getattr(axolotl.BasePlugin, name)).parameters) == parameters
    plugin = axolotl.GossipPlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    assert module == axolotl.__name__ and "gossip" in getattr(axolotl, name).model_fields
    with pytest.raises(ValueError, match="gossip = None"):
        plugin.register({})
    words = {"gossip": {"method": "lora", "every": 2, "output": str(tmp_path / "run")}}
    plugin.register(words)
    plugin.register(words)  # axolotl does so twice
    trainer = make_trainer(llama, tmp_path / "out")
    plugin.post_trainer_create(words, trainer)
    trainer.train()
    assert read_run(tmp_path / "run").done == 3
