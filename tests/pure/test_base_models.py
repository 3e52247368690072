"""Bases as people load large models: quantised, in shards, with recomputed activations; and what of it cannot be had."""

import importlib.util
import json
import math

import pytest
import tiny_models
import torch
import transformers
from test_packing import text_config
from tiny_runs import assert_goes_on, local_phase, make_run

from dfl import tasks
from dfl.cli import main
from dfl.config import ModelConfig
from dfl.run import memory, preflight
from dfl.run import train as running
from dfl.run.build import check
from dfl.run.evaluation import evaluate_target
from dfl.run.runtime import place_from_environment
from dfl.store.records import read_lines
from dfl.tasks import models
from dfl.tasks.quantized import QUANTIZATIONS
from dfl.training.executors import Sequential, Stacked


def needs(name):
    package = QUANTIZATIONS[name].package
    missing = importlib.util.find_spec(package) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{package} is not installed"))


# torchao's weights in 4 bits want a GPU
ON_CPU = [needs(name) for name in ("nf4", "fp4", "int8", "torchao_int8")]
QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def save_wide(tmp_path):
    """Blocks of 64 weights want layers that are not too small."""
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
            "max_position_embeddings": 64}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size)).save_pretrained(tmp_path / "llama")
    tiny_models.tokenizer(encoder=False).save_pretrained(tmp_path / "llama")


