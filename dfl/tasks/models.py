"""Pre-trained models: where they lie, their configuration, their weights. Every error is a line that names the field."""

import contextlib
import logging
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfl.config import DataConfig, ModelConfig
from dfl.tasks import chat, embedded, heads, quantized

CPU = torch.device("cpu")
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model", "tekken.json")
ALLOWED = "'minilm', a folder with config.json and model.safetensors, or the name of a model on the hub"


@dataclass(frozen=True)
class Source:
    """Where a model is read from: a folder, or a hub name and its revision; and whether code that lies there may run."""

    name: str
    local: bool
    verified: str | None = None  # SHA-256 of weights that are pinned
    revision: str | None = None
    trusted: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"trust_remote_code": self.trusted, **({"revision": self.revision} if self.revision else {})}


def locate(model: ModelConfig) -> Source:
    """Where `model.name` lies. ValueError for a folder that is not there or holds no model; the network is not asked."""
    if model.name == "minilm":
        folder = embedded.minilm_folder()
        return Source(str(folder), True, embedded.verify_minilm(folder))
    path = Path(model.name).expanduser()
    if path.is_dir():
        _check_folder(model, path)
        if model.revision is not None:
            raise ValueError(f"model.revision = {model.revision!r} is of a model of the hub; model.name = {model.name!r} is a folder")
        return Source(str(path.resolve()), True, trusted=model.trust_remote_code)
    if path.exists() or model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        raise ValueError(f"model.name = {model.name!r} is not a folder; allowed: {ALLOWED}")
    return Source(model.name, False, revision=model.revision, trusted=model.trust_remote_code)


def folder_of(source: Source) -> Path | None:
    """The model's folder, here or in the hub's cache; None where it was not downloaded yet."""
    if source.local:
        return Path(source.name)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def weight_bytes(model: ModelConfig) -> int | None:
    """Bytes of the model's weight files, here or in the hub's cache; None where they were not downloaded yet."""
    folder = folder_of(locate(model))
    return folder and (sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None)


def _check_folder(model: ModelConfig, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ValueError(f"model.name = {model.name!r} has no config.json: not a model folder; allowed: {ALLOWED}")
    if not any(path.glob("*.safetensors")):
        raise ValueError(f"model.name = {model.name!r} has no weights (*.safetensors); allowed: {ALLOWED}")


def read_config(model: ModelConfig, source: Source, label_names: list[str] | None, number: bool = False) -> Any:
    """The model's configuration with the first `model.layers` layers, `model.dropout` and the labels of the data, or one number."""
    from transformers import AutoConfig  # seconds: only when a model is wanted

    with quiet(), _one_line(model):
        config = _fetch(AutoConfig.from_pretrained, source)
    if model.layers is not None:
        keep_layers(model, config)
    if model.dropout is not None:
        set_dropout(model, config)
    if label_names is not None:
        config.num_labels = len(label_names)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: i for i, name in enumerate(label_names)}
        config.problem_type = "single_label_classification"
    elif number:
        config.num_labels, config.problem_type = 1, "regression"
    return config


def keep_layers(model: ModelConfig, config: Any) -> None:
    """Set the configuration to the first `model.layers` layers. ValueError where it does not tell its layers."""
    have = getattr(config, "num_hidden_layers", None)
    if not isinstance(have, int) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model.layers = {model.layers}: the architecture {config.model_type!r} of model.name = "
                         f"{model.name!r} has no single stack of layers to cut; leave it out")
    if model.layers > have:
        raise ValueError(f"model.layers = {model.layers} is more than the {have} layers of model.name = {model.name!r}")
    for key, value in config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == have:  # one entry a layer
            setattr(config, key, value[:model.layers])
    config.num_hidden_layers = model.layers


def set_dropout(model: ModelConfig, config: Any) -> None:
    """Set every dropout probability of the configuration, also those left open (`classifier_dropout: null`)."""
    names = [key for key, value in config.to_dict().items() if re.search(r"dropout|pdrop", key)
             and (value is None or type(value) in (int, float))]
    if not names:
        raise ValueError(f"model.dropout = {model.dropout}: the architecture {config.model_type!r} of model.name = "
                         f"{model.name!r} has no dropout; leave it out")
    for name in names:
        setattr(config, name, model.dropout)


def read_tokenizer(model: ModelConfig, source: Source, config: Any, data: DataConfig) -> Any:
    """The tokenizer, with a padding token that the configuration agrees on and within the model's positions."""
    from transformers import AutoTokenizer

    if source.local and not any(any(Path(source.name).glob(pattern)) for pattern in TOKENIZER_FILES):
        # the library would make up an empty one
        raise ValueError(f"model.name = {model.name!r} has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    with quiet(), _one_line(model):
        tokenizer = _fetch(AutoTokenizer.from_pretrained, source)
    if getattr(config, "type_vocab_size", 0) < 2:  # not every model takes what a tokenizer of another family adds
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"model.name = {model.name!r}: its tokenizer has no token that could pad a batch")
    text = config.get_text_config()
    # decoders find the last token of a text by it
    text.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    chat.use_template(tokenizer, data)
    check_length(model, config, tokenizer, data)
    return tokenizer


