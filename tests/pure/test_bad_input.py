"""What users get wrong, through the command line: one clear line, a status that is not zero, nothing half-written."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny_models
import tiny_runs
import torch
from safetensors.torch import load_file

from dfl.cli import main
from dfl.run import checkpoint
from dfl.store.records import read_lines


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    tiny_models.save(folder / "bert", "bert", layers=1)
    tiny_models.save(folder / "gpt2", "gpt2")
    tiny_runs.write_data(folder)
    (folder / "empty.csv").write_text("text,label\n")
    (folder / "no_model").mkdir()
    (folder / "no_weights").mkdir()
    (folder / "no_weights" / "config.json").write_text((folder / "bert" / "config.json").read_text())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "torn").mkdir(exist_ok=True)
        (folder / "torn" / name).write_bytes((folder / "bert" / name).read_bytes())
    (folder / "torn" / "model.safetensors").write_bytes((folder / "bert" / "model.safetensors").read_bytes()[:2000])
    return folder


def words(root, output, **fields):
    return ["train", *tiny_runs.arguments(root / "bert", root / "data.csv", output, **fields)]


def said(capsys):
    """The one line on standard error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dfl: ")]
    assert len(lines) == 1
    return lines[0]


def refused(argv, capsys, status=2):
    """main's one line; nothing else is printed."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == status
    out, err = capsys.readouterr()
    # what a process will need is told before weights are read
    err = re.sub(r"^memory of .* process, .*:\n(  .*\n)+", "", err)
    assert out == "" and err.startswith("dfl: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


REFUSED = {
    "unknown key": ({"train__learning_rate": 1}, ["unknown key 'train.learning_rate' = 1 (did you mean 'train.lr'?)"]),
    "unknown rule": ({"method": "tda"}, ["method.name = 'tda' is not known (did you mean 'tad'?)", "allowed: lora"]),
    "unknown topology": ({"topology": "rign"}, ["rign", "ring"]),
    "unknown codec": ({"codec": "zip"}, ["codec.name = 'zip'", "bfloat16"]),
    "unknown partition": ({"partition": "idd"}, ["partition.name = 'idd'", "iid"]),
    "unknown task": ({"model__task": "regression"}, ["model.task = 'regression'", "sequence_classification"]),
    "unknown source": ({"data__source": "web"}, ["data.source = 'web'", "docstrings"]),
    "unknown tracker": ({"report_to": "[tensorbord]"}, ["report_to = 'tensorbord'", "tensorboard"]),
    "parameter of another rule": ({"method": "{name: lora, T: 5}"}, ["method.T = 5: 'lora' has no such parameter"]),
    "parameter of another partition": ({"partition": "{name: iid, alpha: 1}"}, ["partition.alpha = 1", "'iid'"]),
    "parameter of another topology": ({"topology": "{name: ring, p: 0.5}"}, ["p", "ring"]),
    "missing parameter": ({"partition": "column"}, ["partition.column is missing"]),
    "a value a rule refuses": ({"method": "{name: adf, T: 0}"}, ["method.T = 0", "a whole number from 1"]),
    "a word a rule refuses": ({"method": "{name: tad, T: five}"}, ["method.T = 'five'", "'auto'"]),
    "a split": ({"method": "{name: decaf, split: right}"}, ["method.split = 'right'", "balanced, left"]),
    "a probability": ({"topology": "{name: erdos_renyi, p: 1.5}"}, ["1.5"]),
    "no fraction": ({"partition": "{name: majority, fraction: most}"}, ["partition.fraction = 'most'", "up to 1"]),
    "no class count": ({"partition": "{name: majority, peers_per_class: two}"}, ["partition.peers_per_class = 'two'"]),
    "a list for a column": ({"partition": "{name: column, column: [text]}"}, ["partition.column = ['text']", "text, label"]),
    "a concentration": ({"partition": "{name: dirichlet, alpha: -1}"}, ["partition.alpha = -1"]),
    "what the topology sets": ({"method": "{name: tad, topology: 0.5}"}, ["method.topology is set by topology"]),
    "no automatic interval": ({"method": "tad", "topology": "{name: erdos_renyi, p: 0.0, allow_disconnected: true}"},
                              ["method.T = 'auto'", "spectral gap", "a whole number"]),
    "more peers than examples": ({"peers": 40}, ["peers = 40", "36 training examples"]),
    "an empty shard": ({"partition": "{name: quantity, skew: 9.0}"}, ["partition.name = 'quantity'", "without an example"]),
    "an infeasible size": ({"partition": "{name: majority, per_client: 500}"}, ["partition.per_client = 500", "allowed: up to"]),
    "no label column": ({"data__label": "lable"}, ["data.label = 'lable'", "did you mean 'label'?", "data.csv"]),
    "no text column": ({"data__text": "sentence"}, ["data.text = 'sentence'", "it has: text, label"]),
    "no data file": ({"data__train": "/nowhere/data.csv"}, ["data.train = '/nowhere/data.csv' is not a file"]),
    "no examples": ({"data__train": "{root}/empty.csv"}, ["empty.csv", "no row of examples"]),
    "no data": ({"data__train": None}, ["data.train is missing"]),
    "no such target": ({"lora__targets": "[nothing]"}, ["lora.targets = ('nothing',)", "linear layers are: classifier, dense, key"]),
    "a typing error among targets": ({"lora__targets": "[query,vlaue]"}, ["'vlaue' matches none", "value"]),
    "a broken pattern": ({"lora__targets": "'['"}, ["lora.targets = '['", "linear layers"]),
    "a norm as target": ({"lora__targets": "[LayerNorm]"}, ["lora.targets = ('LayerNorm',)", "linear layers"]),
    "an embedding as target": ({"lora__targets": "[word_embeddings]"}, ["word_embeddings", "Embedding", "linear layers"]),
    "the head as target": ({"lora__targets": "[classifier]"}, ["lora.targets = ('classifier',)"]),
    "no model": ({"model__name": "/nowhere"}, ["model.name = '/nowhere' is not a folder"]),
    "a folder without a model": ({"model__name": "{root}/no_model"}, ["no config.json"]),
    "a folder without weights": ({"model__name": "{root}/no_weights"}, ["no weights (*.safetensors)"]),
    "torn weights": ({"model__name": "{root}/torn"}, ["torn' cannot be loaded"]),
    "too many layers": ({"model__layers": 4}, ["model.layers = 4", "1 layers"]),
    "too many tokens": ({"data__max_length": 65}, ["data.max_length = 65", "allowed"]),
    "no GPU": ({"device": "cuda"}, ["device = 'cuda' is not available here; allowed: auto, cpu"]),
    "NCCL without a GPU": ({"backend": "nccl", "processes": 2, "device": "cpu"}, ["backend = 'nccl' needs device 'cuda', got 'cpu'"]),
    "more processes than peers": ({"processes": 5}, ["processes = 5 is not allowed; allowed: at most 4"]),
    "a head that is none": ({"model__name": "{root}/gpt2", "model__task": "causal_lm", "lora__head": "mixed"},
                            ["lora.head must be 'frozen'"]),
    "an executor": ({"lora__adapter": "dora", "train__executor": "stacked"}, ["train.executor = 'stacked'", "allowed: sequential"]),
    "a core larger than a layer": ({"lora__adapter": "sb", "method": "fed_sb", "lora__rank": 17},
                                   ["lora.rank = 17 is more than layer"]),
    "heads that do not divide": ({"lora__adapter": "ravan", "method": "ravan", "lora__rank": 6}, ["multiple of lora.heads = 4"]),
    "a rank that no machine holds": ({"lora__rank": 10**9}, ["lora.rank = 1000000000 need at least", "TB of memory here"]),
    "peers that no machine counts": ({"peers": 10**9}, ["peers = 1000000000 need 6.1 TB of memory"]),
    "a variable that is not set": ({"model__name": "$NOT_SET_ANYWHERE/x"}, ["model.name", "NOT_SET_ANYWHERE is not set"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_written(root, tmp_path, capsys, case):
    fields, parts = REFUSED[case]
    if "device" in fields and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    fields = {key: value.replace("{root}", str(root)) if isinstance(value, str) else value for key, value in fields.items()}
    line = refused(words(root, tmp_path / "run", **fields), capsys)
    for part in parts:
        assert part in line
    if case != "torn weights":  # the only one for which they have to be read
        assert refused([*words(root, tmp_path / "run", **fields), "--dry-run"], capsys) == line
    assert os.listdir(tmp_path) == []


def test_an_absurd_number_of_peers_is_refused_before_anything_is_imported(root, tmp_path):
    """In half a second and little memory: neither torch nor a list of the peers."""
    program = ("import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (300 << 20, 300 << 20)); from dfl.cli import main; "
               "print(main(sys.argv[1:]), 'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program, *words(root, tmp_path / "run", peers=10**9), "--dry-run"],
                          capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n" and done.stderr.startswith("dfl: peers = 1000000000 need 6.1 TB")


def test_a_word_where_a_topology_wants_a_number(root, tmp_path, capsys):
    line = refused(words(root, tmp_path / "run", topology="{name: erdos_renyi, p: often}"), capsys)
    assert "often" in line and "erdos_renyi" in line


@pytest.mark.parametrize("override", [
    ["--method={name: adf, T: 0}"], ["--method", "{name: adf, T: 0}"], ["--method.name", "adf", "--method.T", "0"],
    ["--method=adf", "--method.T", "0"]])
def test_overrides_are_overrides_with_and_without_a_recipe(root, tmp_path, capsys, override):
    given = words(root, tmp_path / "run")[1:]
    given.remove("--method=lora")
    assert "method.T = 0 is not allowed" in refused(["train", *given, *override], capsys)
    (tmp_path / "recipe.yaml").write_text("method: {name: adf}\n")
    override = [word.replace("--method=adf", "--seed=1") for word in override]
    assert "method.T = 0 is not allowed" in refused(["train", tmp_path / "recipe.yaml", *given, *override], capsys)
    assert "method.T = 0 is not allowed" in refused(["train", tmp_path / "recipe.yaml", *given, *override, "--resume"], capsys)
    # the recipe may also stand behind its overrides
    assert "method.T = 0 is not allowed" in refused(["train", *given, *override, tmp_path / "recipe.yaml"], capsys)


def test_more_processes_than_peers(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "peers = 2 is fewer than the 3 processes" in refused(words(root, tmp_path / "run", peers=2), capsys)
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("RANK", "1")  # the first speaks for all
    assert main(words(root, tmp_path / "run", peers=2)) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["train", ""], ["export", ""], ["export", "run", "--output", ""], ["report", "run", "--output", ""],
                                   ["watch", " "], ["sweep", ""], ["eval", ""], ["eval", "run", "--predictions", ""]])
def test_an_empty_path_is_not_the_working_directory(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "is empty; give the path of a file or folder" in capsys.readouterr().err


def test_a_trace_on_request(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DFL_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"data\.label"):
        main(words(root, tmp_path / "run", data__label="lable"))


def test_a_missing_recipe(tmp_path, capsys):
    assert "missing.yaml' is not a file" in refused(["train", tmp_path / "missing.yaml"], capsys)


def test_a_folder_that_holds_a_run_is_left_alone(root, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(words(root, output, train__rounds=1)) == 0
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    line = refused(words(root, output, train__rounds=1), capsys)
    assert "already holds a run" in line and "--resume" in line and "--overwrite" in line
    assert refused([*words(root, output, train__rounds=1), "--dry-run"], capsys) == line
    assert main([*words(root, output, train__rounds=1), "--dry-run", "--overwrite"]) == 0
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before
    assert main([*words(root, output, train__rounds=1, seed=5), "--overwrite"]) == 0
    assert {p for p in output.rglob("*") if p.is_file()} == before.keys()


@pytest.mark.parametrize("fields, part", [
    ({"train__lr": 0.5}, "train.lr = 0.5 differs from 0.001"), ({"method": "ffa"}, "method.name = 'ffa' differs from 'lora'"),
    ({"seed": 1}, "seed = 1 differs from 0"), ({"lora__rank": 3}, "lora.rank = 3 differs from 2"),
    ({"peers": 3}, "peers = 3 differs from 4"),
    ({"train__rounds": 3, "train__schedule": "linear"},
     "train.rounds = 3 differs from 1, train.schedule.name = 'linear' from 'constant'"),
    ({"method": "{name: adf, T: 2}", "train__eps": 1e-6, "lora__rank": [2, 2, 2, 2]},
     "lora.rank = [2, 2, 2, 2] differs from 2, method.name = 'adf' from 'lora', method.T = 2 from (not given), "
     "train.eps = 1e-06 from 1e-08")])
def test_a_run_goes_on_as_it_began(root, tmp_path, capsys, fields, part):
    output = tmp_path / "run"
    assert main(words(root, output, train__rounds=1)) == 0
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    argv = [*words(root, output, **({"train__rounds": 1} | fields)), "--resume"]
    line = refused(argv, capsys)
    assert refused([*argv, "--dry-run"], capsys) == line
    assert line == f"dfl: {part}, with which {str(output)!r} was begun; a run goes on as it began\n"
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_a_run_that_is_not_there_cannot_be_evaluated(root, tmp_path, capsys):
    assert "holds no run" in refused(["eval", tmp_path / "run"], capsys)
    (tmp_path / "run").mkdir()
    assert main(words(root, tmp_path / "run", train__rounds=1)) == 0
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    assert "no complete checkpoint" in refused(["eval", tmp_path / "run"], capsys)


DIVERGES = {"train__optimizer": "sgd", "train__lr": 1e30, "train__clip": None, "train__rounds": 6, "train__schedule": "linear",
            "lora__targets": "all-linear"}


def poison(monkeypatch, peer, t):
    """The loss of one peer is NaN from the first step of round t on, as an overflow would leave it."""
    from dfl.training.phase import ModelTrainer
    whole = ModelTrainer._step

    def step(self, phase, k, active, *rest):
        losses, peers = whole(self, phase, k, active, *rest), self.peers
        for place, row in enumerate(active):
            if peers.ids[row] == peer and phase.t == t:
                losses[place] = float("nan")
                peers.x[row] = float("nan")
                for parameter in peers.optimizer.params[row].values():
                    for value in peers.optimizer.torch.state.get(parameter, {}).values():
                        value.fill_(float("nan"))
        return losses

    monkeypatch.setattr(ModelTrainer, "_step", step)


def finite_checkpoint(output):
    folder = checkpoint.latest(output)
    checkpoint.verify(folder)
    for path in folder.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.isfinite(tensor).all(), f"{path.name}: {name}"
    return folder


def test_a_learning_rate_far_too_large_stops_the_run_with_its_last_good_state(root, tmp_path, capsys):
    assert main(words(root, tmp_path / "run", **DIVERGES)) == 1
    line = said(capsys)
    assert "peer " in line and "diverged in round 1" in line and "the state after round 0 is saved" in line
    assert finite_checkpoint(tmp_path / "run").name == "round-00000"
    assert [r["round"] for r in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0]


@pytest.mark.parametrize("rule", ["lora", "decaf"])
@pytest.mark.parametrize("lr", [1e15, 1e37])
def test_factors_that_explode_before_the_loss_does_are_no_traceback(root, tmp_path, capsys, rule, lr):
    fields = {"method": rule, "train__lr": lr, "train__clip": None, "train__local_steps": 1, "eval__every": 1, "train__rounds": 3}
    assert main(words(root, tmp_path / "run", **fields)) == 1
    assert "diverged in round" in said(capsys)
    finite_checkpoint(tmp_path / "run")
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["eval"]
    assert last["loss"]["mean"] is None and last["accuracy"]["max"] == 0.0  # a model of NaN is right about nothing


@pytest.mark.long
@pytest.mark.parametrize("executor", ["sequential", "stacked"])
@pytest.mark.parametrize("peer", [0, 2])
def test_the_message_names_peer_and_round(root, tmp_path, capsys, monkeypatch, executor, peer):
    with monkeypatch.context() as patch:
        poison(patch, peer, t=2)
        assert main(words(root, tmp_path / "run", train__executor=executor)) == 1
    line = said(capsys)
    assert f"peer {peer} diverged in round 3" in line and "after round 1 is saved" in line
    # the first loss of round 3 was bad: the factors it began with are not known to be good, those of round 2 are
    assert finite_checkpoint(tmp_path / "run").name == "round-00001"
    assert [r["round"] for r in read_lines(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["facts"]
    # the cause gone, the run goes on from there
    assert main([*words(root, tmp_path / "run", train__executor=executor), "--resume"]) == 0


@pytest.mark.parametrize("state", ["fresh", "carried"])
def test_the_last_good_state_is_that_of_the_round_before(root, tmp_path, capsys, monkeypatch, state):
    fields = {"train__state": state, "method": "{name: adf, T: 2}", "checkpoint__every": 1, "checkpoint__keep": 9}
    assert main(words(root, tmp_path / "good", **fields)) == 0
    with monkeypatch.context() as patch:
        poison(patch, peer=1, t=2)
        assert main(words(root, tmp_path / "run", **(fields | {"checkpoint__every": 0}))) == 1
    found = finite_checkpoint(tmp_path / "run")
    saved, good = (load_file(folder / "state-0.safetensors") for folder in (found, tmp_path / "good" / "checkpoints" / found.name))
    assert saved.keys() == good.keys() and all(torch.equal(saved[name], good[name]) for name in good)


def test_checkpoints_that_are_all_damaged_are_not_silently_replaced(root, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(words(root, output, train__rounds=1)) == 0
    for path in output.rglob("state-0.safetensors"):
        path.write_bytes(b"")
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    assert "damaged" in refused([*words(root, output, train__rounds=1), "--resume"], capsys)
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file()} == before


def test_numbers_too_large_for_a_codec_do_not_break_the_products(root, tmp_path, capsys):
    fields = {"method": "decaf", "codec": "float16", "train__lr": 1e10, "train__clip": None, "train__local_steps": 1, "eval__every": 1}
    assert main(words(root, tmp_path / "run", **fields)) in (0, 1)  # as large as it can be, or one line
    finite_checkpoint(tmp_path / "run")


def test_a_run_with_a_warm_up_cannot_be_made_longer(root, tmp_path, capsys):
    assert main(words(root, tmp_path / "run", train__rounds=2, train__warmup=0.5)) == 0
    longer = words(root, tmp_path / "run", train__rounds=4, train__warmup=0.5)
    assert "train.rounds = 4 differs from 2" in refused([*longer, "--resume"], capsys)
