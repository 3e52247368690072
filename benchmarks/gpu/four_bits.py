"""Eight peers on an 8B base in 4 bits (QLoRA: Dettmers et al. 2023, arXiv 2305.14314): memory against what a run tells, and speed.

The part is a process that begins anew: bitsandbytes asks for the GPU when it is imported, and the others do without (blocked.py).
"""

import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from benchmarks.gpu import ROOT
from benchmarks.gpu.models import llama
from benchmarks.gpu.setting import Missing, PartError, Setting
from benchmarks.gpu.speed import llama_figures
from dfl.config import ModelConfig
from dfl.tasks import quantized
from dfl.training.recomputing import recompute_activations


def four_bits(setting: Setting) -> None:
    """What `measured` says, in a process of its own."""
    try:
        version("bitsandbytes")
    except PackageNotFoundError:
        raise Missing("bitsandbytes is not installed; pip install '.[quantized]'") from None
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu.four_bits", setting.kind, setting.folder, setting.said], cwd=ROOT,
                          capture_output=True, text=True)
    if done.returncode:
        raise PartError((done.stderr or done.stdout).strip()[-1500:])


def measured(setting: Setting) -> None:
    """A local step of eight peers on all 32 layers, adapters on every linear layer, a sequence of 512 tokens each.

    The weights are random and never lie on a disk: each layer is rounded where it was made, as from_pretrained rounds it.
    """
    import bitsandbytes
    num, length = setting.pick(8, 2), setting.pick(512, 16)
    started = time.perf_counter()
    model = llama(setting, setting.pick(32, 2))
    told = quantized.bytes_of(model, ModelConfig(quantization="nf4", dtype="bfloat16"))
    rounded(model, bitsandbytes.nn, setting.device)
    setting.synchronize()
    setting.say("model", {"bytes_told": round(told), "seconds": round(time.perf_counter() - started, 1)})
    if not setting.small:
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        setting.check("as much memory as was told, to 5 %", abs(held / told - 1) < 0.05, held)
    recompute_activations(model)
    for executor in ("stacked", "sequential"):
        found = llama_figures(setting, model, executor, num, length, targets="all-linear")
        setting.check(f"{executor}, {num} peers", found["finite"] and found["peak_bytes"] < 80e9, found)


def rounded(model: nn.Module, layers, device: torch.device) -> None:
    """Put 4-bit layers in place of all linear ones but the output's."""
    output = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not output:
                made = layers.Linear4bit(child.in_features, child.out_features, bias=False, compute_dtype=child.weight.dtype,
                                         quant_type="nf4", device="meta")
                made.weight = layers.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", module=made)
                setattr(module, name, made.to(device))
    model.is_loaded_in_4bit = True  # by which PEFT knows its layers
    model.requires_grad_(False)


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    asked = Setting(kind, Path(paths[0]), said=Path(paths[1]))
    measured(asked)
    if asked.failed:
        sys.exit(f"not as it should be: {', '.join(asked.failed)}")
