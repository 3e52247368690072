"""What is exported is what was evaluated: by stock transformers and PEFT, with the code of the card, and through `dfl eval`."""

import json
import re
import shutil

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dfl import checkpoint, cli, train
from dfl.executors import Sequential
from dfl.export import merging, push
from dfl.record import read_lines

pytestmark = [pytest.mark.filterwarnings("ignore:grad and param do not obey", "ignore:.*is_gradient_checkpointing"), pytest.mark.timeout(120)]
CLASSIFY, GENERATE, IMAGES = "sequence_classification", "causal_lm", "image_classification"
CASES = {
    "bert, mixed head": ("bert", CLASSIFY, {"lora__head": "mixed", "rule": "decaf"}),
    "bert, frozen head, two layers": ("bert", CLASSIFY, {"model__layers": 2, "lora__rslora": True}),
    "gpt2, local head": ("gpt2", CLASSIFY, {"lora__head": "local"}),
    "llama, two layers": ("llama", CLASSIFY, {"lora__head": "mixed", "model__layers": 2}),
    "gpt2, adapted output": ("gpt2", GENERATE, {"lora__targets": "[c_attn,lm_head]"}),
    "llama, next token": ("llama", GENERATE, {"rule": "tad"}),
    "vit, mixed head": ("vit", IMAGES, {"lora__head": "mixed"}),
}


def dfl(*words, status=0):
    assert cli.main([str(word) for word in words]) == status


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    tiny_runs.write_data(folder)
    image = pytest.importorskip("PIL.Image")
    rng, names = np.random.default_rng(0), []
    for k in range(16):
        pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8) + np.uint8(120 * (k % 2))
        image.fromarray(pixels).save(folder / f"{k}.png")
        names.append({"image": f"{k}.png", "label": ["dark", "light"][k % 2]})
    (folder / "images.jsonl").write_text("\n".join(map(json.dumps, names)))
    return folder


def arguments(root, output, kind, task=CLASSIFY, **fields):
    if not (root / kind).exists():
        tiny_models.save(root / kind, kind)
    tree = {"model__task": task, "lora__targets": "all-linear", "train__lr": 0.05, "train__rounds": 2, "eval__every": 1,
            "checkpoint__every": 1, "checkpoint__keep": 2} | fields
    return tiny_runs.arguments(root / kind, root / ("images.jsonl" if task == IMAGES else "data.csv"), output, **tree)


@pytest.fixture(scope="module")
def run(root):
    """A run of two checkpoints that many tests read and none changes."""
    dfl("train", *arguments(root, root / "run", "bert", lora__head="mixed", lora__rank=4))
    return root / "run"


@torch.no_grad()
def logits_of_the_run(words, folder):
    """Logits of every peer and of the consensus on the run's evaluation batches, from the run's own rows and executor."""
    config = tiny_runs.configuration.load(None, words)
    state, _ = tiny_runs.make_run(config)
    train.restore(state, folder)
    rows = torch.cat([state.peers.x, train.consensus(state.peers.x, state.peers.layout, state.rule.product)[None]])
    batches, found = [state.task.inputs(batch) for batch in state.evaluator.batches], []
    for row in range(5):
        with Sequential().bound(state.peers.adapted, rows, None, [row]) as forward:
            found.append([forward(batch, [row]).logits.clone() for batch in batches])
    return batches, dict(zip(["0", "1", "2", "3", "consensus"], found, strict=True))


def of_the_card(folder, monkeypatch, root):
    """The names that the code of an export's card leaves behind, run in the folder as its reader would."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    shutil.copy(root / "1.png", folder / "picture.png")
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


@torch.no_grad()
def assert_same(model, batches, expected):
    for batch, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_code_of_the_card_computes_what_the_run_evaluated(root, tmp_path, monkeypatch, capsys, case):
    kind, task, fields = CASES[case]
    words = arguments(root, tmp_path / "run", kind, task, **fields)
    dfl("train", *words)
    batches, expected = logits_of_the_run(words, checkpoint.latest(tmp_path / "run"))
    recorded = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["eval"]
    for peer in ("3", "consensus"):
        metrics = recorded["consensus"] if peer == "consensus" else {k: v[3] for k, v in recorded["peers"].items()}
        for merge in ([], ["--merge"]):
            folder = tmp_path / f"{peer}{len(merge)}"
            dfl("export", tmp_path / "run", "--peer", peer, "--output", folder, *merge)
            names = of_the_card(folder, monkeypatch, root)
            assert_same(names["model"], batches, expected[peer])
            assert "picture" in (folder / "README.md").read_text() or names["inputs"]["input_ids"].shape[0] == 1
            capsys.readouterr()
            dfl("eval", folder, "--run", tmp_path / "run")
            again = json.loads(capsys.readouterr().out)
            assert {name: again[name] for name in metrics} == pytest.approx(metrics, rel=1e-5)
            if merge:
                auto = getattr(transformers, {CLASSIFY: "AutoModelForSequenceClassification", GENERATE: "AutoModelForCausalLM",
                                              IMAGES: "AutoModelForImageClassification"}[task])
                assert_same(auto.from_pretrained(folder).eval(), batches, expected[peer])  # nothing but the folder's name
    assert max(float((a - b).abs().max()) for a, b in zip(expected["3"], expected["consensus"], strict=True)) > 1e-4
