"""Names of transformers and PEFT: the same configuration as with ours, one name a field, and a reason for what cannot be had."""

import dataclasses
import json
import re

import peft
import pytest
import transformers
import yaml

from dfl.config import Config, load, resolve
from dfl.config.aliases import ALIASES, REFUSED, _elsewhere
from dfl.config.foreign import FOREIGN
from dfl.config.schema import section_of

OURS = """
peers: 8
model: {name: FacebookAI/roberta-base, task: sequence_classification}
data: {source: file, train: my/train.csv, valid: my/valid.csv, text: sentence, label: label}
lora: {rank: 4, alpha: 8, dropout: 0.1, targets: [query, value], rslora: true, head: mixed}
method: {name: tad, T: auto}
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
method: {name: tad, T: auto}
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
    monkeypatch.setattr("dfl.config.aliases.check_trackers", only_mlflow)
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
    "another schedule": ({"lr_scheduler_type": "greedy"}, [], ["lr_scheduler_type = 'greedy'", "constant_with_warmup"]),
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


def dotted_fields(cls, prefix: str = "") -> list[str]:
    found = []
    for name, field in cls.model_fields.items():
        section = section_of(field.annotation)
        found += [f"{prefix}{name}", *(dotted_fields(section, f"{prefix}{name}.") if section else [])]
    return found


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(transformers.TrainingArguments)])
def test_every_argument_of_transformers_has_an_answer(name):
    accepted = name in ALIASES or name in REFUSED or name in dotted_fields(Config)
    assert accepted != (name in FOREIGN)
    if not accepted:
        with pytest.raises(ValueError, match=re.escape(f"unknown key '{name}' = 1: {FOREIGN[name]}")):
            resolve({name: 1})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(peft.LoraConfig)])
def test_every_field_of_peft_has_an_answer(name):
    accepted = f"lora.{name}" in ALIASES or f"lora.{name}" in REFUSED
    assert accepted != (name in FOREIGN)
    if not accepted:
        with pytest.raises(ValueError, match=re.escape(f"unknown key 'lora.{name}' = 1: {FOREIGN[name]}")):
            resolve({"lora": {name: 1}})


# of TRL, axolotl and LLaMA-Factory, which are not installed: what their first examples hold
ELSEWHERE = """max_seq_length dataset_text_field completion_only_loss beta ref_model max_prompt_length
    base_model sequence_len sample_packing micro_batch_size num_epochs val_set_size lora_r lora_target_modules
    lora_target_linear flash_attention train_on_inputs datasets wandb_project
    model_name_or_path stage finetuning_type lora_target lora_rank cutoff_len max_samples quantization_bit pref_beta
    val_size"""


@pytest.mark.parametrize("name", ELSEWHERE.split())
def test_names_of_other_trainers_get_one_answer_and_no_list(name):
    with pytest.raises(ValueError) as caught:
        resolve({name: 1})
    assert str(caught.value).startswith(f"unknown key '{name}' = 1") and len(str(caught.value)) < 200
    assert "allowed: " not in str(caught.value)


def test_answers_name_fields_that_there_are():
    fields = set(dotted_fields(Config))
    sections = "|".join(field for field in fields if any(other.startswith(f"{field}.") for other in fields))
    for name, answer in FOREIGN.items():
        assert name not in ALIASES and name not in REFUSED and not _elsewhere(name), name
        for mentioned in re.findall(rf"\b(?:{sections})\.\w+", answer):
            assert mentioned in fields or mentioned in ALIASES, (name, mentioned)
        first = answer.split(" is the field for it")[0] if " is the field for it" in answer else "peers"
        assert first.split()[0] in fields, (name, answer)


ANSWERS = {
    "a field of another section": ({"rank": 8}, "unknown key 'rank' = 8 (did you mean 'lora.rank'?)"),
    "a field of several": ({"every": 8},
                           "unknown key 'every' = 8 (did you mean 'eval.every' or 'measure.every' or 'checkpoint.every'?)"),
    "a field of the top": ({"train": {"seed": 8}}, "unknown key 'train.seed' = 8 (did you mean 'seed'?)"),
    "theirs in a section of ours": ({"train": {"max_steps": 8}}, f"unknown key 'train.max_steps' = 8: {REFUSED['max_steps']}"),
    "with hyphens": ({"max-seq-length": 8}, "unknown key 'max-seq-length' = 8: data.max_length is the field for it, in tokens"),
    "a typing error in theirs": ({"max_seq_lenght": 8}, "unknown key 'max_seq_lenght' = 8 (did you mean 'max_seq_length'?) "
                                 "data.max_length is the field for it, in tokens"),
    "nothing like it": ({"zzz": 8}, "unknown key 'zzz' = 8; `dfl train --dry-run` prints every field there is"),
    "nothing like it among few": ({"measure": {"zzz": 8}}, "unknown key 'measure.zzz' = 8; allowed: every, layers"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_an_unknown_key_gets_one_pointer(case):
    tree, said = ANSWERS[case]
    with pytest.raises(ValueError) as caught:
        resolve(tree)
    assert str(caught.value) == said
