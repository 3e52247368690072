"""Names of transformers and PEFT: the same configuration as with ours, one name a field, and a reason for what cannot be had."""

import json

import pytest
import yaml

from dfl.config import load, resolve
from dfl.config.aliases import ALIASES, REFUSED

OURS = """
peers: 8
model: {name: FacebookAI/roberta-base, task: sequence_classification}
data: {source: file, train: my/train.csv, valid: my/valid.csv, text: sentence, label: label}
lora: {rank: 4, alpha: 8, dropout: 0.1, targets: [query, value], rslora: true, head: mixed}
rule: {name: tad, T: auto}
topology: {name: edge_activation, base: complete, p: 0.2}
seed: 3
data_seed: 4
train: {rounds: 100, local_steps: 20, batch_size: 32, accumulation: 2, lr: 5.0e-4, clip: null, weight_decay: 0.01,
        betas: [0.8, 0.95], eps: 1.0e-6, optimizer: adamw, schedule: linear, warmup: 0.1, autocast: bfloat16}
eval: {every: 5, batch_size: 16}
checkpoint: {every: 10, keep: 3}
report_to: []
output: runs/mine
"""
THEIRS = """
peers: 8
model: {name: FacebookAI/roberta-base, task: sequence_classification}
data: {source: file, train: my/train.csv, valid: my/valid.csv, text: sentence, label: label}
lora: {r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: [query, value], use_rslora: true, head: mixed}
rule: {name: tad, T: auto}
topology: {name: edge_activation, base: complete, p: 0.2}
seed: 3
data_seed: 4
train: {rounds: 100, local_steps: 20}
per_device_train_batch_size: 32
per_device_eval_batch_size: 16
gradient_accumulation_steps: 2
learning_rate: 5e-4
max_grad_norm: 0
weight_decay: 0.01
adam_beta1: 0.8
adam_beta2: 0.95
adam_epsilon: 1e-6
optim: adamw_torch_fused
lr_scheduler_type: linear
warmup_ratio: 0.1
bf16: true
fp16: false
logging_steps: 20
eval_steps: 100
save_steps: 200
save_total_limit: 3
report_to: none
output_dir: runs/mine
"""


def test_a_recipe_in_their_names_is_the_recipe_in_ours(tmp_path):
    for name, text in (("ours", OURS), ("theirs", THEIRS)):
        (tmp_path / name).write_text(text)
    ours, theirs = load(tmp_path / "ours"), load(tmp_path / "theirs")
    assert ours == theirs and ours.train.lr == 5e-4 and ours.lora.rank == 4
    shown = theirs.to_dict()
    assert not set(shown) & set(ALIASES) and not {f"lora.{key}" for key in shown["lora"]} & set(ALIASES)
    # the resolved configuration is a recipe again
    assert resolve(yaml.safe_load(yaml.safe_dump(shown))) == ours


def test_the_same_names_as_overrides():
    tree = yaml.safe_load(THEIRS)
    lora = {f"lora.{key}": value for key, value in tree.pop("lora").items()}
    words = [f"--{key}={json.dumps(value)}" for key, value in (tree | lora).items()]
    assert load(None, words) == resolve(yaml.safe_load(OURS))
    assert load(None, ["--lora", "{r: 4, head: mixed}"]).lora == load(None, ["--lora.rank", "4", "--lora.head", "mixed"]).lora


@pytest.mark.parametrize("recipe, override", [
    ({"train": {"lr": 1}}, "--learning_rate=2"), ({"learning_rate": 1}, "--train.lr=2"), ({"learning_rate": 1}, "--learning_rate=2")])
def test_an_override_holds_against_the_recipe_under_either_name(tmp_path, recipe, override):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert load(tmp_path / "recipe.yaml", [override]).train.lr == 2


def test_one_beta_leaves_the_other():
    assert resolve({"train": {"betas": [0.7, 0.8]}}, [("adam_beta2", 0.9)]).train.betas == (0.7, 0.9)
    assert resolve({"adam_beta1": 0.5}).train.betas == (0.5, 0.999)


def test_passes_and_steps_count_with_the_round_as_it_ends_up():
    tree = {"num_train_epochs": 12, "train": {"local_steps": None, "local_epochs": 2}}
    assert resolve(tree).train.rounds == 6
    assert resolve(tree, [("train.local_epochs", 3)]).train.rounds == 4
    assert resolve(tree, [("train.rounds", 5)]).train.rounds == 5
    assert resolve({"train": {"rounds": 7, "local_steps": None, "local_epochs": 2}}, [("num_train_epochs", 4)]).train.rounds == 2
    assert resolve({"eval_steps": 40}).eval.every == 4
    assert resolve({"eval_steps": 40}, [("train.local_steps", 20)]).eval.every == 2
    assert resolve({"eval_steps": 40}, [("eval", {"every": 3})]).eval.every == 3


