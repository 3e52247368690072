"""Recipes: what is accepted, what a dotted override does, and one clear refusal for everything else."""

import re

import pytest
import yaml

from dfl.config import Config, Plugin, from_dict, load, resolve


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refusal(*overrides, path=None):
    with pytest.raises(ValueError) as caught:
        load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_a_valid_recipe():
    assert load(None) == Config()


def test_a_configuration_survives_yaml_bit_for_bit(tmp_path):
    config = load(None, ["--method", "{name: tad, T: 5, theta: 1e-3}", "--lora.targets", "[query, value]", "--train.lr", "3e-4",
                         "--train.betas", "[0.8, 0.95]", "--report_to", "[tensorboard, mlflow]", "--train.eps", "1e-12",
                         "--topology.name", "ring", "--partition", "{name: proportions, proportions: [[0.9, 0.1], [0.1, 0.9]]}"])
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    assert load(recipe(tmp_path, text)) == config == from_dict(yaml.safe_load(text))
    assert config.method == Plugin("tad", {"T": 5, "theta": 1e-3})


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Config().peers = 3
    with pytest.raises(ValueError, match="frozen"):
        Config().train.lr_ratio.B = 16.0


@pytest.mark.parametrize("words", [["--train.lr", "1e-3"], ["--train.lr=1e-3"], ["--train.lr", "0.001"],
                                   ["--train.lr=7", "--train.lr=1e-3"]])
def test_overrides_take_a_space_or_an_equals_sign_and_the_last_wins(words):
    assert load(None, words).train.lr == 1e-3


def test_numbers_as_people_write_them():
    config = load(None, ["--train.lr", "1e-3", "--train.rounds", "1e3", "--data.max_train", "2.0", "--train.clip", "null",
                         "--topology", "{name: x, p: 5e-2}"])
    assert (config.train.lr, config.train.rounds, config.data.max_train, config.train.clip) == (1e-3, 1000, 2, None)
    assert type(config.train.rounds) is int and config.topology.params == {"p": 0.05}


@pytest.mark.parametrize("value", ["inf", "nan", "infinity"])
def test_words_that_python_takes_for_numbers_stay_words(value):
    assert load(None, ["--data.text", value]).data.text == value
    assert load(None, ["--partition", f"{{name: column, column: {value}}}"]).partition.params == {"column": value}


def test_an_override_completes_or_replaces_a_plugin(tmp_path):
    path = recipe(tmp_path, "method: tad\ntopology: {name: erdos_renyi, p: 0.1}\n")
    config = load(path, ["--method.T", "5", "--topology.p", "0.5"])
    assert config.method == Plugin("tad", {"T": 5}) and config.topology == Plugin("erdos_renyi", {"p": 0.5})
    assert load(path, ["--topology", "ring"]).topology == Plugin("ring")


def test_a_word_in_place_of_a_section_is_completed_too():
    membership = load(None, ["--membership", "survive", "--membership.patience", "5"]).membership
    assert (membership.mode, membership.patience) == ("survive", 5.0)


def test_one_name_is_a_list_of_one_where_a_list_of_names_is_wanted():
    assert load(None, ["--report_to", "tensorboard"]).report_to == ("tensorboard",)
    assert load(None, ["--lora.targets", "all-linear"]).lora.targets == "all-linear"  # a word of PEFT's, or a pattern
    assert load(None, ["--lora.targets", "[query]"]).lora.targets == ("query",)


def test_off_and_on_of_old_yaml():
    assert load(None, ["--train.autocast", "off"]).train.autocast == "off"


def test_environment_variables_and_home_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load(None, ["--output", "$SOME_FOLDER/run", "--data.train", "${SOME_FOLDER}/a.csv", "--model.name", "~/model"])
    assert (config.output, config.data.train, config.model.name) == (f"{tmp_path}/run", f"{tmp_path}/a.csv", "/home/somebody/model")
    monkeypatch.delenv("SOME_FOLDER")
    assert "SOME_FOLDER is not set" in refusal("--output", "$SOME_FOLDER/run")


