"""Adapter and base as one whole model that needs neither this project nor PEFT."""

import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dfl import tasks
from dfl.config import Config
from dfl.run.evaluation import with_adapter
from dfl.seeds import derive
from dfl.tasks.models import quiet

TYPES = ("float32", "bfloat16", "float16")
# of the largest logit; float32 rounding of a deep model stays below a hundredth of it
_TOLERANCE = 1e-3


class Merged(NamedTuple):
    """The stored type, the number of parameters, and how far the logits of a probe moved: absolute, and the largest logit."""

    dtype: str
    num_parameters: int
    difference: float
    largest: float


def merge_folder(folder: Path, config: Config, names: list[str], dtype: str, shard_size: str) -> Merged:
    """Replace the adapter in `folder` by the whole model with its configuration and processor.

    dtype `auto` is that of the run's base model. Merged in float32, then rounded. ValueError where the merged model does not
    compute what the adapter did.
    """
    # rounded weights would be rounded once more: the adapter is merged into those of the file
    whole_base = config.model.model_copy(update={"quantization": None})
    base, processor = tasks.load_model(whole_base, config.data, names, seed=derive(config.seed, "head"))
    model = with_adapter(base, folder).float().eval()
    probe = _probe(model, config, processor)
    with torch.no_grad(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about tied weights, which are taken apart here
        before = model(**probe).logits
        _untie(model)
        whole = model.merge_and_unload(safe_merge=True)
        _check(before, whole(**probe).logits)
        whole = whole.to(getattr(torch, config.model.dtype if dtype == "auto" else dtype))
        shutil.rmtree(folder)
        whole.save_pretrained(folder, max_shard_size=shard_size)
        save_processor(processor, folder)
        stored, num_parameters = whole.dtype, sum(p.numel() for p in whole.parameters())
        del base, model, whole  # a large model need not be there twice
        after = _stock(folder, config, stored)(**{k: v.to(stored) if v.is_floating_point() else v for k, v in probe.items()}).logits
    if stored == torch.float32:
        _check(before, after)
    return Merged(str(stored).removeprefix("torch."), num_parameters, float((after.float() - before).abs().max()),
                  float(before.abs().max()))


def save_processor(processor, folder: Path) -> None:
    """Without what was true of the reading here only."""
    for key in ("local_files_only", "is_local"):
        getattr(processor, "init_kwargs", {}).pop(key, None)
    processor.save_pretrained(folder)


def save_generation(name: str, folder: Path) -> None:
    """The generation settings of a language model's base beside its adapter, where it has any."""
    from transformers import GenerationConfig
    try:
        with quiet():
            GenerationConfig.from_pretrained(name, local_files_only=True).save_pretrained(folder)
    except OSError:  # a base without any
        pass


def _stock(folder: Path, config: Config, dtype: torch.dtype) -> nn.Module:
    """The folder as somebody without this project reads it."""
    return getattr(transformers, tasks.TASKS[config.model.task.name].auto_class).from_pretrained(folder, dtype=dtype).eval()


def _probe(model: PeftModel, config: Config, processor) -> dict[str, Tensor]:
    """An input nobody chose: random tokens, or a random picture."""
    rng = np.random.default_rng(0)
    if config.model.task.name == "image_classification":
        picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        pixels = processor(picture, return_tensors="np")["pixel_values"]
        return {"pixel_values": torch.from_numpy(np.asarray(pixels, dtype=np.float32))}
    ids = torch.from_numpy(rng.integers(0, model.config.get_text_config().vocab_size, (2, min(16, config.data.max_length))))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check(before: Tensor, after: Tensor) -> None:
    difference, largest = float((after - before).abs().max()), float(before.abs().max())
    if not difference <= _TOLERANCE * max(largest, 1e-3):
        raise ValueError(f"--merge: the merged model's logits differ from the adapter's by {difference:.2g} (largest logit "
                         f"{largest:.2g}); export the adapter without --merge")


def _untie(model: PeftModel) -> None:
    """An adapted output layer gets a matrix of its own: merging into one that is the embedding as well would change both."""
    net = model.get_base_model()
    out, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    if isinstance(out, BaseTunerLayer) and out.get_base_layer().weight is embedding.weight:
        out.get_base_layer().weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        net.config.tie_word_embeddings = net.config.get_text_config().tie_word_embeddings = False
