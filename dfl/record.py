"""What a run leaves behind beside its adapters: JSON lines, a description of itself, a progress line, trackers."""

import json
import logging
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path

from tqdm import tqdm

from dfl.jsonlines import rewind, scan
from dfl.plugins import did_you_mean

logger = logging.getLogger(__name__)
TRACKERS = ("tensorboard", "wandb", "mlflow", "none")


class JsonLines:
    """Append-only `metrics.jsonl`, flushed line by line: what a killed run wrote is valid."""

    def __init__(self, path: Path, keep_before: int | None = None, guard: Callable[[], None] = lambda: None):
        """keep_before: drop the rounds from this one on (they are about to be run again), and any torn last line (dfl/jsonlines.py).
        guard: called before every write, raises where the file is another run's.

        OSError names the file.
        """
        if keep_before is not None and path.exists():
            guard()
            rewind(path, keep_before)
        # unbuffered: after a failed write nothing is left that close would try to write again
        self._path, self._file, self._guard = path, path.open("ab", buffering=0), guard

    def write(self, record: dict) -> None:
        self._guard()
        line = (json.dumps(finite(record), allow_nan=False) + "\n").encode()
        try:
            while line:  # a disk that fills up takes a part, and refuses the rest
                line = line[self._file.write(line):]
        except OSError as error:
            raise OSError(error.errno, f"the record could not be written: {error.strerror}", str(self._path)) from error

    def close(self) -> None:
        self._file.close()


def finite(value):
    """JSON has no infinity and no NaN: null stands for both."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict]:
    """The records of a metrics file. A line torn by a kill is left out; so is a damaged one, with a warning that names it."""
    found = scan(path.read_bytes())
    if found.problem:
        logger.warning("dfl: WARNING: %s: %s", path.parent, found.problem)
    return found.records


def describe_run(config: dict, facts: dict, before: dict | None = None) -> dict:
    """Configuration, versions, hardware and git commit: what somebody needs to run it again.

    before: the description of the run that goes on, whose start is the start; `resumed` lists when it went on.
    """
    import torch  # seconds: those who only read records need not wait for it
    packages = ("torch", "transformers", "peft", "numpy", "networkx", "safetensors")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "config": config,
        "facts": facts,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "hardware": {"machine": platform.machine(), "processor": _processor(), "threads": torch.get_num_threads(),
                     "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]},
        "git_commit": _git_commit(),
        "started": (before or {}).get("started", now),
        **({} if before is None else {"resumed": [*before.get("resumed", []), now]}),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _git_commit(source: Path = Path(__file__)) -> str | None:
    """The commit of the checkout that `source` belongs to; None for an installed copy, which may lie in another's checkout."""
    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=source.parent, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", source.name) else None


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

    def round(self, t: int, text: str, important: bool, evaluation: str = "") -> None:
        """One round is done. An evaluation stays on the screen, above the bar. Plain logs get a line when `important`, or at least
        every fifth of the run."""
        if self.bar:
            if evaluation:
                self.say(f"round {t + 1}/{self.rounds}  {evaluation}")
            self.bar.set_postfix_str(text)
            self.bar.update()
        elif important or (t + 1) % max(1, self.rounds // 5) == 0:
            left = (time.monotonic() - self.started) / (t + 1 - self.first) * (self.rounds - t - 1)
            self.say("  ".join(part for part in (f"round {t + 1}/{self.rounds}", text, evaluation, f"left {clock(left)}") if part))

    def close(self) -> None:
        if self.bar:
            self.bar.close()


def clock(seconds: float) -> str:
    """3725 as `1:02:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def check_trackers(names) -> None:
    """ValueError for a tracker we do not know or that is not installed."""
    for name in names:
        if name == "none":
            continue
        if name not in TRACKERS:
            raise ValueError(f"report_to = {name!r} is not known{did_you_mean(name, TRACKERS)}; allowed: {', '.join(TRACKERS)}")
        try:
            module = import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError:
            module = None
        if getattr(module, "__file__", None) is None:  # a mere folder of that name, such as W&B leaves behind, imports too
            raise ValueError(f"report_to = {name!r}: the package is not installed; pip install {name}") from None


class Trackers:
    """Numbers of each round to TensorBoard, Weights & Biases or MLflow, imported only when asked for."""

    def __init__(self, names, folder: Path, config: dict):
        """ValueError for a tracker that will not start (no account, no server)."""
        self.sinks = [_start(name, folder, config) for name in names if name != "none"]

    def log(self, t: int, record: dict) -> None:
        numbers = flatten(record)
        for log, _ in self.sinks:
            log(numbers, t)

    def close(self) -> None:
        for _, close in self.sinks:
            close()


def _start(name: str, folder: Path, config: dict):
    try:
        return _SINKS[name](folder, config)
    except Exception as error:  # each has errors of its own
        raise ValueError(f"report_to = {name!r} does not start: {' '.join(str(error).split())[:200]}") from error


def flatten(record: dict, prefix: str = "") -> dict[str, float]:
    """Nested numbers as `a/b` keys; lists, texts and what is not finite are left out."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
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