REFUSED = {
    "unknown key": (["--train.learning_rate", "1"], ["train.learning_rate", "did you mean 'train.lr'?"]),
    "a typing error": (["--peer", "4"], ["'peer'", "did you mean 'peers'"]),
    "unknown section": (["--trian.lr", "1"], ["'trian'", "did you mean 'train'"]),
    "no value": (["--train.lr"], ["--train.lr", "lacks a value"]),
    "no override": (["train.lr", "1"], ["'train.lr'", "--dotted.key value"]),
    "not YAML": (["--method", "{name: tad"], ["--method", "YAML"]),
    "not a date": (["--output", "2020-77-77"], ["--output", "YAML"]),
    "a field of a number": (["--peers", "8", "--peers.x", "1"], ["peers.x", "has no fields"]),
    "a field of a list": (["--report_to", "[wandb]", "--report_to.x", "1"], ["report_to.x", "has no fields"]),
    "text for a number": (["--train.lr", "fast"], ["train.lr = 'fast'", "zero or a positive number"]),
    "a fraction of a peer": (["--peers", "2.5"], ["peers = 2.5", "whole number"]),
    "true for a number": (["--peers", "true"], ["peers = True", "whole number"]),
    "a number for a switch": (["--lora.rslora", "1"], ["lora.rslora = 1", "true or false"]),
    "none of the choices": (["--lora.head", "shared"], ["lora.head = 'shared'", "frozen, mixed, local"]),
    "a section as a value": (["--train", "5"], ["train = 5", "mapping"]),
    "a plug-in without a name": (["--method", "{T: 5}"], ["method = {'T': 5}", "name"]),
    "too few betas": (["--train.betas", "[0.9]"], ["train.betas = [0.9]", "a list of 2"]),
    "one beta": (["--train.betas", "0.9"], ["train.betas = 0.9", "a list"]),
    "a beta of one": (["--train.betas", "[0.9, 1.0]"], ["train.betas[1] = 1.0", "from 0 up to, not including, 1"]),
    "no peers": (["--peers", "0"], ["peers = 0", "a whole number from 1"]),
    "negative rate": (["--train.lr", "-1"], ["train.lr = -1", "positive"]),
    "no number": (["--train.lr", ".nan"], ["train.lr = nan"]),
    "infinite time": (["--timeout", ".inf"], ["timeout = inf"]),
    "infinite decay": (["--train.weight_decay", ".inf"], ["train.weight_decay = inf"]),
    "negative interval": (["--eval.every", "-1"], ["eval.every = -1", "a whole number from 0"]),
    "certain dropout": (["--lora.dropout", "1.0"], ["lora.dropout = 1.0", "from 0 up to, not including, 1"]),
    "none of several kinds": (["--lora.rank", "x"], ["lora.rank = 'x'", "a mapping of fields, or a list, or a whole number from 1"]),
    "one of a list": (["--lora.rank", "[2, 0]"], ["lora.rank[1] = 0 is not allowed; allowed: a whole number from 1"]),
    "inside one of several kinds": (["--lora.rank", "{choices: [2, x]}"], ["lora.rank.choices[1] = 'x'", "a whole number from 1"]),
    "unknown inside one of several kinds": (["--lora.rank", "{choizes: [2]}"],
                                            ["'lora.rank.choizes' = [2] (did you mean 'choices'?)"]),
    "a choice in a list": (["--eval.metrics", "[loss, {above: 1}]"], ["eval.metrics[1] = {'above': 1}", "a mapping with name"]),
    "true where there is a list of them": (["--lora.rslora", "[true, 3]"], ["lora.rslora[1] = 3", "true or false"]),
    "more processes than peers": (["--processes", "9"], ["processes = 9", "at most 8"]),
    "too few of one a peer": (["--lora.alpha", "[1, 2]"], ["lora.alpha = [1.0, 2.0]", "a list of 8, one a peer"]),
    "both ways to draw ranks": (["--lora.rank", "{choices: [2], budget_mb: 1}"], ["lora.rank.choices", "give exactly one"]),
    "weights of no choice": (["--lora.rank", "{choices: [2, 4], weights: [0, 0]}"],
                             ["lora.rank.weights = [0.0, 0.0]", "not all 0"]),
    "steps and epochs": (["--train.local_epochs", "1"], ["train.local_steps = 10", "train.local_epochs = 1", "exactly one"]),
    "neither": (["--train.local_steps", "null"], ["exactly one"]),
    "carried at a switch, fresh in a round": (["--train.at_switch", "carried"], ["train.at_switch", "train.state"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_field_value_and_what_is_allowed(case):
    overrides, parts = REFUSED[case]
    message = refusal(*overrides)
    for part in parts:
        assert part in message


def test_a_learning_rate_of_zero_is_allowed():
    assert load(None, ["--train.lr", "0"]).train.lr == 0.0


@pytest.mark.parametrize("content, part", [
    (b"peers: [1\n", "not valid YAML"), (b"- 1\n- 2\n", "mapping"), (b"0\n", "mapping"), (b"peers: \xff\xfe\n", "not valid YAML"),
    (b"peers: 4\npeers: 8\n", "'peers' is given twice"), (b"train: {lr: 1}\nseed: 1\ntrain: {rounds: 2}\n", "'train' is given twice"),
    (b"1: 2\n", "unknown key '1'"), (b"output: 2020-77-77\n", "not valid YAML")])
def test_files_that_are_no_recipe_are_named(tmp_path, content, part):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    message = refusal(path=path)
    assert part in message
    assert part.startswith("unknown") or str(path) in message


def test_a_missing_recipe_and_an_empty_one(tmp_path):
    assert "missing.yaml' is not a file" in refusal(path=tmp_path / "missing.yaml")
    assert load(recipe(tmp_path, "")) == Config()


def test_anchors_and_merges_still_work(tmp_path):
    path = recipe(tmp_path, "method: &r {name: tad, T: 3}\ntopology:\n  <<: *r\n  name: ring\n")
    assert load(path).topology == Plugin("ring", {"T": 3})


@pytest.mark.parametrize("words", [["--output", ""], ["--output="], ["--output", "  "], ["--data.valid", ""]])
def test_an_empty_override_is_no_null(words):
    said = refusal(*words)
    assert f"override --{words[0][2:].partition('=')[0]} = " in said and "is empty; give a value, or null" in said


def test_an_output_of_nothing_is_not_the_working_directory():
    with pytest.raises(ValueError, match=re.escape("output = '' is not allowed; allowed: the path of a folder")):
        resolve({"output": ""})