@QUIET
@pytest.mark.parametrize("name", ON_CPU)
def test_adapters_learn_on_a_rounded_base_and_stock_peft_loads_them(tmp_path, name):
    save_wide(tmp_path)
    fields = {"model__quantization": name, "lora__targets": "all-linear", "train__rounds": 4, "train__local_steps": 6}
    config = text_config(tmp_path, **fields)
    assert running.train(config) == 0
    first, *_, last = (line["eval"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "eval" in line)
    assert last["consensus"]["perplexity"] < 0.9 * first["consensus"]["perplexity"]
    said = evaluate_target(tmp_path / "run", peer="consensus")
    assert said["perplexity"] == pytest.approx(last["consensus"]["perplexity"], rel=1e-3)
    assert main(["export", str(tmp_path / "run"), "--merge", "--output", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32 and getattr(merged.config, "quantization_config", None) is None


@QUIET
@pytest.mark.parametrize("name", ON_CPU)
def test_stacked_is_looped_on_a_rounded_base(tmp_path, name):
    save_wide(tmp_path)
    found = {}
    for executor in (Sequential(), Stacked()):
        run, loaded = make_run(text_config(tmp_path, model__quantization=name, lora__targets="all-linear"))
        kinds = {type(site.module.get_base_layer().weight).__name__ for site in loaded.adapted.sites}
        assert kinds <= {"Params4bit", "Int8Params", "Int8Tensor"}, kinds
        losses = local_phase(run, executor=executor)
        found[type(executor).__name__] = losses, run.peers.x.clone()
    # the kernels of 8 bits round their input by row and column of a batch
    tolerance = {"rtol": 5e-2, "atol": 5e-3} if name == "int8" else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(found["Sequential"], found["Stacked"], **tolerance)


@QUIET
@pytest.mark.parametrize("fields", [{"lora__adapter": "dora"}, {"lora__start": "pissa"}, {"method": "fedex"}], ids=str)
@pytest.mark.parametrize("name", [needs("nf4"), needs("int8"), needs("torchao_int8")])
def test_what_needs_the_weights_gets_them(tmp_path, name, fields):
    """Magnitudes and starts of the weights as they were rounded: the model begins as the base."""
    save_wide(tmp_path)
    if name != "torchao_int8" and "lora__adapter" in fields:
        with pytest.raises(ValueError, match=f"model.quantization = '{name}' with lora.adapter = 'dora': on a CPU"):
            make_run(text_config(tmp_path, model__quantization=name, **fields))
        return
    run, loaded = make_run(text_config(tmp_path, model__quantization=name, **fields))
    inputs = run.task.inputs(run.task.collate(run.split.features[:2]))
    with torch.no_grad(), Sequential().bound(run.peers.adapted, run.rows(), None, [1]) as forward:
        adapted = forward(inputs, [1]).logits
        with loaded.adapted.model.disable_adapter():
            base = loaded.adapted.model(**inputs).logits if not run.peers.adapted.residual else None
    if base is not None:
        torch.testing.assert_close(adapted, base, rtol=1e-2, atol=1e-3)
    before = run.peers.x.clone()
    losses = local_phase(run, executor=Sequential())
    run.gossip.round(0, run.peers.x)
    assert torch.isfinite(losses).all() and torch.isfinite(run.peers.x).all() and (run.peers.x != before).any()


def test_hira_on_a_rounded_base_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lora.adapter = 'hira' multiplies the weights .* model.quantization = 'nf4'"):
        check(text_config(tmp_path, model__quantization="nf4", lora__adapter="hira", method="hira"))


def test_a_head_would_be_rounded_and_a_library_may_be_missing(tmp_path, monkeypatch):
    from dfl.tasks import quantized
    with pytest.raises(ValueError, match="model.quantization = 'nf4': the head of model.task = 'sequence_classification' would be"):
        quantized.check(ModelConfig(quantization="nf4"), "AutoModelForSequenceClassification")
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model.quantization = 'torchao_int8' needs torchao, which is not installed; pip install"):
        quantized.check(ModelConfig(quantization="torchao_int8"), "AutoModelForCausalLM")


def test_four_bits_of_torchao_want_a_gpu(tmp_path, monkeypatch, capsys):
    save_wide(tmp_path)
    monkeypatch.setattr("dfl.tasks.quantized.find_spec", lambda package: object())
    config = text_config(tmp_path, model__quantization="torchao_int4", device="cpu")
    for begin in (running.train, lambda config: preflight.ready(config, check(config), torch.device("cpu"), place_from_environment())):
        with pytest.raises(ValueError, match="model.quantization = 'torchao_int4' needs a GPU: .*; allowed here: torchao_int8, nf4"):
            begin(config)
    assert not (tmp_path / "run").exists()


def test_memory_is_told_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    save_wide(tmp_path)
    config = text_config(tmp_path, train__rounds=1)
    monkeypatch.setattr(models, "read_weights", lambda *given, **more: (_ for _ in ()).throw(OSError("no weights")))
    with pytest.raises(OSError, match="no weights"):
        running.train(config)
    said = capsys.readouterr().err
    assert "memory of the process, without the activations of a step:" in said and "base model" in said and "together" in said


@pytest.mark.parametrize("name, least", [("nf4", 3.0), ("int8", 2.2)])
def test_a_rounded_base_is_counted_as_such(tmp_path, monkeypatch, name, least):
    save_wide(tmp_path)
    sizes = {}
    for chosen in (None, name):
        monkeypatch.setattr("dfl.tasks.quantized.find_spec", lambda package: object())
        config = text_config(tmp_path, model__quantization=chosen)
        found = preflight.ready(config, check(config), torch.device("cpu"), place_from_environment())[1]
        sizes[chosen] = next(part.size for part in found if part.name == "base model")
    assert least < sizes[None] / sizes[name] < 8, sizes
    assert isinstance(memory.told(sizes[name]), str)


def bytes_in(value) -> int:
    """Of all tensors of a weight: the numbers, and what bitsandbytes and torchao keep beside them."""
    if type(value) is torch.Tensor:
        return value.untyped_storage().nbytes()
    if isinstance(value, torch.Tensor):
        names = getattr(value, "tensor_data_names", None)
        inside = [getattr(value, name) for name in names] if names else [value.data.as_subclass(torch.Tensor)]
        return sum(map(bytes_in, [*inside, getattr(value, "quant_state", None), getattr(value, "SCB", None)]))
    return sum(map(bytes_in, vars(value).values())) if type(value).__name__ == "QuantState" else 0


def saved_llama(folder, weights: bool, **size) -> None:
    """With weights, or the architecture alone."""
    config = transformers.LlamaConfig(max_position_embeddings=64, **size)
    made = transformers.LlamaForCausalLM(config) if weights else config
    made.save_pretrained(folder)
    tiny_models.tokenizer(encoder=False).save_pretrained(folder)


def told_parts(config) -> dict[str, float]:
    return {part.name: part.size for part in preflight.ready(config, check(config), torch.device("cpu"), place_from_environment())[1]}


@QUIET
@pytest.mark.parametrize("name", [pytest.param(None), *ON_CPU])
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 256), ("float32", 384)])
def test_the_bytes_told_of_a_base_are_those_that_it_takes(tmp_path, name, dtype, width):
    saved_llama(tmp_path / "llama", True, vocab_size=400, hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, intermediate_size=2 * width)
    config = text_config(tmp_path, model__quantization=name, model__dtype=dtype, lora__targets="all-linear")
    _, loaded = make_run(config)
    taken = sum(bytes_in(p) for key, p in loaded.adapted.model.named_parameters() if "lora_" not in key)
    assert told_parts(config)["base model"] == pytest.approx(taken, rel=0.1), name


