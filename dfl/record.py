"""What a run leaves behind beside its adapters: JSON lines, a description of itself, a progress line, trackers."""

import json
import platform
import subprocess
import sys
import time
from importlib import import_module, metadata
from pathlib import Path

import torch
from tqdm import tqdm

TRACKERS = ("tensorboard", "wandb", "mlflow")


class JsonLines:
    """Append-only `metrics.jsonl`, flushed line by line: what a killed run wrote is valid."""

    def __init__(self, path: Path, keep_before: int | None = None):
        """keep_before: drop the rounds from this one on (they are about to be run again), and any torn last line."""
        if keep_before is not None and path.exists():
            kept = [line for line in read_lines(path) if line["round"] < keep_before]
            replacement = path.with_suffix(".tmp")
            replacement.write_text("".join(json.dumps(line) + "\n" for line in kept))
            replacement.replace(path)
        self._file = path.open("a")

    def write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict]:
    """The records of a metrics file; a line torn by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def describe_run(config: dict, facts: dict) -> dict:
    """Configuration, versions, hardware and git commit: what somebody needs to run it again."""
    packages = ("torch", "transformers", "peft", "numpy", "networkx", "safetensors")
    return {
        "config": config,
        "facts": facts,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "hardware": {"machine": platform.machine(), "processor": _processor(), "threads": torch.get_num_threads(),
                     "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]},
        "git_commit": _git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


class Console:
    """A progress bar with the time left on a terminal, plain lines otherwise."""

    def __init__(self, rounds: int, done: int = 0, stream=None):
        self.stream, self.rounds, self.started, self.first = stream or sys.stderr, rounds, time.monotonic(), done
        self.bar = tqdm(total=rounds, initial=done, file=self.stream, unit="round", dynamic_ncols=True) \
            if self.stream.isatty() else None

    def say(self, text: str) -> None:
        if self.bar:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def round(self, t: int, text: str, important: bool) -> None:
        """One round is done. Plain logs get a line when `important`, or at least every fifth of the run."""
        if self.bar:
            self.bar.set_postfix_str(text)
            self.bar.update()
        elif important or (t + 1) % max(1, self.rounds // 5) == 0:
            left = (time.monotonic() - self.started) / (t + 1 - self.first) * (self.rounds - t - 1)
            self.say(f"round {t + 1}/{self.rounds}  {text}  left {_clock(left)}")

    def close(self) -> None:
        if self.bar:
            self.bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def check_trackers(names) -> None:
    """ValueError for a tracker we do not know or that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"report_to = {name!r} is not known; allowed: {', '.join(TRACKERS)}")
        try:
            import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError:
            raise ValueError(f"report_to = {name!r}: the package is not installed; pip install {name}") from None


class Trackers:
    """Numbers of each round to TensorBoard, Weights & Biases or MLflow, imported only when asked for."""

    def __init__(self, names, folder: Path, config: dict):
        self.sinks = [_SINKS[name](folder, config) for name in names]

    def log(self, t: int, record: dict) -> None:
        numbers = flatten(record)
        for log, _ in self.sinks:
            log(numbers, t)

    def close(self) -> None:
        for _, close in self.sinks:
            close()


def flatten(record: dict, prefix: str = "") -> dict[str, float]:
    """Nested numbers as `a/b` keys; lists and texts are left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[prefix + key] = value
    return flat


def _tensorboard(folder: Path, config: dict):
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(numbers: dict, t: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, t)
        writer.flush()

    return log, writer.close


def _wandb(folder: Path, config: dict):
    run = import_module("wandb").init(project="dfl", name=folder.name, config=config, dir=str(folder))
    return (lambda numbers, t: run.log(numbers, step=t)), run.finish


def _mlflow(folder: Path, config: dict):
    mlflow = import_module("mlflow")
    mlflow.start_run(run_name=folder.name)
    mlflow.log_params({key: str(value) for key, value in config.items()})
    return (lambda numbers, t: mlflow.log_metrics({k: float(v) for k, v in numbers.items()}, step=t)), mlflow.end_run


_SINKS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