def check_ids(model: ModelConfig, config: Any, pad_id: int, features: list[dict]) -> None:
    """ValueError for a token that the model has no embedding for; one that no text uses does no harm."""
    embeddings = getattr(config.get_text_config(), "vocab_size", None)
    highest = max([pad_id, *(int(feature["input_ids"].max()) for feature in features)])
    if embeddings is not None and highest >= embeddings:
        raise ValueError(f"model.name = {model.name!r}: its tokenizer made token {highest}, the model has only "
                         f"{embeddings} embeddings")


def check_length(model: ModelConfig, config: Any, tokenizer: Any, data: DataConfig) -> None:
    """ValueError unless data.max_length leaves room for text and fits the model's positions."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    if re.search("roberta|camembert|bertweet|longformer", config.model_type):  # their positions start after padding's
        positions -= config.pad_token_id + 1
    most = min(positions, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=data.pair is not None)
    if not special < data.max_length <= most:
        raise ValueError(f"data.max_length = {data.max_length} does not fit model.name = {model.name!r}, which takes up to "
                         f"{most} tokens, {special} of them its own; allowed: {special + 1} to {most}")


def read_image_processor(model: ModelConfig, source: Source) -> Any:
    """The image processor that lies beside the model."""
    from transformers import AutoImageProcessor

    with quiet(), _one_line(model):
        return _fetch(AutoImageProcessor.from_pretrained, source)


def read_weights(model: ModelConfig, source: Source, config: Any, auto_class: str, seed: int,
                 device: torch.device = CPU) -> tuple[torch.nn.Module, tuple[str, ...], dict[str, Any]]:
    """The frozen model, the names of its head's modules, and facts. New weights depend on `seed` alone.

    On the CPU; quantised weights on `device`, where they are rounded.
    """
    import transformers

    auto = getattr(transformers, auto_class)
    with quiet(), _one_line(model), torch.random.fork_rng(devices=[]):
        net, info = _fetch(auto.from_pretrained, source, config=config, dtype=getattr(torch, model.dtype),
                           use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
                           **({"attn_implementation": model.attention} if model.attention else {}), **quantized.options(model, device))
    new = set(info["missing_keys"]) | {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    _check_layers(model, source, config, info)
    head = heads.modules(net, new) if auto_class != "AutoModelForCausalLM" else ()
    heads.check_new(model, net, new, head)
    heads.to_float32(net, head)  # before the draw, so that a half-precision base gets the same head
    heads.initialise(net, new, config, seed, model.head_std)
    net.requires_grad_(False).eval()
    facts = {"layers": getattr(config, "num_hidden_layers", None), "truncated": model.layers is not None,
             "new_weights": sorted(new), "num_parameters": net.num_parameters()}
    return net, head, facts


def _check_layers(model: ModelConfig, source: Source, config: Any, info: dict) -> None:
    """A cut stack must leave layers of the file unread: some architectures keep their depth elsewhere."""
    if model.layers is None:
        return
    from transformers import AutoConfig

    have = AutoConfig.from_pretrained(source.name, local_files_only=True, **source.options).num_hidden_layers
    if model.layers < have and not any(f".{have - 1}." in key for key in info["unexpected_keys"]):
        raise ValueError(f"model.layers = {model.layers}: the architecture {config.model_type!r} of model.name = "
                         f"{model.name!r} does not follow its number of layers; leave it out")


def _fetch(read: Any, source: Source, **options: Any) -> Any:
    """What lies in a folder or the cache; the hub is asked only for what is not here."""
    try:
        return read(source.name, local_files_only=True, **source.options, **options)
    except OSError:
        if source.local:
            raise
    return read(source.name, **source.options, **options)


@contextlib.contextmanager
def _one_line(model: ModelConfig) -> Iterator[None]:
    """Whatever a library says about a model it cannot read, in one line that names the field."""
    try:
        yield
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ... : all mean that this is no usable model
        said = textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__
        raise ValueError(f"model.name = {model.name!r} cannot be loaded: {said}; allowed: {ALLOWED}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No chatter about weights that are new on purpose, no bars for files of a few megabytes."""
    from transformers.utils import logging as chatter

    level, bars, hub = chatter.get_verbosity(), chatter.is_progress_bar_enabled(), logging.getLogger("huggingface_hub")
    hub_level = hub.level
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    hub.setLevel(logging.ERROR)  # eleven lines about retries, where one about the end is enough
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            chatter.enable_progress_bar()
