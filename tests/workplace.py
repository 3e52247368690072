"""A folder as a user of the launchers has it: launch scripts, a recipe of a few seconds, and what the plain command makes of it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import tiny_models
import tiny_runs
import yaml

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
               "HF_HUB_OFFLINE": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ROUNDS = 60


def make(folder: Path, rounds: int = ROUNDS) -> Path:
    """`my.yaml` in it runs four peers with a checkpoint every ten rounds; `launch` and `tests` are the project's."""
    model, data = tiny_models.save(folder / "model", "bert"), tiny_runs.write_data(folder)
    config = tiny_runs.make_config(model, data, Path("runs/plain"), lora__rank=16, train__rounds=rounds, train__local_steps=4,
                                   eval__every=20, checkpoint__every=10, measure__every=0)
    (folder / "my.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


def run(folder: Path, *words: str, status: int = 0, timeout: float = 120, **environment: str) -> str:
    """What a command in the workplace prints."""
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          timeout=timeout)
    assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def plain_digests(folder: Path) -> dict[str, str]:
    """The adapters of the plain run, which is made if it is not there."""
    if not (folder / "runs/plain").exists():
        run(folder, sys.executable, "-m", "dfl", "train", "my.yaml")
    return tiny_runs.adapter_digests(folder / "runs/plain")


def readme_blocks(section: str, language: str = "bash") -> list[str]:
    """The blocks of a section of launch/README.md, as they stand there."""
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "launch/README.md").read_text(), re.S | re.M))
    return re.findall(rf"```{language}\n(.*?)```", sections[section], re.S)


def wait_for(ready, seconds: float, what) -> None:
    """Until `ready()`; `what()` says how things stand when it takes longer."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.05)


def rounds_recorded(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return max(0, len(metrics.read_text().splitlines()) - 1) if metrics.exists() else 0