@pytest.mark.parametrize(("name", "bytes_each"), [("nf4", 0.52), (None, 2.0)])  # as the smaller ones above take
def test_the_memory_of_eight_peers_on_an_8b_base(tmp_path, monkeypatch, name, bytes_each):
    """From the shapes of the architecture alone, whose sums are these."""
    save_wide(tmp_path)
    width, inner, layers, vocabulary, rank, peers = 4096, 14336, 32, 128256, 16, 8
    saved_llama(tmp_path / "llama", False, vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=32,
                num_key_value_heads=8, intermediate_size=inner)
    monkeypatch.setattr("dfl.tasks.quantized.find_spec", lambda package: object())
    monkeypatch.setattr(memory, "limit", lambda: math.inf)
    config = text_config(tmp_path, model__quantization=name, model__dtype="bfloat16", lora__targets="all-linear", lora__rank=rank,
                         lora__alpha=32, peers=peers, method="lora")
    linear = [(width, width), (width, width // 4), (width, width // 4), (width, width), *2 * [(width, inner)], (inner, width)]
    weights, row = layers * sum(i * o for i, o in linear), layers * sum(rank * (i + o) for i, o in linear)
    assert weights + 2 * vocabulary * width + (2 * layers + 1) * width == 8_030_261_248
    found = told_parts(config)
    assert found["base model"] == pytest.approx(bytes_each * weights + 2.0 * (8_030_261_248 - weights), rel=1e-3)
    assert found["adapters of 8 peers"] == found["their gradients"] == 4 * peers * row == found["their moments (adamw)"] / 2


def test_a_checkpoint_in_shards_is_a_checkpoint(tmp_path):
    save_wide(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    (tmp_path / "llama" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "llama", max_shard_size="100KB")
    assert len(list((tmp_path / "llama").glob("model-*-of-*.safetensors"))) > 1
    assert running.train(text_config(tmp_path, train__rounds=1)) == 0
    assert main(["export", str(tmp_path / "run"), "--merge", "--shard-size", "100KB", "--output", str(tmp_path / "merged")]) == 0
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize("executor", ["sequential", "stacked"])
@pytest.mark.parametrize("fields", [{"lora__dropout": 0.4}, {"data__packing": True}, {}], ids=str)
def test_recomputed_activations_change_nothing(tmp_path, executor, fields):
    """Not the dropout either, which is drawn from the peers' own generators."""
    found = []
    for on in (False, True):
        run, loaded = make_run(text_config(tmp_path, train__gradient_checkpointing=on, train__executor=executor, **fields))
        calls: list[int] = []
        layer = loaded.adapted.model.get_base_model().model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *given, calls=calls: calls.append(1))
        losses = local_phase(run)
        passes = 2 * (1 if executor == "stacked" else 4)
        assert len(calls) == passes * (2 if on else 1)
        found.append((losses, run.peers.x.clone()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_run_with_recomputed_activations_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    fields = {"train__gradient_checkpointing": True, "lora__dropout": 0.3}
    assert_goes_on(text_config, tmp_path, monkeypatch, 5, **fields)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_chosen_one(tmp_path, attention):
    _, loaded = make_run(text_config(tmp_path, model__attention=attention))
    assert loaded.adapted.model.config._attn_implementation == attention


def test_code_of_a_model_runs_only_where_it_is_trusted(tmp_path):
    """A folder whose architecture is its own: refused by default, and nothing of it is imported."""
    folder = tiny_models.save(tmp_path / "llama", "llama", layers=2)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
                                   "from transformers import LlamaConfig, LlamaForCausalLM\n"
                                   "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
                                   "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n")
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own_llama", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.name = .* cannot be loaded: .*contains custom code"):
        running.train(text_config(tmp_path))
    assert not (tmp_path / "ran").exists()
    assert running.train(text_config(tmp_path, model__trust_remote_code=True, train__rounds=1, lora__targets="all-linear")) == 0
    assert (tmp_path / "ran").exists()


def test_a_revision_is_of_the_hub(tmp_path, monkeypatch):
    tiny_models.save(tmp_path / "llama", "llama", layers=2)
    with pytest.raises(ValueError, match="model.revision = 'v2' is of a model of the hub"):
        tasks.prepare(text_config(tmp_path, model__revision="v2").model, text_config(tmp_path).data)
    asked = []

    def read(name, **options):
        asked.append(options)
        raise OSError("not here")

    with pytest.raises(OSError):
        models._fetch(read, models.locate(ModelConfig(name="somebody/model", revision="v2")))
    assert [options["revision"] for options in asked] == ["v2", "v2"] and not any(options["trust_remote_code"] for options in asked)
