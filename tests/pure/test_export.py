"""What is exported is what was evaluated: by stock transformers and PEFT, with the code of the card, and through `dfl eval`."""

import html
import json
import os
import re
import shutil
from pathlib import Path

import made_up_runs
import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dfl import cli
from dfl.export import merging, push
from dfl.report import markdown
from dfl.run import checkpoint
from dfl.run import train as running
from dfl.store.records import read_lines
from dfl.training.executors import Sequential

QUIET = ("grad and param do not obey", ".*is_gradient_checkpointing", ".*tie_word_embeddings", "fan_in_fan_out")
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings(*(f"ignore:{message}" for message in QUIET))]
CLASSIFY, GENERATE, IMAGES = "sequence_classification", "causal_lm", "image_classification"
CASES = {
    "bert, mixed head": ("bert", CLASSIFY, {"lora__head": "mixed", "method": "decaf"}),
    "bert, frozen head, one layer": ("bert", CLASSIFY, {"model__layers": 1, "lora__rslora": True}),
    "gpt2, local head": ("gpt2", CLASSIFY, {"lora__head": "local"}),
    "llama, one layer": ("llama", CLASSIFY, {"lora__head": "mixed", "model__layers": 1}),
    "gpt2, adapted output": ("gpt2", GENERATE, {"lora__targets": "[c_attn,lm_head]"}),
    "llama, next token": ("llama", GENERATE, {"method": "tad"}),
    "ranks of their own, and a residual": ("bert", CLASSIFY, {"lora__rank": "[1,2,3,4]", "method": "fedhl"}),
    "a residual, mixed head": ("gpt2", CLASSIFY, {"method": "fedex", "lora__head": "mixed"}),
    "DoRA": ("gpt2", GENERATE, {"lora__adapter": "dora"}),
    "HiRA": ("llama", GENERATE, {"lora__adapter": "hira"}),
    "PiSSA": ("bert", CLASSIFY, {"lora__start": "pissa", "train__lr": 0.01}),
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
        tiny_models.save(root / kind, kind, layers=2)
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
    running.restore(state, folder)
    batches, found = [state.task.inputs(batch) for batch in state.evaluator.batches], {}
    for name, rows in (("3", state.rows().row(3)), ("consensus", state.consensus())):
        with Sequential().bound(state.peers.adapted, rows, None, [0]) as forward:
            found[name] = [forward(batch, [0]).logits.clone() for batch in batches]
    return batches, found


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


@pytest.mark.long
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


def card(folder):
    return ModelCard.load(folder / "README.md")


HOSTILE = ["<script>alert(1)</script>", "a | b", "`code`", "two\nlines", "\n---\n", "{{ secret }}", "**bold** _it_ ~~no~~ $x$",
           "[link](javascript:alert)", "![image](x)", "# heading", "1. one", "\u202ereversed"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_of_a_user_is_never_markup(text):
    """What must not stand there; and what a renderer of Markdown makes of it, one paragraph of that text."""
    for shown in (markdown.inline(text), markdown.line(text)):
        assert "\n" not in shown and "<" not in shown and not re.search(r"(?<!\\)[`|*{}\[\]~$]", shown) and "\u202e" not in shown
    assert not re.match(r"#|-|\+|=|\d+[.)]", markdown.line(text))
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    renderer = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    assert renderer.render(markdown.line(text)) == f"<p>{html.escape(flat, quote=False)}</p>\n"
    table = renderer.render("\n".join(map(markdown.row, (["a", "b"], ["---", "---"], [text, "x"]))))
    assert f"<td>{html.escape(flat, quote=False)}</td>\n<td>x</td>" in table and table.count("<td>") == 2


def test_names_keep_their_underscores():
    assert markdown.row(["edge_activation p=0.1", "_x_", "-0.5"]) == r"| edge_activation p=0.1 | \_x\_ | -0.5 |"


def test_a_card_with_hostile_labels_and_names(root, tmp_path):
    """Labels, columns, file and folder names reach the card as text: same paragraphs, same front matter, code that compiles."""
    names = dict(zip(["yes", "no"], ["</h1><script>alert(1)</script> | {{ x }} `", "\n---\nlicense: evil\n---\n# evil"], strict=True))
    rows = [line.split(",") for line in (root / "data.csv").read_text().splitlines()[1:]]
    column, path = "te|xt<b>", tmp_path / "da`ta|<i>.jsonl"
    path.write_text("\n".join(json.dumps({column: text, "label": names[label]}) for text, label in rows))
    (tmp_path / "va`lid.jsonl").write_text(path.read_text())
    words = arguments(root, tmp_path / "run", "bert")
    model = tmp_path / 'ba"se ```'
    shutil.copytree(root / "bert", model)
    words = [word for word in words if not word.startswith(("--data.train", "--data.valid_fraction", "--model.name"))]
    words += ["--data.train", str(path), "--data.valid", str(tmp_path / "va`lid.jsonl"), "--data.text", column,
              "--model.name", json.dumps(str(model))]
    dfl("train", *words)
    dfl("export", tmp_path / "run", "--output", tmp_path / "out")
    found, text = card(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert found.data.to_dict().keys() == {"library_name", "metrics", "pipeline_tag", "tags", "model-index"}
    assert found.data.eval_results[0].dataset_name == "va`lid.jsonl"
    assert "<script>" not in text and "<b>" not in text and "<i>" not in text and "{{" not in text.split("```python")[0]
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        '# ba"se \\`\\`\\`: consensus model of a decentralised run', "## Training", "## Evaluation", "## Use", "## Made with"]
    assert text.splitlines().count("---") == 2
    assert "Trained on da\\`ta\\|&lt;i&gt;.jsonl (columns te\\|xt&lt;b&gt;, label)" in text  # and not on the validation file
    assert "48 evaluation examples from va\\`lid.jsonl" in text
    code = re.search(r"^```python\n(.*?)^```$", text, re.S | re.M)[1]
    compile(code, "card", "exec")
    assert json.dumps(str(model)) in code


def test_the_card_tells_the_first_start_and_when_the_run_was_resumed(root, tmp_path, monkeypatch):
    times = iter(f"2026-01-0{k}T00:00:00Z" for k in range(1, 9))
    words = arguments(root, tmp_path / "run", "bert", train__rounds=1)
    for rounds in (1, 2, 3):
        with monkeypatch.context() as patch:
            now = next(times)
            patch.setattr("dfl.run.description.time.strftime", lambda *args, now=now: now)
            dfl("train", *words, f"--train.rounds={rounds}", "--resume")
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["started"] == "2026-01-01T00:00:00Z" and about["resumed"] == ["2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"]
    dfl("export", tmp_path / "run", "--output", tmp_path / "out")
    assert "begun 2026-01-01T00:00:00Z, resumed 2 times, last 2026-01-03T00:00:00Z." in card(tmp_path / "out").text


@pytest.mark.parametrize("mask, file, folder", [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)])
@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_an_export_has_the_modes_of_the_users_umask(run, tmp_path, mask, file, folder, merge):
    before = os.umask(mask)
    try:
        dfl("export", run, "--output", tmp_path / "out", *merge)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(found.values()) == {file} and any(name.endswith(".safetensors") for name in found)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")) if path.is_dir()} == {folder}


def test_the_card_tells_what_the_hub_and_people_want_to_know(run, tmp_path):
    dfl("export", run, "--peer", 1, "--output", tmp_path / "one")
    found = card(tmp_path / "one")
    recorded = read_lines(run / "metrics.jsonl")[-1]["eval"]
    about = yaml.safe_load(found.content.split("---")[1])
    assert about["library_name"] == "peft" and about["pipeline_tag"] == "text-classification" and "base_model" not in about
    assert {"decentralized-training", "method:lora", "topology:ring"} <= set(about["tags"])
    assert {r.metric_type: r.metric_value for r in found.data.eval_results} == {k: v[1] for k, v in recorded["peers"].items()}
    row = next(line for line in found.text.splitlines() if line.startswith("| accuracy"))
    before, spread = read_lines(run / "metrics.jsonl")[0]["eval"]["accuracy"]["mean"], recorded["accuracy"]
    one, both = recorded["peers"]["accuracy"][1], recorded["consensus"]["accuracy"]
    values = [before, one, spread["mean"], spread["min"], spread["max"], both]
    assert row == "| accuracy | higher | " + " | ".join(f"{v:.4f}" for v in values) + " |"
    commit = json.loads((run / "run.json").read_text())["git_commit"]
    made_with = f"dfl at commit {commit}" if commit else "dfl; python"
    for words in ("own model of peer 1 of 4", "Labels: no, yes", "ring", "head mixed", made_with):
        assert words in found.text
    dfl("export", run, "--merge", "--base", "someone/tiny-bert", "--output", tmp_path / "whole")
    about = card(tmp_path / "whole")
    assert (about.data.library_name, about.data.base_model, about.data.base_model_relation) == \
        ("transformers", "someone/tiny-bert", "finetune")
    assert "mean of the factors, with the mean of their heads" in about.text


def test_an_export_but_for_its_base_tells_no_path(run, tmp_path):
    dfl("export", run, "--output", tmp_path / "out", "--base", "someone/tiny-bert")
    for path in (p for p in (tmp_path / "out").rglob("*") if p.is_file()):
        assert str(run.parent).encode() not in path.read_bytes(), path


def test_a_round_without_evaluation_has_no_numbers(root, tmp_path):
    dfl("train", *arguments(root, tmp_path / "run", "bert", eval__every=2))
    dfl("export", tmp_path / "run", "--round", 1)
    found = card(tmp_path / "run" / "exports" / "round-00001-consensus")
    assert not found.data.eval_results and "did not evaluate after round 1" in found.text


def products(folder):
    """s B A of every layer of an adapter folder."""
    settings, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in (key for key in tensors if key.endswith("lora_A.weight")):
        name = key.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        alpha = settings["alpha_pattern"].get(name, settings["lora_alpha"])
        rank = len(tensors[key])
        scaling = alpha / (rank ** 0.5 if settings["use_rslora"] else rank)
        found[name] = scaling * tensors[key.replace("_A", "_B")].double() @ tensors[key].double()
    return found


@pytest.mark.parametrize("rslora", [False, True])
def test_another_rank_is_the_best_of_that_rank_and_the_loss_is_told(root, tmp_path, capsys, rslora):
    """Against a full SVD of the multiplied-out matrix; layers of unequal ranks and scalings end at one rank."""
    dfl("train", *arguments(root, tmp_path / "run", "bert", lora__rank=4, train__lr=0.1))
    adapter = checkpoint.latest(tmp_path / "run") / "peer-2"
    odd = "bert.encoder.layer.1.output.dense"
    settings, tensors = json.loads((adapter / "adapter_config.json").read_text()), load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{odd}.lora_A.weight"] = torch.randn(6, 32)
    tensors[f"base_model.model.{odd}.lora_B.weight"] = torch.randn(16, 6)
    save_file(tensors, adapter / "adapter_model.safetensors")
    settings |= {"use_rslora": rslora, "lora_alpha": 16, "rank_pattern": {odd: 6}, "alpha_pattern": {odd: 5}}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    made_up_runs.sign(adapter.parent)
    before = products(adapter)
    for rank in (2, 8):
        capsys.readouterr()
        dfl("export", tmp_path / "run", "--peer", 2, "--rank", rank, "--output", tmp_path / f"{rank}")
        said, text, after = capsys.readouterr().out, (tmp_path / f"{rank}" / "README.md").read_text(), products(tmp_path / f"{rank}")
        assert after.keys() == before.keys()
        for name, whole in before.items():
            u, s, vh = torch.linalg.svd(whole)
            best = (u[:, :rank] * s[:rank]) @ vh[:rank]
            torch.testing.assert_close(after[name], best, rtol=1e-4, atol=1e-6)
            lost = f"{float((whole - best).norm() / whole.norm()):.3g}" if rank == 2 else "0"
            assert re.search(rf"{re.escape(name)} +[46] +{re.escape(lost)}\n", said) and f"| {name} | " in text
            assert f"| {lost} |" in text
        settings = json.loads((tmp_path / f"{rank}" / "adapter_config.json").read_text())
        assert settings["r"] == rank and not settings["rank_pattern"] and not settings["alpha_pattern"]
        assert ("before the rank was lowered" in text) is (rank == 2) is (not card(tmp_path / f"{rank}").data.eval_results)
    dfl("eval", tmp_path / "8", "--run", tmp_path / "run")  # stock PEFT loads it
    assert settings["lora_alpha"] / (8 ** 0.5 if rslora else 8) == pytest.approx(16 / (2 if rslora else 4))  # the scaling stayed


@pytest.mark.parametrize("adapter, kind", [("dora", "DoRA"), ("hira", "HiRA")])
def test_what_is_more_than_a_product_keeps_its_rank(root, tmp_path, capsys, adapter, kind):
    dfl("train", *arguments(root, tmp_path / "run", "bert", lora__adapter=adapter, train__rounds=1))
    dfl("export", tmp_path / "run", "--rank", 1, status=2)
    said = capsys.readouterr().err
    assert re.search(f"--rank 1: the adapter (holds .*magnitude|is of the kind '{kind}').*; allowed: plain LoRA", said)


def test_half_types_are_said_to_be_rounded(run, tmp_path, capsys):
    dfl("export", run, "--merge", "--dtype", "bfloat16", "--shard-size", "10KB", "--output", tmp_path / "half")
    assert "before the change of rank or type" in capsys.readouterr().out
    tensors = {k: v for path in (tmp_path / "half").glob("*.safetensors") for k, v in load_file(path).items()}
    assert len(list((tmp_path / "half").glob("model-*-of-*.safetensors"))) > 1
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "stored as bfloat16" in card(tmp_path / "half").text and not card(tmp_path / "half").data.eval_results
    dfl("eval", tmp_path / "half", "--run", run)


def test_a_merged_model_that_computes_something_else_is_refused(root, run, tmp_path, monkeypatch, capsys):
    """The check is there for architectures nobody here has seen: an output layer left tied to the embedding is such a case."""
    dfl("train", *arguments(root, tmp_path / "run", "gpt2", GENERATE, lora__targets="[lm_head]"))
    monkeypatch.setattr(merging, "_untie", lambda model: None)
    dfl("export", tmp_path / "run", "--merge", "--output", tmp_path / "out", status=2)
    assert "differ from the adapter's by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*draft"))


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def test_damaged_checkpoints_are_passed_over_with_a_word(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "round-00002" / "peer-0" / "adapter_model.safetensors")
    dfl("export", tmp_path / "run", "--peer", 3)
    assert "passed over: checkpoint" in capsys.readouterr().err
    assert "after round 1" in card(tmp_path / "run" / "exports" / "round-00001-peer-3").text
    dfl("export", tmp_path / "run", "--round", 2, status=2)
    assert "peer-0/adapter_model.safetensors is missing or damaged" in capsys.readouterr().err
    flip(tmp_path / "run" / "checkpoints" / "round-00001" / "consensus" / "adapter_model.safetensors")
    dfl("export", tmp_path / "run", status=2)
    assert "all of its 2 are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--peer", 4], "--peer '4' is not in .*; allowed: 0 to 3, consensus"), (["--peer", "1/../2"], "--peer '1/../2'"),
    (["--shard-size", "5 loaves"], "--shard-size '5 loaves' is not a size"),
    (["--round", 7], "--round 7: .* has no such checkpoint; it has: 1, 2"), (["--rank", 0], "--rank 0 is not allowed"),
    (["--dtype", "float16"], "--dtype 'float16' is the type of a merged model"), (["--private"], "--private says how to upload"),
    (["--push", "no owner/x"], "--push 'no owner/x' is not a name"), (["--push", "alone"], "--push 'alone' lacks its owner"),
    (["--push", "me/it"], "the base model is the folder .*, which nobody else has; give its name"),
    (["--model.name", "/none"], "model.name = '/none' is not a folder"), (["--output", "{data}"], "exists and is no export")])
