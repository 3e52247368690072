"""run.json: what somebody needs to run it again."""

import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch


def describe_run(config: dict, facts: dict, before: dict | None = None) -> dict:
    """Configuration, versions, hardware and git commit: what somebody needs to run it again.

    before: the description of the run that goes on, whose start is the start; `resumed` lists when it went on.
    """
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