def test_all_trackers_are_those_that_are_installed(monkeypatch):
    def only_mlflow(names):
        if names != ["mlflow"]:
            raise ValueError("not installed")
    monkeypatch.setattr("dfl.record.check_trackers", only_mlflow)
    assert resolve({"report_to": "all"}).report_to == ("mlflow",)
    assert resolve({"report_to": ["none"]}).report_to == () and resolve({"report_to": "wandb"}).report_to == ("wandb",)


WRONG = {
    "both in a recipe": ({"learning_rate": 1, "train": {"lr": 2}}, [], ["learning_rate = 1 and train.lr = 2", "one of them"]),
    "both under lora": ({"lora": {"r": 4, "rank": 8}}, [], ["lora.r = 4 and lora.rank = 8"]),
    "both as overrides": ({}, [("train.lr", 1), ("learning_rate", 2)], ["learning_rate = 2 and train.lr = 1"]),
    "both in one override": ({}, [("lora", {"r": 4, "rank": 8})], ["lora.r = 4 and lora.rank = 8"]),
    "a beta and the betas": ({"adam_beta1": 0.5, "train": {"betas": [0.1, 0.2]}}, [], ["adam_beta1 = 0.5 and train.betas"]),
    "the betas and a beta": ({}, [("adam_beta1", 0.5), ("train.betas", [0.1, 0.2])], ["train.betas = [0.1, 0.2] and adam_beta1"]),
    "two of theirs": ({"warmup_ratio": 0.1, "warmup_steps": 0.2}, [], ["warmup_steps = 0.2 and warmup_ratio = 0.1"]),
    "the output twice": ({"output": "a", "output_dir": "b"}, [], ["output_dir = 'b' and output = 'a'"]),
    "epochs and rounds": ({"num_train_epochs": 3, "train": {"rounds": 3}}, [], ["num_train_epochs = 3 and train.rounds = 3"]),
    "epochs of steps": ({"num_train_epochs": 3}, [], ["num_train_epochs = 3 has no meaning", "train.local_epochs"]),
    "half a round": ({"num_train_epochs": 3, "train": {"local_steps": None, "local_epochs": 2}}, [],
                     ["multiple of train.local_epochs = 2"]),
    "between rounds": ({"eval_steps": 25}, [], ["eval_steps = 25", "a positive multiple of 10", "eval.every in rounds"]),
    "a part of the run": ({"save_steps": 0.5}, [], ["save_steps = 0.5", "checkpoint.every in rounds"]),
    "steps of passes": ({"eval_steps": 10, "train": {"local_steps": None, "local_epochs": 1}}, [], ["eval_steps = 10", "eval.every"]),
    "rare lines": ({"logging_steps": 20}, [], ["logging_steps = 20", "every round is recorded"]),
    "warm-up in steps": ({"warmup_steps": 100}, [], ["warmup_steps = 100", "fraction of the run"]),
    "another schedule": ({"lr_scheduler_type": "polynomial"}, [], ["lr_scheduler_type = 'polynomial'", "constant_with_warmup"]),
    "another optimiser": ({"optim": "adafactor"}, [], ["optim = 'adafactor'", "adamw_torch"]),
    "a number for a switch": ({"bf16": 1}, [], ["bf16 = 1", "True, False"]),
    "a value that ours refuses": ({"learning_rate": -1}, [], ["train.lr = -1"]),
    **{name: ({}, [(name, "x")], [f"{name} = 'x' cannot be had"]) for name in REFUSED},
    "their name in our section": ({"train": {"learning_rate": 1}}, [],
                                  ["unknown key 'train.learning_rate'", "did you mean 'train.lr'?"]),
    "our name without its section": ({"rank": 8}, [], ["unknown key 'rank'", "did you mean 'lora.rank'?"]),
    "their name without its section": ({"lora_alpha": 8}, [], ["unknown key 'lora_alpha'", "did you mean 'lora.alpha'?"]),
    "a typing error in their name": ({"learning_rte": 8}, [], ["unknown key 'learning_rte'", "did you mean 'learning_rate'?"]),
    "a typing error under lora": ({"lora": {"lora_alfa": 8}}, [], ["unknown key 'lora.lora_alfa'", "did you mean 'lora_alpha'?"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_with_the_reason(case):
    tree, pairs, parts = WRONG[case]
    with pytest.raises(ValueError) as caught:
        resolve(tree, pairs)
    for part in parts:
        assert part in str(caught.value)