def test_what_export_refuses(root, run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    dfl("export", run, *output, *(root if word == "{data}" else word for word in words), status=2)
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1
    assert not (tmp_path / "out").exists() and (root / "data.csv").exists()


def test_an_export_is_replaced_on_request_only(run, tmp_path, capsys):
    dfl("export", run, "--output", tmp_path / "out")
    dfl("export", run, "--peer", 0, "--output", tmp_path / "out", status=2)
    assert "--overwrite" in capsys.readouterr().err and "consensus model of the 4" in card(tmp_path / "out").text
    dfl("export", run, "--peer", 0, "--output", tmp_path / "out", "--overwrite")
    assert "own model of peer 0" in card(tmp_path / "out").text


def everything(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_replaced_export_keeps_what_somebody_else_has_put_there(run, tmp_path, capsys):
    out = tmp_path / "out"
    dfl("export", run, "--merge", "--output", out)
    merged = everything(out).keys()
    for name in ("notes.txt", "base_config/mine.json", "plots/loss.pdf"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    dfl("export", run, "--output", out, "--overwrite")
    fresh = tmp_path / "fresh"
    dfl("export", run, "--output", fresh)
    assert "model.safetensors" in merged - everything(out).keys()
    assert everything(out) == everything(fresh) | dict.fromkeys(("notes.txt", "base_config/mine.json", "plots/loss.pdf"), b"mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


def test_no_file_of_a_user_is_replaced_or_uploaded_with_an_export(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    dfl("export", run, "--output", out)
    (out / "config.json").write_text("mine")  # which a merged model has, too
    before = everything(out)
    dfl("export", run, "--merge", "--output", out, "--overwrite", status=2)
    assert "'config.json' is there" in capsys.readouterr().err and everything(out) == before
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    dfl("export", run, "--output", out, "--overwrite", "--push", "me/it", "--base", "someone/tiny-bert", status=2)
    assert "'config.json', which would be uploaded" in capsys.readouterr().err and everything(out) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("about", ['{"made_by": "dfl"}', '{"made_by": "another", "files": ["README.md"]}', "[]", "no JSON"])
def test_a_folder_that_does_not_say_what_an_export_wrote_is_left(run, tmp_path, capsys, about):
    (tmp_path / "dfl.json").write_text(about)
    (tmp_path / "README.md").write_text("mine")
    before = everything(tmp_path)
    dfl("export", run, "--output", tmp_path, "--overwrite", status=2)
    assert "does not say which files" in capsys.readouterr().err and everything(tmp_path) == before


def test_an_export_replaces_nothing_through_a_link_or_outside(run, tmp_path, capsys):
    dfl("export", run, "--output", tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    before = everything(tmp_path / "out")
    dfl("export", run, "--output", tmp_path / "link", "--overwrite", status=2)
    assert "symbolic link" in capsys.readouterr().err and everything(tmp_path / "out") == before
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".out.draft").mkdir()
    (tmp_path / ".out.draft" / "mine").write_text("mine")
    about = json.loads((tmp_path / "out" / "dfl.json").read_text())
    (tmp_path / "out" / "dfl.json").write_text(json.dumps(about | {"files": [*about["files"], "../mine", str(tmp_path / "mine")]}))
    dfl("export", run, "--output", tmp_path / "out", "--overwrite")
    assert (tmp_path / "mine").read_text() == (tmp_path / ".out.draft" / "mine").read_text() == "mine"


class Hub:
    """In the place of HfApi: keeps what it is told, or fails."""

    endpoint, calls, error = "https://hub", [], None

    def create_repo(self, name, **options):
        if self.error:
            raise self.error
        self.calls.append((name, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))


def test_push_and_its_failures(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    words = ["export", run, "--output", tmp_path / "out", "--push", "me/it", "--base", "someone/tiny-bert"]
    dfl(*words, "--private")
    assert Hub.calls[0] == ("me/it", {"private": True, "exist_ok": True}) and Hub.calls[1][0] == "me/it"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "base_config", "tokenizer.json"} <= set(Hub.calls[1][1])
    assert "uploaded: https://hub/me/it" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny-bert"
    assert 'folder = "me/it"' in card(tmp_path / "out").text and card(tmp_path / "out").data.base_model == "someone/tiny-bert"
    monkeypatch.setattr(Hub, "error", ConnectionError("no route\nto the hub"))
    dfl(*words, "--overwrite", status=1)
    said = capsys.readouterr().err
    assert said.startswith("dfl: --push 'me/it' failed: no route to the hub; the export is in") and said.count("\n") == 1
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    dfl(*words, "--overwrite", status=1)
    assert "no token of the Hugging Face hub" in capsys.readouterr().err


def evaluated(capsys, *words):
    capsys.readouterr()
    dfl("eval", *words)
    return json.loads(capsys.readouterr().out)


def test_every_target_of_eval_on_a_file_gives_the_same_numbers(root, run, tmp_path, capsys):
    whole = evaluated(capsys, run, "--data", root / "data.csv")
    assert whole["examples"] == 48 and len(whole["peers"]["loss"]) == 4
    dfl("export", run, "--peer", 3, "--output", tmp_path / "adapter")
    dfl("export", run, "--peer", 3, "--merge", "--output", tmp_path / "merged")
    last = run / "checkpoints" / "round-00002"
    targets = [(run, "--peer", 3), (last, "--peer", 3), (last / "peer-3",), (tmp_path / "adapter",), (tmp_path / "merged",)]
    for target in targets:
        one = evaluated(capsys, *target, "--data", root / "data.csv")
        assert one["examples"] == 48 and one["accuracy"] == whole["peers"]["accuracy"][3]
        assert one["loss"] == pytest.approx(whole["peers"]["loss"][3], rel=1e-6)
    at = {line["round"]: line["eval"] for line in read_lines(run / "metrics.jsonl")}
    for found, recorded in ((evaluated(capsys, run), at[2]), (evaluated(capsys, run, "--round", 1), at[1]),
                            (evaluated(capsys, run / "checkpoints" / "round-00001"), at[1])):
        assert {key: found[key] for key in recorded} == recorded  # to the last bit


FILES = {
    "tsv": lambda rows: "sentence\tclass\n" + "".join(f"{t}\t{y}\n" for t, y in rows),
    "jsonl": lambda rows: "".join(json.dumps({"sentence": t, "class": y}) + "\n" for t, y in rows),
}


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_other_files_with_other_columns_and_a_prediction_for_each(run, tmp_path, capsys, kind):
    rows = [("good film", "yes"), ("a bad node and a bad array", "no"), ("not good", "no")]
    path = tmp_path / f"mine.{kind}"
    if kind == "parquet":
        table = pytest.importorskip("pyarrow")
        table.parquet = pytest.importorskip("pyarrow.parquet")
        table.parquet.write_table(table.table({"sentence": [t for t, _ in rows], "class": [y for _, y in rows]}), path)
    else:
        path.write_text(FILES[kind](rows))
    columns = ["--data.text", "sentence", "--data.label", "class"]
    one = evaluated(capsys, run, "--peer", "consensus", "--data", path, *columns, "--predictions", tmp_path / "said.jsonl")
    said = [json.loads(text) for text in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [(row["sentence"], row["label"]) for row in said] == rows
    first = {"tsv": 2, "jsonl": 1, "parquet": 1}[kind]
    assert [row["line"] for row in said] == [first, first + 1, first + 2]
    assert one["accuracy"] == sum(row["correct"] for row in said) / 3 and {row["prediction"] for row in said} <= {"yes", "no"}
    assert all((row["prediction"] == row["label"]) is row["correct"] and 0.5 <= row["probability"] <= 1 for row in said)


@pytest.mark.long
def test_predictions_of_a_language_model_and_of_images(root, tmp_path, capsys):
    dfl("train", *arguments(root, tmp_path / "words", "llama", GENERATE))
    one = evaluated(capsys, tmp_path / "words", "--peer", 0, "--data", root / "data.csv", "--predictions", tmp_path / "said.jsonl")
    said = [json.loads(text) for text in (tmp_path / "said.jsonl").read_text().splitlines()]
    tokens = sum(row["tokens"] for row in said)
    assert one["examples"] == len(said) == 48 and one["loss"] == pytest.approx(sum(r["loss"] * r["tokens"] for r in said) / tokens)
    for row in (said[1], said[9]):  # each line's own numbers, whatever batches it came through
        (tmp_path / "one.csv").write_text(f"text\n{row['text']}\n")
        assert evaluated(capsys, tmp_path / "words", "--peer", 0, "--data", tmp_path / "one.csv")["loss"] == pytest.approx(row["loss"])
    dfl("train", *arguments(root, tmp_path / "pictures", "vit", IMAGES))
    dfl("export", tmp_path / "pictures", "--output", tmp_path / "out")
    one = evaluated(capsys, tmp_path / "out", "--data", root / "images.jsonl", "--predictions", tmp_path / "said.jsonl")
    said = [json.loads(text) for text in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert one["examples"] == len(said) == 16 and said[3]["image"] == "3.png" and said[3]["label"] == "light"
    assert one["accuracy"] == sum(row["correct"] for row in said) / 16


def test_a_file_is_enough_without_the_training_data(root, run, tmp_path, capsys):
    """Somebody is given the run's folder, not the data it was trained on."""
    shutil.copytree(run, tmp_path / "run")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["data"]["train"] = str(tmp_path / "gone.csv")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    here = evaluated(capsys, tmp_path / "run", "--data", root / "data.csv")
    there = evaluated(capsys, run, "--data", root / "data.csv")
    assert {**here, "checkpoint": ""} == {**there, "checkpoint": ""}
    assert cli.main(["eval", str(tmp_path / "run")]) == 2 and "gone.csv" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["{run}", "--data", "{bad}"], "data.label = 'label': line 3 of .*bad.csv has the label 'perhaps', .*allowed: no, yes"),
    (["{run}", "--data", "{bad}", "--data.text", "txt"], "data.text = 'txt': no such column .*text"),
    (["{run}", "--data", "nothing.csv"], "data.file = 'nothing.csv' is not a file"),
    (["{run}", "--predictions", "p.jsonl"], "--predictions are of one model: add --peer"),
    (["{run}", "--peer", 0, "--predictions", "/none/p.jsonl"], "its folder does not exist"),
    (["{run}", "--peer", 9], "--peer '9' is not in"),
    (["{run}/checkpoints/round-00002/peer-0", "--peer", 1], "choose among the models of a run"),
    (["{run}/checkpoints/round-00002", "--round", 1], "is a checkpoint already"),
    (["{bert}"], "holds no examples: give --data FILE, or --run RUN"),
    (["{bert}", "--data", "{bad}"], "does not tell its task"),
    (["{root}"], "holds no run .*, no checkpoint .*, no adapter .* and no model")])
def test_what_eval_refuses(root, run, tmp_path, monkeypatch, capsys, words, message):
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\ngood film,yes\nbad film,perhaps\n")
    monkeypatch.chdir(tmp_path)
    filled = [str(word).format(run=run, bad=bad, bert=root / "bert", root=root) for word in words]
    dfl("eval", *filled, status=2)
    said = capsys.readouterr().err
    assert re.search(message, said) and said.count("\n") == 1


def test_an_adapter_that_does_not_fit_its_base_is_refused(root, run, tmp_path, capsys):
    tiny_models.save(root / "distilbert", "distilbert")
    dfl("export", run, "--output", tmp_path / "out")
    dfl("eval", tmp_path / "out", "--data", root / "data.csv", "--model.name", root / "distilbert", status=2)
    assert "cannot be loaded on this base model" in capsys.readouterr().err
    path = tmp_path / "out" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layer.1" not in k}, path)
    dfl("eval", tmp_path / "out", "--data", root / "data.csv", status=2)
    assert "missing adapter keys" in capsys.readouterr().err


def test_the_hub_token_is_asked_for_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OSError, match="no token"):
        push.check("me/it")
