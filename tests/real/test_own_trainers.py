"""SFTTrainer, DPOTrainer and transformers.Trainer with two lines more, four peers on real text: what a run leaves, and resume."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dfl.cli import main
from dfl.store.runs import read_run

pytest.importorskip("trl")
pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("own_scripts", ROOT / "benchmarks" / "own_scripts.py")
own_scripts = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(own_scripts)


@pytest.fixture(scope="module")
def sft(research_data, tmp_path_factory):
    """The folder of a run of SFTTrainer: four peers, 25 steps, three mixes."""
    return started("sft", tmp_path_factory.mktemp("sft") / "run", research_data, 25)


def started(kind: str, output: Path, data: Path, steps: int, **options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFL_DATA", str(data))
        done = own_scripts.start(kind, output, steps, "tad" if kind == "sft" else "lora", **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


@pytest.mark.core
def test_four_peers_of_an_sft_script_train_mix_evaluate_and_save(sft, research_data):
    run = read_run(sft)
    assert [record["round"] for record in run.records] == [0, 1, 2, 3] and run.finished and not run.problems
    assert all(len(record["eval"]["peers"]["perplexity"]) == 4 for record in run.records[:3])
    assert run.records[2]["eval"]["perplexity"]["mean"] < run.records[0]["eval"]["perplexity"]["mean"]
    assert all(None not in record["train_loss_peers"] for record in run.records[1:])
    found = own_scripts.measured(sft)["perplexity"]
    assert found["before"] > found["consensus"] and max(found["after by peer"]) < found["before"]
    for k in range(4):  # the trainer's own folder and the run's hold the same factors
        base = AutoModelForCausalLM.from_pretrained(research_data / "stories260k")
        whole = peft.PeftModel.from_pretrained(base, sft / "checkpoints" / "round-00003" / f"peer-{k}").state_dict()
        last = load_file(sft / f"peer-{k}" / "checkpoint-25" / "adapter_model.safetensors")
        for name, value in last.items():
            assert torch.equal(value, whole[name.replace(".weight", ".default.weight")]), name


def test_report_reads_the_run_of_a_script(sft, capsys):
    assert main(["report", str(sft)]) == 0
    page = (sft / "report.html").read_text()
    assert "perplexity" in page and "consensus" in page


def test_a_script_that_was_stopped_goes_on_to_the_same_factors(sft, research_data, tmp_path):
    """As if it had been killed before the last step was saved, and one peer before its step 20 was."""
    again = tmp_path / "run"
    shutil.copytree(sft, again)
    for k in range(4):
        shutil.rmtree(again / f"peer-{k}" / "checkpoint-25")
    (again / "peer-2" / "checkpoint-20" / "dfl.safetensors").unlink()
    started("sft", again, research_data, 25, resume=True)
    for k in range(4):
        name = Path(f"peer-{k}", "checkpoint-25", "adapter_model.safetensors")
        before, after = load_file(sft / name), load_file(again / name)
        assert all(torch.equal(before[key], after[key]) for key in before), k
        assert json.loads((again / f"peer-{k}" / "checkpoint-25" / "trainer_state.json").read_text())["global_step"] == 25
    assert [record["round"] for record in read_run(again).records] == [0, 1, 2, 3]


def test_two_peers_of_a_dpo_script(research_data, tmp_path):
    """Which learn that words have an order, also of texts that nobody has trained on: by 0.5 and five standard errors."""
    run = read_run(started("dpo", tmp_path / "run", research_data, 30, peers=2))
    assert run.done == 3 and run.finished
    losses = [record["eval"]["loss"]["mean"] for record in run.records if "eval" in record]
    assert losses[-1] < 0.9 * losses[0]
    found = own_scripts.measured(tmp_path / "run", peers=2)["reward accuracy"]
    assert found["before"] == 0 and min(*found["after by peer"], found["consensus"]) > 0.5 + 5 * math.sqrt(0.25 / 77), found


def test_minilm_classifies_by_a_stock_trainer_with_a_head_that_is_mixed(research_data, tmp_path):
    output = started("classify", tmp_path / "run", research_data, 20, peers=2)
    run = read_run(output)
    assert run.config["lora"]["head"] == "mixed" and run.facts["label_names"]
    heads = [load_file(output / "checkpoints" / "round-00002" / f"peer-{k}" / "adapter_model.safetensors") for k in range(2)]
    name = next(key for key in heads[0] if "classifier" in key and key.endswith("weight"))
    assert torch.equal(heads[0][name], heads[1][name])  # two peers on a ring have the mean
    assert "accuracy" in run.records[-1]["eval"]
